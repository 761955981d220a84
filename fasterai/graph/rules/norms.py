"""Norms: batch norm treats channels apart, layer and group norms average over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.rules.trace import Trace, Value, rule

__all__: list[str] = []


@rule("batch_norm", "instance_norm")
def batch_norm(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    channel = x.dims[1]
    trace.labels.pin_all([x.dims[0], *x.dims[2:]], f"{node.name} averages over it")
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Value):
            channel = trace.labels.join(channel, value.dims[0], f"{node.name} reads a dimension of fixed size")
    trace.norms(node, channel)
    return Value(x.shape, (x.dims[0], channel, *x.dims[2:]))


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, node: Any, x: Value, shape: Sequence[int], *arguments: Any, **keywords: Any) -> Value:
    normed = x.dims[-len(shape) :]
    trace.averages(normed, node.name)
    if len(shape) == 1:
        trace.norms(node, normed[0])
        _rescale(trace, *arguments, **keywords)
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Value):
            for mine, its in zip(normed, value.dims, strict=True):
                trace.labels.join(mine, its, node.name)
    return x


def _rescale(trace: Trace, weight: Any = None, *rest: Any, **keywords: Any) -> None:
    """Note a norm's weight that must grow when silent channels are removed, since the average is then over fewer channels."""
    weight = keywords.get("weight", weight)
    if not trace.exact and isinstance(weight, Value) and weight.is_weight and weight.places:
        trace.rescaled.add(weight.places[0][0])


@rule("group_norm")
def group_norm(trace: Trace, node: Any, x: Value, groups: int, *arguments: Any, **keywords: Any) -> Value:
    channel = x.dims[1]
    trace.labels.pin_all(x.dims[2:], f"{node.name} averages over it")
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Value):
            channel = trace.labels.join(channel, value.dims[0], f"{node.name} reads a dimension of fixed size")
    if isinstance(channel, np.ndarray):
        rows = channel.reshape(groups, -1)
        # Whole groups leave the others as they are; the same channel of each changes all averages.
        same = not trace.exact and trace.choose(f"group norm {rows.shape}", 2) == 1
        trace.labels.unify(rows.T if same else rows)
        if same:
            _rescale(trace, *arguments, **keywords)
    trace.norms(node, channel)
    return Value(x.shape, (x.dims[0], channel, *x.dims[2:]))
