"""Operations that permute, insert, drop or repeat dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, FREE, Dim
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    broadcast,
    marked_as,
    rule,
    settled,
    shape_of,
    shapes_of,
    unknown_tensor,
    unmarked,
    zeros_at,
)

__all__: list[str] = []


@rule("permute")
def permute(trace: Trace, node: Any, x: Value, order: Sequence[int]) -> Value:
    return Value(shape_of(node), tuple(x.dims[i] for i in order))


@rule("transpose", "swapaxes", "swapdims")
def transpose(trace: Trace, node: Any, x: Value, a: int, b: int) -> Value:
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return Value(shape_of(node), tuple(dims))


@rule("t", "numpy_T", "mT")
def transposed(trace: Trace, node: Any, x: Value) -> Value:
    if "mT" in str(node.target):
        return Value(shape_of(node), (*x.dims[:-2], x.dims[-1], x.dims[-2]))
    return Value(shape_of(node), x.dims[::-1])


@rule("movedim")
def movedim(trace: Trace, node: Any, x: Value, source: Any, destination: Any) -> Value:
    order = np.moveaxis(np.empty((0,) * 0 + tuple(range(1, len(x.shape) + 1))), source, destination).shape
    return Value(shape_of(node), tuple(x.dims[i - 1] for i in order))


@rule("unsqueeze")
def unsqueeze(trace: Trace, node: Any, x: Value, dim: int) -> Value:
    dims = list(x.dims)
    dims.insert(dim % (len(dims) + 1), FREE)
    return Value(shape_of(node), tuple(dims))


@rule("squeeze")
def squeeze(trace: Trace, node: Any, x: Value, dim: Any = None) -> Value:
    given = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(x.shape) for d in given if x.shape[d] == 1}
    for d in gone:
        trace.labels.pin(x.dims[d], f"{node.name} relies on its size of 1")
    return Value(shape_of(node), tuple(d for i, d in enumerate(x.dims) if i not in gone))


@rule("expand", "expand_as", "broadcast_to")
def expand(trace: Trace, node: Any, x: Value, *rest: Any, **keywords: Any) -> Value:
    shape = shape_of(node)
    other = unmarked(rest[0]).dims if rest and isinstance(rest[0], Value) else None
    dims: list[Dim] = [FREE] * len(shape) if other is None else list(other)
    for i in range(1, len(x.shape) + 1):
        if x.shape[-i] == shape[-i]:
            reason = f"{node.name} meets a dimension of fixed size"
            joined = x.dims[-i] if other is None else trace.labels.join(x.dims[-i], dims[-i], reason)
            dims[-i] = x.dims[-i] if isinstance(joined, np.ndarray) and isinstance(x.dims[-i], np.ndarray) else joined
        else:
            trace.labels.pin(x.dims[-i], f"{node.name} repeats its single entry")
    return Value(shape, tuple(dims))


@rule("broadcast_tensors")
def broadcast_tensors(trace: Trace, node: Any, values: Sequence[Value]) -> list[Value]:
    """Join what meets; each result is zero where its own tensor is."""
    shape = shapes_of(node)[0]
    made = unmarked(broadcast(trace, node.name, values, shape))
    results = [made] * len(values)
    for i in range(-len(shape), 0):
        results = [marked_as(v, i, zeros_at(x, i, shape[i])) for v, x in zip(results, values, strict=True)]
    return results


@rule("unfold")
def unfold(trace: Trace, node: Any, x: Value, dim: int, *sizes: int) -> Value:
    """Follow windows along a dimension, which stay; what stands in one becomes the last dimension."""
    trace.labels.pin(x.dims[dim], f"{node.name} takes windows of it")
    return Value(shape_of(node), (*settled(x, [dim]).dims, FIXED))


@rule("repeat", "tile")
def repeat(trace: Trace, node: Any, x: Value, times: Sequence[int]) -> Value:
    shape = shape_of(node)
    dims: list[Dim] = [FREE] * len(shape)
    for i in range(1, len(x.shape) + 1):
        dim, count = x.dims[-i], shape[-i] // x.shape[-i]
        carried: Dim = np.tile(dim, count) if isinstance(dim, np.ndarray) else dim
        dims[-i] = carried
    return Value(shape, tuple(dims))


@rule("repeat_interleave")
def repeat_interleave(trace: Trace, node: Any, x: Value, times: Any, dim: int | None = None, **keywords: Any) -> Value:
    if not isinstance(times, int) or dim is None:
        return unknown_tensor(trace, node, x, times)
    dims = list(x.dims)
    carried = dims[dim]
    dims[dim] = np.repeat(carried, times) if isinstance(carried, np.ndarray) else carried
    return Value(shape_of(node), tuple(dims))


@rule("roll")
def roll(trace: Trace, node: Any, x: Value, shifts: Any, dims: Any = ()) -> Value:
    moved = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
    for d in moved:
        trace.labels.pin(x.dims[d], f"{node.name} shifts its entries")
    return settled(x, moved)
