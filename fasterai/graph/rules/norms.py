"""Norms: batch norm treats channels apart, layer and group norms average over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, FREE, Dim, is_labelled, is_zeroed, zeroed
from fasterai.graph.rules.trace import Trace, Value, all_fixed, called, marked_as, module_of, rule, shapes_of, unmarked

__all__: list[str] = []


@rule("batch_norm", "instance_norm")
def batch_norm(trace: Trace, node: Any, x: Value, weight: Any = None, bias: Any = None, *rest: Any, **keywords: Any) -> Value:
    """Follow a norm of each channel by itself; one by averages of its input alone may lose zeros that it averages over."""
    channel, others = x.dims[1], [x.dims[0], *x.dims[2:]]
    alone = called(node) == "batch_norm" and len(rest) > 2 and rest[:2] == (None, None) and bool(rest[2])
    labelled = [dim for dim in others if is_labelled(dim)]
    if not (alone and len(labelled) == 1 and trace.told(node, "standard", labelled[0], f"{node.name} averages over it")):
        trace.labels.pin_all(others, f"{node.name} averages over it")
    for value in (weight, bias, *rest, *keywords.values()):
        if isinstance(value, Value):
            channel = trace.labels.join(channel, value.dims[0], f"{node.name} reads a dimension of fixed size")
    trace.norms(node, channel)
    made = Value(x.shape, (x.dims[0], channel, *x.dims[2:]))
    zeros = is_zeroed(x.dims[1])
    if not (alone and zeros.any()):
        return _scaled(trace, made, 1, weight, bias)
    # What is zero has a mean of zero.
    zeros = zeros | is_zeroed(weight.dims[0]) if isinstance(weight, Value) else zeros
    return marked_as(unmarked(made), 1, zeros & is_zeroed(bias.dims[0]) if isinstance(bias, Value) else zeros)


def _scaled(trace: Trace, made: Value, d: int, weight: Any, bias: Any) -> Value:
    """Return a norm's result, marked as zero along dimension `d` where scale and shift are; nowhere without a scale."""
    if not isinstance(weight, Value):
        trace.shown.append(made.dims[d])
        return unmarked(made)
    flags = is_zeroed(weight.dims[0])
    return marked_as(unmarked(made), d, flags & is_zeroed(bias.dims[0]) if isinstance(bias, Value) else flags)


@rule("layer_norm", "rms_norm")
def layer_norm(
    trace: Trace, node: Any, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any, **keywords: Any
) -> Value:
    normed = x.dims[-len(shape) :]
    if not trace.counts(node, normed[0] if len(shape) == 1 else FIXED):
        trace.averages(normed, node.name)
        if len(shape) == 1:
            _rescale(trace, weight, normed[0])
    if len(shape) == 1:
        trace.norms(node, normed[0])
    bias = bias if isinstance(bias, Value) else None  # of an RMS norm it is eps
    for value in (weight, bias):
        if value is not None:
            joined = [trace.labels.join(mine, its, node.name) for mine, its in zip(normed, value.dims, strict=True)]
            normed = tuple(its if mine is FREE else mine for mine, its in zip(normed, joined, strict=True))
    x = Value(x.shape, (*x.dims[: -len(shape)], *normed))
    if len(shape) > 1:
        return unmarked(x)
    if "rms" in called(node):  # it takes no mean away
        flags = is_zeroed(x.dims[-1]) | (is_zeroed(weight.dims[0]) if isinstance(weight, Value) else False)
        return marked_as(unmarked(x), -1, flags)
    return _scaled(trace, x, -1, weight, bias)


@rule("native_layer_norm")
def native_layer_norm(trace: Trace, node: Any, x: Value, shape: Sequence[int], *rest: Any) -> Any:
    """Follow a layer norm that hands back its averages too, as a slim norm calls it."""
    statistics = [Value(s, all_fixed(s)) for s in shapes_of(node)[1:]]
    return [layer_norm(trace, node, x, shape, *rest), *statistics]


def _rescale(trace: Trace, weight: Any, dim: Dim) -> None:
    """Note a norm's weight that must grow when channels that are zero go: its average is then one over fewer squares."""
    is_zero = bool(np.all(is_zeroed(dim)))
    if not trace.exact and is_zero and isinstance(weight, Value) and weight.is_weight and weight.places:
        trace.rescaled.add(weight.places[0][0])


@rule("group_norm")
def group_norm(
    trace: Trace, node: Any, x: Value, groups: int, weight: Any = None, bias: Any = None, *rest: Any, **keywords: Any
) -> Value:
    channel = x.dims[1]
    trace.labels.pin_all(x.dims[2:], f"{node.name} averages over it")
    for value in (weight, bias):
        if isinstance(value, Value):
            channel = trace.labels.join(channel, value.dims[0], f"{node.name} reads a dimension of fixed size")
    if isinstance(channel, np.ndarray):
        rows = zeroed(channel, is_zeroed(x.dims[1])).reshape(groups, -1)
        # Whole groups leave the others as they are; the same channel of each changes all averages.
        can = module_of(node) in trace.slim or not trace.exact
        same = can and trace.choose(f"group norm {rows.shape}", 2) == 1
        one = trace.labels.unify(rows.T if same else rows)
        if same and not trace.counts(node, one):
            trace.averages([one], node.name)
            _rescale(trace, weight, one)
    trace.norms(node, channel)
    return _scaled(trace, Value(x.shape, (x.dims[0], channel, *x.dims[2:])), 1, weight, bias)
