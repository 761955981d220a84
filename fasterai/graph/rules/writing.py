"""Entries taken and written by number, as graph networks do it, and tensors with a part written anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fasterai.graph.labels import FIXED, Dim
from fasterai.graph.rules.parts import indexed_run
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    broadcast,
    rule,
    settled,
    shape_of,
    unknown_tensor,
    unmarked,
    values_in,
    without,
)

__all__: list[str] = []


@rule("index_select")
def index_select(trace: Trace, node: Any, x: Value, dim: int, index: Value) -> Value:
    _pin(trace, node, [x], dim)
    trace.labels.pin_all(index.dims, f"{node.name} uses its values as indices")
    return Value(shape_of(node), settled(x, [dim]).dims)


@rule("gather", "take_along_dim")
def gather(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    """Join the dimensions beside the one that numbers are of: entry c of them is read from entry c."""
    dim, index = _numbers(node, arguments, keywords)
    if dim is None or len(index.shape) != len(x.shape):
        return unknown_tensor(trace, node, x, index)
    _pin(trace, node, [x, index], dim)
    return settled(_beside(trace, node, dim, [index, x]), [dim])


@rule("index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
def written_by_number(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    """Join the dimensions beside the one that numbers are of, as messages of a graph have channels there."""
    dim, index = _numbers(node, arguments, keywords)
    given = [v for v in values_in([arguments, keywords]) if v is not index]
    if dim is None or not x.shape or any(len(v.shape) not in (0, len(x.shape)) for v in given):
        return unknown_tensor(trace, node, x, index, *given)
    sources = [v for v in given if v.shape]
    if len(index.shape) == len(x.shape):
        sources.append(index)
    else:
        trace.labels.pin_all(index.dims, f"{node.name} uses its values as indices")
    _pin(trace, node, [x, *sources], dim)
    return settled(_beside(trace, node, dim, [x, *sources]), [dim])


def _numbers(node: Any, arguments: Sequence[Any], keywords: Any) -> tuple[int | None, Any]:
    """Return the dimension that numbers are of, and the numbers."""
    given = {**dict(zip([a.name for a in node.target._schema.arguments][1:], arguments, strict=False)), **keywords}
    return given.get("dim"), given.get("index", given.get("indices"))


def _pin(trace: Trace, node: Any, values: Iterable[Value], dim: int) -> None:
    for value in values:
        trace.labels.pin(value.dims[dim], f"{node.name} looks entries up by number")


def _beside(trace: Trace, node: Any, dim: int, values: Sequence[Value]) -> Value:
    """Join the dimensions of the first value with those of the others, but for one; of a larger one the first entries count."""
    shape = values[0].shape
    dims: list[Dim] = list(values[0].dims)
    for i in (i for i in range(len(shape)) if i != dim % len(shape)):
        for value in values[1:]:
            if value.shape[i] == shape[i]:
                dims[i] = trace.labels.join(dims[i], value.dims[i], f"{node.name} meets a dimension of fixed size")
            else:
                trace.labels.pin_all([dims[i], value.dims[i]], f"{node.name} takes its first entries")
    return settled(Value(shape, tuple(dims)), [i for i, n in enumerate(shape) if any(v.shape[i] != n for v in values)])


@rule("slice_scatter", "select_scatter")
def scattered(trace: Trace, node: Any, x: Value, part: Value, dim: int = 0, *rest: Any, **keywords: Any) -> Value:
    """Join a tensor and what is written into a part of it, but for the dimension that is cut."""
    if x.shape == part.shape:
        return broadcast(trace, node.name, [x, part], x.shape)
    trace.labels.pin(x.dims[dim], f"{node.name} writes at fixed positions of it")
    if len(part.shape) < len(x.shape):
        beside = Value(part.shape, without(x.dims, [dim], len(part.shape)))
        made = list(broadcast(trace, node.name, [beside, part], part.shape).dims)
        made.insert(dim % len(x.shape), FIXED)
        return Value(x.shape, tuple(made))
    trace.labels.pin(part.dims[dim], f"{node.name} writes it to fixed positions")
    return settled(_beside(trace, node, dim, [x, part]), [dim])


@rule("index_put")
def index_put(
    trace: Trace, node: Any, x: Value, indices: Sequence[Value | None], values: Value, *rest: Any, **keywords: Any
) -> Value:
    """Join a tensor and what is written into it, beside the dimensions that numbers are of."""
    for at in values_in(indices):
        trace.labels.pin_all(at.dims, f"{node.name} uses its values as indices")
    run = indexed_run(node, x)
    if run is None:
        return unknown_tensor(trace, node, x, values)
    first, last, _ = run
    trace.labels.pin_all(x.dims[first:last], f"{node.name} writes entries by number")
    behind = min(len(values.shape), len(x.shape) - last)  # the dimensions behind those that are indexed
    written = values.dims[len(values.shape) - behind :]
    beside = x.dims if behind == len(x.shape) - last else unmarked(x).dims  # a number is written into all of them
    dims = [*beside[:first], *[FIXED] * (last - first), *beside[last:]]
    trace.labels.pin_all(values.dims[: len(values.shape) - behind], f"{node.name} writes it by number")
    if first:  # values may have as many dimensions in front, which are hard to tell from those of the numbers
        trace.labels.pin_all(dims[:first], f"{node.name} writes entries by number")
        dims[:first] = [FIXED] * first
    tail = Value(x.shape[len(x.shape) - behind :], tuple(dims[len(dims) - behind :])) if behind else Value((), ())
    source = Value(values.shape[len(values.shape) - behind :], written)
    joined = broadcast(trace, node.name, [tail, source], tail.shape).dims
    return Value(x.shape, (*dims[: len(dims) - behind], *joined))
