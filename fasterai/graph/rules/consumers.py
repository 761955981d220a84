"""Operations that mix a dimension without weights and so pin it: softmax, reductions, sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, is_labelled, is_zeroed, zeroed
from fasterai.graph.rules.centred import is_centred, squared
from fasterai.graph.rules.elementwise import elementwise
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    argument_of,
    blend,
    broadcast,
    called,
    marked_as,
    rule,
    settled,
    shape_of,
    shapes_of,
    unknown,
    unmarked,
    without,
)

__all__: list[str] = []


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "argmax", "argmin")
def along_one(trace: Trace, node: Any, x: Value, dim: int | None = None, *rest: Any, **keywords: Any) -> Any:
    if dim is None:
        return reduction(trace, node, x)
    if called(node) == "cumsum" and isinstance(x.dims[dim], np.ndarray) and trace.exact and not trace.experts:
        trace.sums(node, x.dims[dim], f"{node.name} mixes its entries")
        return marked_as(x, dim, False)
    if called(node) in ("softmax", "_softmax") and trace.gate(node, x.dims[dim]):
        return unmarked(x)
    is_gate = False
    if called(node) == "argmax":
        is_gate = trace.gate(node, x.dims[dim], 1)
    if not is_gate:
        trace.labels.pin(x.dims[dim], f"{node.name} mixes its entries")
    shape = shape_of(node)
    x = x if called(node) in ("cumsum", "cumprod") else unmarked(x)
    return settled(x, [dim]) if shape == x.shape else Value(shape, without(x.dims, [dim], len(shape)))


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "any", "all")
def reduction(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    shape = shape_of(node)
    given = argument_of(node, "dim", arguments, keywords)
    dims = range(len(x.shape)) if given is None or given == [] else [given] if isinstance(given, int) else given
    dims = [d % len(x.shape) for d in dims]
    if x.is_blend and called(node) == "sum":
        return _summed(trace, x, dims, shape)
    if _is_told(trace, node, x, dims):
        pass
    elif _adds_zeros(trace, node, arguments, keywords):
        for d in dims:
            trace.sums(node, x.dims[d], f"{node.name} reduces it to one number")
    elif not (_counted(trace, node, x, dims) or _put_right(trace, node, x, dims)) and (trace.exact or not _is_average(node)):
        trace.labels.pin_all([x.dims[d] for d in dims], f"{node.name} reduces it to one number")
    x = unmarked(x) if called(node) == "logsumexp" else x
    return Value(shape, without(x.dims, dims, len(shape)))


def _adds_zeros(trace: Trace, node: Any, arguments: Sequence[Any], keywords: Any) -> bool:
    """Tell if an operation gives the same without entries that are zero, as a sum does; a norm of no negative order too."""
    order = argument_of(node, "ord", arguments, keywords) or argument_of(node, "p", arguments, keywords)
    is_norm = called(node) in ("linalg_vector_norm", "norm") and (order is None or order > 0)
    return called(node) == "sum" or ((called(node) == "any" or is_norm) and trace.exact and not trace.experts)


def _summed(trace: Trace, x: Value, dims: Sequence[int], shape: tuple[int, ...]) -> Value:
    """Follow the sum of a blend: it reads what it is summed over, as a matrix does, and may be a blend still."""
    for d in dims:
        trace.reads(x, d)
    left = [d for d in range(len(x.shape)) if d not in dims or len(shape) == len(x.shape)]
    return blend([x], [[None if d in dims else d for d in left]], Value(shape, without(x.dims, dims, len(shape))))


def _counted(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> bool:
    """Note a mean or a variance along one dimension whose module can be told how many channels there were; True if it can."""
    if called(node) not in AVERAGES or len(dims) != 1:
        return False
    dim = x.dims[dims[0]]
    if isinstance(dim, np.ndarray) and called(node) == "mean" and _squares_differences(node, dims[0], len(x.shape)):
        dim = zeroed(dim)
    return trace.counts(node, dim)


#: Reduction -> the kind of edit that tells it of the zeros which are gone.
TOLD = {"mean": "mean", "amax": "most", "max": "most", "amin": "least", "min": "least"}


#: Reductions of what a mean was taken away from -> True for those that read its squares.
OF_CENTRED = {"var": False, "std": False, "mean": True, "sum": True}


def _is_told(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> bool:
    """Note an average of entries of a weight that its code can be told of; True if it can.

    Zeros are gone, or what is left of zeros once a mean was taken away: by that all entries sum to zero, so that what is left
    of them says what the others were.
    """
    labelled = [dim for d in dims if isinstance(dim := x.dims[d], np.ndarray)]
    name = called(node)
    if len(labelled) != 1 or not (node in trace.computed or len(dims) > 1):
        return False
    if not is_zeroed(labelled[0]).any() or name in OF_CENTRED:
        source = squared(node.args[0]) if OF_CENTRED.get(name) else node.args[0] if name in OF_CENTRED else None
        if source is not None and is_centred(source, dims):
            return trace.told(node, "centred", zeroed(labelled[0]), "")
    kind = "mean" if name == "mean" else "variance" if name in AVERAGES else ""
    return bool(kind) and trace.told(node, kind, labelled[0], f"{node.name} reduces it to one number")


def _put_right(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> bool:
    """Note a mean or an extreme over one dimension of zeros that its module's code can be told of; True if it can.

    A mean over n of N entries is multiplied by n / N; no greatest entry is below zero once one of zero has gone.
    """
    labelled = [x.dims[d] for d in dims if is_labelled(x.dims[d])]
    if called(node) not in TOLD or len(labelled) != 1:
        return False
    if any(one.args[1] != 0 and one.users for one in node.users if called(one) in ("getitem", "<built-in function getitem>")):
        return False  # numbers of entries are read
    return trace.told(node, TOLD[called(node)], labelled[0], f"{node.name} reduces it to one number")


#: Averages that `Counting` puts right in a module's own code.
AVERAGES = ("mean", "var", "std", "var_mean", "std_mean")


def _squares_differences(node: Any, d: int, rank: int) -> bool:
    """Tell if a mean is one of squared differences from the mean along the same dimension, as a variance written by hand."""
    square = node.args[0]
    difference = squared(square)
    if difference is None:
        return False
    if called(difference) != "sub" or len(difference.args) != 2 or difference.kwargs:
        return False
    x, mean = difference.args
    while called(mean) == "mul" and isinstance(mean.args[1], int | float):  # of a slim norm
        mean = mean.args[0]
    if called(mean) in ("getitem", "<built-in function getitem>") and mean.args[1] == 1:
        mean = mean.args[0]
    if called(mean) not in ("mean", "var_mean") or mean.args[0] is not x:
        return False
    given = argument_of(mean, "dim", mean.args[1:], mean.kwargs)
    return given is not None and [i % rank for i in ([given] if isinstance(given, int) else given)] == [d]


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
    elif not (_is_told(trace, node, x, gone) or _counted(trace, node, x, gone) or _put_right(trace, node, x, gone)) and (
        trace.exact or not _is_average(node)
    ):
        trace.labels.pin_all([x.dims[d] for d in gone], f"{node.name} picks entries of it by their values")
    x = x if called(node) in AVERAGES else unmarked(x)  # numbers of entries are among the results
    fixed = [FIXED if i in gone else d for i, d in enumerate(x.dims)]
    return [Value(s, tuple(fixed) if len(s) == len(fixed) else without(x.dims, gone, len(s))) for s in shapes_of(node)]


@rule("cosine_similarity")
def similarity(trace: Trace, node: Any, a: Value, b: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    """Follow sums over products and over squares: what is zero in both tensors adds nothing."""
    joined = broadcast(trace, node.name, [a, b], np.broadcast_shapes(a.shape, b.shape))
    trace.sums(node, joined.dims[dim], f"{node.name} reduces it to one number")
    return Value(shape_of(node), without(joined.dims, [dim], len(shape_of(node))))


@rule("cdist", "_cdist_forward")
def distances(trace: Trace, node: Any, a: Value, b: Value, *rest: Any, **keywords: Any) -> Value:
    """Follow sums over differences of rows: what is zero in both tensors adds nothing."""
    width = trace.labels.join(a.dims[-1], b.dims[-1], f"{node.name} meets a dimension of fixed size")
    trace.sums(node, width, f"{node.name} reduces it to one number")
    shape = shape_of(node)
    sides = [Value(v.shape[:-2], v.dims[:-2]) for v in (a, b)]
    batch = broadcast(trace, node.name, sides, shape[:-2]).dims
    return unmarked(Value(shape, (*batch, a.dims[-2], b.dims[-2])))


@rule("tril", "triu")
def triangle(trace: Trace, node: Any, x: Value, *rest: Any, **keywords: Any) -> Value:
    for d in (-2, -1):
        trace.labels.pin(x.dims[d], f"{node.name} tells its entries by their positions")
    return settled(x, [-2, -1])


@rule("flip")
def flip(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> Value:
    turned = {d % len(x.shape): dim[::-1] for d in dims if isinstance(dim := x.dims[d], np.ndarray)}
    return Value(x.shape, tuple(turned.get(i, d) for i, d in enumerate(settled(x, dims).dims)))
