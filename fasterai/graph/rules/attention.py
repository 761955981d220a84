"""Scaled dot-product attention: its heads are removed whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasterai.graph.rules.trace import Trace, Value, broadcast, marked_as, rule, shape_of, unmarked, zero_in_either, zeros_at

__all__: list[str] = []


@rule("scaled_dot_product_attention")
def attention(
    trace: Trace, node: Any, q: Value, k: Value, v: Value, mask: Value | None = None, *rest: Any, **keywords: Any
) -> Value:
    labels, name = trace.labels, node.name
    if keywords.get("scale") is None:
        labels.pin_all([q.dims[-1], k.dims[-1]], f"{name}'s scale depends on the width of a head")
    else:
        labels.join(q.dims[-1], k.dims[-1], f"{name} reads a dimension of fixed size")
        width = zero_in_either(q.dims[-1], k.dims[-1])
        trace.sums(node, width, f"{name} sums over it without a weight", is_product=True)
    labels.pin_all([q.dims[-2], k.dims[-2], v.dims[-2]], f"{name} computes across it")
    shape = shape_of(node)
    mask = mask if mask is not None else keywords.get("attn_mask")
    heads = [Value(x.shape[:-2], x.dims[:-2]) for x in (q, k, v)]
    if keywords.get("enable_gqa"):
        heads = [_repeat_heads(x, q.shape[-3]) for x in heads]
    if mask is not None:
        labels.pin_all(mask.dims[-2:], f"{name} computes across it")
        heads.append(Value(mask.shape[:-2], mask.dims[:-2]))
    given = broadcast(trace, name, heads, shape[:-2])
    for d in range(-len(given.shape), 0):  # a head whose values are zero hands on zero
        given = marked_as(given, d, zeros_at(heads[2], d, given.shape[d]))
    return Value(shape, (*given.dims, unmarked(q).dims[-2], v.dims[-1]))


def _repeat_heads(x: Value, heads: int) -> Value:
    """Repeat the labels of the keys' heads, since in grouped queries each serves a run of the queries' heads."""
    dim = x.dims[-1]
    repeated = np.repeat(dim, heads // x.shape[-1]) if isinstance(dim, np.ndarray) else dim
    return Value((*x.shape[:-1], heads), (*x.dims[:-1], repeated))
