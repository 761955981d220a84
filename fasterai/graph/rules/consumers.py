"""Operations that mix a dimension without weights and so pin it: softmax, reductions, sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasterai.graph.labels import FIXED
from fasterai.graph.rules.elementwise import elementwise
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    argument_of,
    blend,
    called,
    rule,
    settled,
    shape_of,
    shapes_of,
    unknown,
    unmarked,
    without,
)

__all__: list[str] = []


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "argmax", "argmin")
def along_one(trace: Trace, node: Any, x: Value, dim: int | None = None, *rest: Any, **keywords: Any) -> Any:
    if dim is None:
        return reduction(trace, node, x)
    if called(node) in ("softmax", "_softmax") and trace.gate(node, x.dims[dim]):
        return unmarked(x)
    is_gate = False
    if called(node) == "argmax":
        is_gate = trace.gate(node, x.dims[dim], 1)
    if not is_gate:
        trace.labels.pin(x.dims[dim], f"{node.name} mixes its entries")
    shape = shape_of(node)
    x = x if called(node) == "cumsum" else unmarked(x)
    return settled(x, [dim]) if shape == x.shape else Value(shape, without(x.dims, [dim], len(shape)))


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "any", "all")
def reduction(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    shape = shape_of(node)
    given = argument_of(node, "dim", arguments, keywords)
    dims = range(len(x.shape)) if given is None or given == [] else [given] if isinstance(given, int) else given
    dims = [d % len(x.shape) for d in dims]
    if x.is_blend and called(node) == "sum":
        return _summed(trace, x, dims, shape)
    if called(node) == "sum":
        for d in dims:
            trace.sums(x.dims[d], f"{node.name} reduces it to one number")
    elif trace.exact or not _is_average(node):
        trace.labels.pin_all([x.dims[d] for d in dims], f"{node.name} reduces it to one number")
    x = unmarked(x) if called(node) == "logsumexp" else x
    return Value(shape, without(x.dims, dims, len(shape)))


def _summed(trace: Trace, x: Value, dims: Sequence[int], shape: tuple[int, ...]) -> Value:
    """Follow the sum of a blend: it reads what it is summed over, as a matrix does, and may be a blend still."""
    for d in dims:
        trace.reads(x, d)
    left = [d for d in range(len(x.shape)) if d not in dims or len(shape) == len(x.shape)]
    return blend([x], [[None if d in dims else d for d in left]], Value(shape, without(x.dims, dims, len(shape))))


def _is_average(node: Any) -> bool:
    """Tell if an operation gives the scale of a dimension, such as its mean; removing silent channels changes it little."""
    return called(node) in ("mean", "var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")


@rule("max", "min", "median", "mode", "sort", "topk", "kthvalue", "aminmax", "var_mean", "std_mean", "cummax", "cummin")
def extremes(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    """Follow the extremes of two tensors, of a whole tensor, or along a dimension."""
    if arguments and isinstance(arguments[0], Value):
        return elementwise(trace, node, x, *arguments, **keywords)
    if not isinstance(node.meta["val"], list | tuple):
        return reduction(trace, node, x, *arguments, **keywords)
    given = argument_of(node, "dim", arguments, keywords)
    if given is None and called(node) in ("topk", "sort", "kthvalue", "mode"):
        given = -1
    if given is None:
        return unknown(trace, node, x)
    gone = [d % len(x.shape) for d in ([given] if isinstance(given, int) else given)]
    chosen = shapes_of(node)[0][gone[0]] if called(node) == "topk" else 0
    if chosen and trace.gate(node, x.dims[gone[0]], chosen):
        pass
    elif trace.exact or not _is_average(node):
        trace.labels.pin_all([x.dims[d] for d in gone], f"{node.name} picks entries of it by their values")
    fixed = [FIXED if i in gone else d for i, d in enumerate(unmarked(x).dims)]
    return [Value(s, tuple(fixed) if len(s) == len(fixed) else without(x.dims, gone, len(s))) for s in shapes_of(node)]


@rule("flip")
def flip(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> Value:
    for d in dims:
        trace.labels.pin(x.dims[d], f"{node.name} reverses its order")
    return settled(x, dims)
