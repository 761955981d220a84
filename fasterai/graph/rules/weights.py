"""Layers and products of matrices: they read the labels of their input, and their output gets new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, Dim, is_zeroed, zeroed
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    all_fixed,
    blend,
    broadcast,
    called,
    class_of,
    rule,
    shape_of,
    shapes_of,
    unknown_tensor,
    unmarked,
    values_in,
    zero_in_either,
)

__all__ = ["read_by"]


@rule("linear")
def linear(trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.shape) != 2:
        return unknown_tensor(trace, node, x, weight, bias)
    _read(trace, x, -1, weight, 1, node)
    out = weight.dims[0]
    trace.layers.update(weight.places[:1])
    if bias is not None:
        out = trace.labels.join(out, bias.dims[0], node.name)
        x = unmarked(x)  # where all of a row is zero, the bias is left
    return Value(shape_of(node), (*x.dims[:-1], out))


#: Attentions of torch, slim or not: surgery takes whole heads from them.
ATTENTIONS = (
    "torch.nn.modules.activation.MultiheadAttention",
    "fasterai.prune.surgery.slim_attention.SlimMultiheadAttention",
)


def _read(trace: Trace, a: Value, i: int, b: Value, j: int, node: Any) -> None:
    """Join dimension `i` of `a` and `j` of `b`, which are summed over; where neither is a weight, one has to be zero to go.

    A blend is what a weight reads, where it meets one; where it meets what is none, it is the weight.
    """
    trace.labels.join(a.dims[i], b.dims[j], f"{node.name} reads a dimension of fixed size")
    reading = read_by([a, b])
    if not any(reading):
        trace.sums(node, zero_in_either(a.dims[i], b.dims[j]), f"{node.name} sums over it without a weight", is_product=True)
        if class_of(node) in ATTENTIONS:
            trace.labels.pin(a.dims[i], f"{node.name}'s scale depends on the width of a head")
    for value, dim, reads in zip((a, b), (i, j), reading, strict=True):
        if reads:
            trace.reads(value, dim)


def read_by(factors: Sequence[Value]) -> list[bool]:
    """Tell which factors of a product read the others: the weights, else a blend that is alone among them."""
    weights = [f.is_weight and not f.is_blend for f in factors]
    blends = [f.is_blend for f in factors]
    return weights if any(weights) or sum(blends) != 1 else blends


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, *rest: Any,
    groups: int | None = None, **keywords: Any,
) -> Value:  # fmt: skip
    if "aten.convolution" in str(node.target) and rest[1]:
        return _convolve(trace, node, x, weight, bias, rest[3], read=0, out=1)
    if groups is None:
        groups = rest[-1] if len(rest) > 1 else 1
    steps = stride if isinstance(stride, int) else max(stride, default=1)
    return _convolve(trace, node, x, weight, bias, groups, read=1, out=0, is_dense=steps == 1)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    return _convolve(trace, node, x, weight, bias, groups, read=0, out=1)


def _convolve(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None, groups: int, read: int, out: int, *,
    is_dense: bool = False,
) -> Value:  # fmt: skip
    labels, name = trace.labels, node.name
    channel = len(x.dims) - len(weight.dims) + 1  # 1, or 0 without a batch
    labels.pin_all(weight.dims[2:], f"{name}'s kernel size")
    kernel = enumerate(weight.shape[2:], channel + 1)
    across = tuple(_across(trace, node, x, i, width if is_dense else 0) for i, width in kernel)
    if groups == 1 or x.shape[channel] > groups:  # not depthwise: it sums over channels
        trace.reads(weight, read)
        if not weight.is_weight:
            _sum_kernel(trace, node, x.dims[channel], weight.dims[read])
    if groups == 1:
        labels.join(x.dims[channel], weight.dims[read], f"{name} reads a dimension of fixed size")
        produced = weight.dims[out]
    elif read == 0:
        produced = _grouped_transposed(trace, name, x.dims[channel], weight, groups)
    else:
        produced = _grouped(trace, name, x.dims[channel], weight, groups)
    if bias is not None:
        produced = labels.join(produced, bias.dims[0], name)
        x, across = unmarked(x), unmarked(Value(x.shape[channel + 1 :], across)).dims
    return Value(shape_of(node), (*x.dims[:channel], produced, *across))


def _across(trace: Trace, node: Any, x: Value, i: int, width: int) -> Dim:
    """Return a dimension of places behind a convolution, whose entries go with those of the input that they stand at.

    A kernel of width 1 leaves it as it is. A wider one reads neighbours: channels that stand there, as those of pooled
    pictures do in ECA, go where they are zero. Width 0 stands for steps over several places.
    """
    dim, size, made = x.dims[i], x.shape[i], shape_of(node)[i]
    if width == 1 and size == made and isinstance(dim, np.ndarray):
        return dim
    result: Dim = FIXED
    if 0 <= size - made < width:
        result = trace.spread(node, dim, len(x.shape) - i, (size - made) // 2, made)
    trace.labels.pin(dim if result is FIXED else FIXED, f"{node.name} computes across it")
    return result


def _sum_kernel(trace: Trace, node: Any, x: Dim, read: Dim) -> None:
    """Note that a convolution by a kernel that is no parameter sums over channels; `read` may serve several groups of them."""
    reason = f"{node.name}'s weight is computed or a buffer, not a parameter"
    if isinstance(x, np.ndarray):
        flags = np.resize(is_zeroed(read), x.size) if isinstance(read, np.ndarray) else np.zeros(1, np.bool_)
        trace.sums(node, zeroed(x, is_zeroed(x) | flags), reason)
    else:
        trace.sums(node, read, reason)
    trace.labels.pin_all([x, read] if trace.experts else [], reason)


def _grouped(trace: Trace, name: str, x: Dim, weight: Value, groups: int) -> Dim:
    """Return the output labels of a grouped convolution: the same index of every group is removed, or whole groups are.

    Where each group reads a single channel (depthwise), whole groups are removed.
    """
    labels, read, out = trace.labels, weight.dims[1], weight.dims[0]
    if not isinstance(x, np.ndarray) or not isinstance(out, np.ndarray):
        labels.pin_all([x, read], f"{name} reads a dimension of fixed size")
        if isinstance(out, np.ndarray):
            labels.unify(out.reshape(groups, -1).T)
        return out
    inputs, outputs = x.reshape(groups, -1), out.reshape(groups, -1)
    if inputs.shape[1] == 1 or trace.choose(f"groups {inputs.shape} to {outputs.shape}", 2) == 1:
        labels.pin(read, f"{name} keeps the width of its groups")
        labels.unify(np.concatenate([inputs, outputs], axis=1))
    else:
        labels.join(labels.unify(inputs.T), read, name)
        labels.unify(outputs.T)
    return out


def _grouped_transposed(trace: Trace, name: str, x: Dim, weight: Value, groups: int) -> Dim:
    """Return the output labels of a grouped transposed convolution, with the same two ways as without transposing.

    The weight is (C, O/G), so that its second dimension serves every group.
    """
    labels = trace.labels
    read, out = weight.dims[:2]
    labels.join(x, read, f"{name} reads a dimension of fixed size")
    if not isinstance(x, np.ndarray):
        return np.tile(out, groups) if isinstance(out, np.ndarray) else FIXED
    inputs = x.reshape(groups, -1)
    if inputs.shape[1] == 1 or trace.choose(f"transposed groups {inputs.shape} to {weight.shape[1]}", 2) == 1:
        labels.pin(out, f"{name} keeps the width of its groups")
        return np.repeat(labels.unify(inputs), weight.shape[1])
    labels.unify(inputs.T)
    return np.tile(out, groups) if isinstance(out, np.ndarray) else FIXED


@rule("_weight_norm")
def weight_norm(trace: Trace, node: Any, v: Value, g: Value, dim: int = 0) -> Value:
    """Follow rows that are scaled to given lengths, `g v / |v|`: the length is what makes a channel, and is masked with it.

    A row of zeros has no direction, 0 / 0, so that rows stay as they are and go with their lengths. A column adds to the
    lengths of all rows, and so has to be zero where its channel is silent.
    """
    alone = all(called(user) == called(node) for user in node.args[0].users)  # elsewhere rows that stay would be no zeros
    if not (alone and v.is_weight and g.is_weight and v.places and len(g.shape) in (0, len(v.shape))):
        return unknown_tensor(trace, node, v, g)
    dims = list(v.dims)
    for i, labels in enumerate(v.dims):
        if i != dim:
            trace.sums_zeros(node, labels)
            continue
        dims[i] = trace.labels.join(g.dims[i], labels, node.name)
        trace.lengths.add(v.places[i])
    return Value(v.shape, tuple(dims), (), True, True)


@rule("embedding")
def embedding(trace: Trace, node: Any, weight: Value, indices: Value, *rest: Any, **keywords: Any) -> Value:
    trace.labels.pin_all([weight.dims[0], *indices.dims], f"{node.name} looks rows up by number")
    return Value(shape_of(node), (*all_fixed(indices.shape), weight.dims[1]))


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(trace: Trace, node: Any, weight: Value, *rest: Any, **keywords: Any) -> list[Value]:
    """Follow sums, means and maxima of rows, which are zero where the rows are; what else it gives is numbers of bags."""
    given = [dim for value in values_in([rest, keywords]) for dim in value.dims]
    trace.labels.pin_all([weight.dims[0], *given], f"{node.name} looks rows up by number")
    shapes = shapes_of(node)
    return [Value(shapes[0], (FIXED, weight.dims[1])), *(Value(shape, all_fixed(shape)) for shape in shapes[1:])]


@rule("outer", "ger")
def outer(trace: Trace, node: Any, a: Value, b: Value) -> Value:
    return Value(shape_of(node), (a.dims[0], b.dims[0]))


@rule("bilinear")
def bilinear(trace: Trace, node: Any, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Value:
    """Follow `a W b` for each matrix of a stack (out, channels of a, channels of b), which reads both of its inputs."""
    _read(trace, a, -1, weight, 1, node)
    _read(trace, b, -1, weight, 2, node)
    sides = [Value(v.shape[:-1], v.dims[:-1]) for v in (a, b)]
    made, out = broadcast(trace, node.name, sides, a.shape[:-1], product=True), weight.dims[0]
    if bias is not None:
        made, out = unmarked(made), trace.labels.join(out, bias.dims[0], node.name)
    return Value(shape_of(node), (*made.dims, out))


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(trace: Trace, node: Any, a: Value, b: Value) -> Value:
    shape = shape_of(node)
    rows = a.dims[-2:-1] if len(a.shape) > 1 else ()
    columns = b.dims[-1:] if len(b.shape) > 1 else ()
    _read(trace, a, -1, b, -2 if len(b.shape) > 1 else -1, node)
    trace.layers.update(b.places[1:] if len(b.shape) == 2 else ())
    batch = shape[: len(shape) - len(rows) - len(columns)]
    sides = [Value(v.shape[:-2], v.dims[:-2]) for v in (a, b)]
    return Value(shape, (*broadcast(trace, node.name, sides, batch, product=True).dims, *rows, *columns))


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_matmul(trace: Trace, node: Any, x: Value, weight: Value, ends: Any = None, *rest: Any, **keywords: Any) -> Value:
    """Follow a product of experts, `(rows, in)` by `(experts, in, out)`: a channel is removed from every expert."""
    name = node.name
    if len(x.shape) != 2 or len(weight.shape) != 3 or values_in([rest, keywords]):
        return unknown_tensor(trace, node, x, weight, ends, *rest)
    route = trace.route(node.kwargs.get("offs") if len(node.args) < 3 else node.args[2], weight.shape[0])
    trace.labels.pin_all([x.dims[0], *ends.dims], f"{name} sends its rows to experts")
    trace.labels.join(weight.dims[0], route, f"{name} sends its rows to experts")
    _read(trace, x, -1, weight, -2, node)
    return Value(shape_of(node), (FIXED, weight.dims[-1]))


@rule("addmm", "baddbmm")
def addmm(trace: Trace, node: Any, bias: Value, a: Value, b: Value, **keywords: Any) -> Value:
    product = matmul(trace, node, a, b)
    return broadcast(trace, node.name, [product, bias], product.shape)


@rule("tensordot")
def tensordot(trace: Trace, node: Any, a: Value, b: Value, dims_a: Sequence[int], dims_b: Sequence[int]) -> Value:
    ways = list(zip([d % len(a.shape) for d in dims_a], [d % len(b.shape) for d in dims_b], strict=True))
    for i, j in ways:
        if a.shape[i] != b.shape[j]:  # a dimension of size 1 is repeated
            return unknown_tensor(trace, node, a, b)
        _read(trace, a, i, b, j, node)
    left = [[d for d in range(len(x.shape)) if d not in gone] for x, gone in zip((a, b), zip(*ways, strict=True), strict=True)]
    origins = [[*left[0], *[None] * len(left[1])], [*[None] * len(left[0]), *left[1]]]
    dims = (*(a.dims[d] for d in left[0]), *(b.dims[d] for d in left[1]))
    return blend([a, b], origins, Value(shape_of(node), dims))
