"""Operations that join tensors or take parts: concatenation, splits, slices, indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fasterai.graph.labels import FIXED, Dim
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    blend,
    broadcast,
    called,
    rule,
    shape_of,
    shapes_of,
    unknown_tensor,
    values_in,
    without,
)

__all__ = ["indexed_run"]


@rule("cat", "concat", "concatenate")
def cat(trace: Trace, node: Any, values: Sequence[Value], dim: int = 0) -> Value:
    shape = shape_of(node)
    dim %= len(shape)
    values = [v for v in values if v.shape != (0,)]
    joined: list[Dim] = list(values[0].dims)
    for i in range(len(shape)):
        if i == dim:
            joined[i] = _concatenate(trace, node.name, [v.dims[i] for v in values], [v.shape[i] for v in values])
        else:
            for v in values[1:]:
                joined[i] = trace.labels.join(joined[i], v.dims[i], f"{node.name} meets a dimension of fixed size")
    return Value(shape, tuple(joined))


def _concatenate(trace: Trace, name: str, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    if not any(isinstance(d, np.ndarray) for d in dims):
        return FIXED
    parts = []
    for dim, size in zip(dims, sizes, strict=True):
        if isinstance(dim, np.ndarray):
            parts.append(dim)
        else:
            parts.append(trace.labels.new(size))
            trace.labels.pin(parts[-1], f"{name} places a part of fixed size next to it")
    return np.concatenate(parts)


@rule("stack")
def stack(trace: Trace, node: Any, values: Sequence[Value], dim: int = 0) -> Value:
    inner = broadcast(trace, node.name, values, values[0].shape)
    dims = list(inner.dims)
    dims.insert(dim % (len(dims) + 1), FIXED)
    return Value(shape_of(node), tuple(dims))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split")
def parts(trace: Trace, node: Any, x: Value, sizes: Any = None, dim: int = 0, **keywords: Any) -> list[Value]:
    if "unbind" in str(node.target):
        dim = keywords.get("dim", sizes if isinstance(sizes, int) else 0)
        trace.labels.pin(x.dims[dim], f"{node.name} splits it into single entries")
        shapes = shapes_of(node)
        return [Value(s, without(x.dims, [dim], len(s))) for s in shapes]
    shapes = shapes_of(node)
    cut = x.dims[dim]
    lengths = [s[dim] for s in shapes]
    if isinstance(cut, np.ndarray):
        if len(set(lengths)) == 1:  # the same index of every part goes, so that the parts stay equal
            trace.labels.unify(cut.reshape(len(lengths), -1).T)
        elif not trace.rewrite:
            trace.labels.pin(cut, f"{node.name} cuts it at fixed positions")
    ends = np.cumsum(lengths)[:-1]
    pieces: list[Dim] = [*np.split(cut, ends)] if isinstance(cut, np.ndarray) else [cut] * len(lengths)
    result = []
    for shape, piece in zip(shapes, pieces, strict=True):
        dims = list(x.dims)
        dims[dim] = piece
        result.append(Value(shape, tuple(dims)))
    return result


@rule("slice")
def slice_(trace: Trace, node: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    shape = shape_of(node)
    dims = list(x.dims)
    cut = dims[dim]
    if isinstance(cut, np.ndarray) and trace.rewrite and step == 1:  # its bounds can be put right
        dims[dim] = cut[slice(start, end)]
        if x.places and not _is_written(node):
            trace.takes(x.places[dim], cut, start, end)
    elif shape[dim] != x.shape[dim]:
        trace.labels.pin(dims[dim], f"{node.name} cuts it at fixed positions")
        dims[dim] = FIXED
    return Value(shape, tuple(dims))


def _is_written(node: Any) -> bool:
    """Tell if a slice is written into and not read, while the whole of the tensor is."""
    writes = [str(user.target).partition(".")[2].partition(".")[0] for user in node.users]
    alone = all(name.endswith("_") and not user.users for name, user in zip(writes, node.users, strict=True))
    return bool(writes) and alone and any(called(user) != "slice" for user in node.args[0].users)


@rule("select")
def select(trace: Trace, node: Any, x: Value, dim: int, index: int) -> Value:
    trace.labels.pin(x.dims[dim], f"{node.name} takes one entry of it by number")
    return Value(shape_of(node), without(x.dims, [dim], len(x.dims) - 1))


@rule("index")
def index(trace: Trace, node: Any, x: Value, indices: Sequence[Value | None]) -> Value:
    for at in values_in(indices):
        trace.labels.pin_all(at.dims, f"{node.name} uses its values as indices")
    run = indexed_run(node, x)
    if run is None:
        return unknown_tensor(trace, node, x)
    first, last, given = run
    for i, d in enumerate(range(first, last)):
        route = trace.route(given[i], x.shape[d]) if len(given) == last - first else FIXED
        trace.labels.join(x.dims[d], route, f"{node.name} looks entries up by number")
    shape = shape_of(node)
    count = len(shape) - (len(x.shape) - (last - first))
    origin = [*range(first), *[None] * count, *range(last, len(x.shape))]
    return blend([x], [origin], Value(shape, (*x.dims[:first], *(FIXED,) * count, *x.dims[last:])))


def indexed_run(node: Any, x: Value) -> tuple[int, int, list[Any]] | None:
    """Find the dimensions that are indexed, from the first to behind the last, and the indices; None if others stand between.

    A mask of two dimensions indexes two.
    """
    first = last = 0
    given: list[Any] = []
    for at in node.args[1]:
        if at is None and given:
            break
        if at is None:
            first += 1
            continue
        given.append(at)
        is_mask = at.meta["val"].dtype in (torch.bool, torch.uint8)
        last = max(last, first) + (at.meta["val"].dim() if is_mask else 1)
    is_apart = any(at is not None for at in node.args[1][first + len(given) :])
    return None if is_apart or not given else (first, last, given)


@rule("glu")
def glu(trace: Trace, node: Any, x: Value, dim: int = -1) -> Value:
    dims = list(x.dims)
    cut = dims[dim]
    if isinstance(cut, np.ndarray):
        dims[dim] = trace.labels.unify(cut.reshape(2, -1).T)
    return Value(shape_of(node), tuple(dims))
