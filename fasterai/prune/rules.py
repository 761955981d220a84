"""L2. What the operations of an exported network do to the labels of their tensors' dimensions.

A rule is a function `(trace, node, *arguments, **keywords) -> value` under the operation's name in `RULES`; tensors among
the arguments come as `Value`s. An operation without a rule pins all that it reads, by its name. To add one: a function with
`@rule("aten.name", ...)` and a case in `tests/prune/test_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasterai.prune.labels import FIXED, FREE, Array, Dim, Labels, is_labelled

__all__ = ["RULES", "Trace", "Value", "rule"]


@dataclass(frozen=True)
class Value:
    """A tensor: its shape, and what its dimensions carry.

    Attributes:
        shape: The sizes of its dimensions.
        dims: For each dimension labels, `FIXED` or `FREE`.
        places: For a parameter or buffer as it stands, or a view of it, which of its dimensions each dimension is, as
            (name, dimension); empty for all others.
        is_weight: Whether it is a parameter, or a view of one. A buffer is not: masks leave it alone.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    places: tuple[tuple[str, int], ...] = ()
    is_weight: bool = False

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.dims)


class Trace:
    """One pass over the operations, with one way to decide where there are several.

    Where a labelled dimension is split into factors, or runs through a grouped convolution, different sets of channels
    may go, all of them sound. `choices` says which.

    Attributes:
        labels: The labels so far.
        choices: Kind of operation -> which way it takes; the first if it is not in it. A kind is what it does to which sizes.
        options: Kind of operation -> how many ways it has, filled on the way.
        readers: The places, as (name, dimension), that multiply what a channel carries and hand on something else.
        exact: Whether what averages over a channel pins it, as the average would change without it.
        normed: Name of a module that normalises, or calls what does -> the dimensions that it does it along.
        rescaled: Names of weights of norms that average over a dimension which may lose silent channels.
    """

    def __init__(self, choices: dict[str, int], exact: bool = True) -> None:
        self.labels = Labels()
        self.choices = choices
        self.exact = exact
        self.normed: dict[str, list[Dim]] = {}
        self.rescaled: set[str] = set()
        self.options: dict[str, int] = {}
        self.readers: set[tuple[str, int]] = set()

    def choose(self, kind: str, ways: int) -> int:
        """Which of several ways an operation takes."""
        self.options[kind] = ways
        return self.choices.get(kind, 0)

    def norms(self, node: Any, dim: Dim) -> None:
        """A normalisation along a dimension: the module that it stands in may know the size, even without parameters."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.normed.setdefault(str(stack[-1][0]) if stack else "", []).append(dim)

    def averages(self, dims: Iterable[Dim], name: str) -> None:
        """What is averaged over stays, where nothing may move."""
        if self.exact:
            self.labels.pin_all(list(dims), f"{name} averages over it")

    def reads(self, weight: Value, d: int) -> None:
        """A weight multiplies what a channel carries along its dimension `d`, and hands on something else."""
        if weight.places and is_labelled(weight.dims[d]):
            self.readers.add(weight.places[d])


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under names of operations, in-place variants included."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
        return function

    return enter


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _fixed(shape: Sequence[int]) -> tuple[Dim, ...]:
    return (FIXED,) * len(shape)


def broadcast(trace: Trace, name: str, values: Iterable[Value], shape: tuple[int, ...]) -> Value:
    """Dimensions that meet from the right go together; one of size 1 takes the other's part."""
    dims: list[Dim] = [FREE] * len(shape)
    for value in values:
        for i in range(1, len(value.shape) + 1):
            size, dim = value.shape[-i], value.dims[-i]
            if size == shape[-i]:
                dims[-i] = trace.labels.join(dims[-i], dim, f"{name} meets a dimension of fixed size")
            else:
                trace.labels.pin(dim, f"{name} repeats it along a larger dimension")
    return Value(shape, tuple(dims))


@rule(
    *("add", "sub", "rsub", "mul", "div", "pow", "where", "maximum", "minimum", "fmod", "remainder", "lerp", "addcmul"),
    *("relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "log_sigmoid", "hardshrink", "softshrink", "threshold", "rrelu"),
    *("abs", "neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "square", "sign", "erf", "sin", "cos"),
    *("clamp", "clamp_min", "clamp_max", "floor", "ceil", "round", "trunc", "masked_fill", "eq", "ne", "gt", "ge", "lt", "le"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "isinf", "nan_to_num"),
    *("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as"),
    *("lift_fresh_copy", "copy", "fill", "zero", "multiply", "divide", "subtract", "true_divide", "floor_divide", "clip"),
    *("log2", "log10", "exp2", "tan", "atan", "sinh", "cosh", "isfinite", "logical_xor", "bitwise_xor", "addcdiv", "atan2"),
    *("erfc", "__and__", "__or__", "__xor__"),
)
def elementwise(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Value:
    values = [a for a in (*arguments, *keywords.values()) if isinstance(a, Value)]
    return broadcast(trace, node.name, values, _shape(node))


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
def created(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Value:
    shape = _shape(node)
    return Value(shape, (FREE,) * len(shape))


@rule("arange")
def counted(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Value:
    """Its numbers differ from index to index: what meets it may not lose some."""
    return Value(_shape(node), _fixed(_shape(node)))


@rule("_assert_tensor_metadata")
def assertion(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> None:
    """Export notes the types and sizes that it saw; nothing comes of it."""


@rule("prelu")
def prelu(trace: Trace, node: Any, x: Value, weight: Value) -> Value:
    if weight.shape == (1,):
        trace.labels.pin(weight.dims[0], "prelu has one slope for all channels")
    else:
        trace.labels.join(x.dims[1], weight.dims[0], "prelu")
    return x


# --- weights -----------------------------------------------------------------------------------------


@rule("linear")
def linear(trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None) -> Value:
    _read(trace, x, -1, weight, 1, node.name)
    out = weight.dims[0]
    if bias is not None:
        out = trace.labels.join(out, bias.dims[0], node.name)
    return Value(_shape(node), (*x.dims[:-1], out))


def _read(trace: Trace, a: Value, i: int, b: Value, j: int, name: str) -> None:
    """A contraction of dimension `i` of one with `j` of the other: exact to cut only where one of them is a weight."""
    joined = trace.labels.join(a.dims[i], b.dims[j], f"{name} reads a dimension of fixed size")
    if not (a.is_weight or b.is_weight):
        trace.labels.pin(joined, f"{name} sums over it with no parameter")
    for value, dim in ((a, i), (b, j)):
        if value.is_weight:
            trace.reads(value, dim)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, *rest: Any,
    groups: int | None = None, **keywords: Any,
) -> Value:  # fmt: skip
    if "aten.convolution" in str(node.target) and rest[1]:
        return _convolve(trace, node, x, weight, bias, rest[3], read=0, out=1)
    if groups is None:
        groups = rest[-1] if len(rest) > 1 else 1
    return _convolve(trace, node, x, weight, bias, groups, read=1, out=0)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    return _convolve(trace, node, x, weight, bias, groups, read=0, out=1)


def _convolve(
    trace: Trace, node: Any, x: Value, weight: Value, bias: Value | None, groups: int, read: int, out: int
) -> Value:  # fmt: skip
    labels, name = trace.labels, node.name
    channel = len(x.dims) - len(weight.dims) + 1  # 1, or 0 without a batch
    labels.pin_all(weight.dims[2:], f"{name}'s kernel size")
    labels.pin_all(x.dims[channel + 1 :], f"{name} runs over it")
    if groups == 1 or x.shape[channel] > groups:  # not depthwise: it sums over channels
        trace.reads(weight, read)
        if not weight.is_weight:
            labels.pin_all([x.dims[channel], weight.dims[read]], f"{name}'s weight is worked out, or a buffer")
    if groups == 1:
        labels.join(x.dims[channel], weight.dims[read], f"{name} reads a dimension of fixed size")
        produced = weight.dims[out]
    elif read == 0:
        produced = _grouped_transposed(trace, name, x.dims[channel], weight, groups)
    else:
        produced = _grouped(trace, name, x.dims[channel], weight, groups)
    if bias is not None:
        produced = labels.join(produced, bias.dims[0], name)
    shape = _shape(node)
    return Value(shape, (*x.dims[:channel], produced, *_fixed(shape[channel + 1 :])))


def _grouped(trace: Trace, name: str, x: Dim, weight: Value, groups: int) -> Dim:
    """The same index in every group goes, or whole groups go; depthwise, where a group reads one channel, the latter."""
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
    """The weight is (C, O/G): its second dimension serves every group. The same ways as without transposing."""
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


@rule("embedding")
def embedding(trace: Trace, node: Any, weight: Value, indices: Value, *rest: Any, **keywords: Any) -> Value:
    trace.labels.pin_all([weight.dims[0], *indices.dims], f"{node.name} is asked by index")
    return Value(_shape(node), (*_fixed(indices.shape), weight.dims[1]))


@rule("matmul", "bmm", "mm")
def matmul(trace: Trace, node: Any, a: Value, b: Value) -> Value:
    shape = _shape(node)
    rows = a.dims[-2:-1] if len(a.shape) > 1 else ()
    columns = b.dims[-1:] if len(b.shape) > 1 else ()
    _read(trace, a, -1, b, -2 if len(b.shape) > 1 else -1, node.name)
    batch = shape[: len(shape) - len(rows) - len(columns)]
    sides = [Value(v.shape[:-2], v.dims[:-2]) for v in (a, b)]
    return Value(shape, (*broadcast(trace, node.name, sides, batch).dims, *rows, *columns))


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_matmul(trace: Trace, node: Any, x: Value, weight: Value, ends: Any = None, *rest: Any, **keywords: Any) -> Value:
    """Rows of `x` by experts, `(rows, in)` and `(experts, in, out)`: what is cut is cut in every expert."""
    name = node.name
    if len(x.shape) != 2 or len(weight.shape) != 3 or _values([rest, keywords]):
        return _unknown_tensor(trace, node, x, weight, ends, *rest)
    trace.labels.pin_all([x.dims[0], weight.dims[0], *ends.dims], f"{name} sends its rows to experts")
    _read(trace, x, -1, weight, -2, name)
    return Value(_shape(node), (FIXED, weight.dims[-1]))


@rule("addmm", "baddbmm")
def addmm(trace: Trace, node: Any, bias: Value, a: Value, b: Value, **keywords: Any) -> Value:
    product = matmul(trace, node, a, b)
    return broadcast(trace, node.name, [product, bias], product.shape)


@rule("einsum")
def einsum(trace: Trace, node: Any, equation: str, operands: Sequence[Value], **keywords: Any) -> Value:
    inputs, _, output = equation.replace(" ", "").partition("->")
    if "." in equation or not output:
        return _unknown_tensor(trace, node, *operands)
    terms = list(zip(inputs.split(","), operands, strict=True))
    if any(n == 1 for _, value in terms for n in value.shape) or any(len(set(letters)) < len(letters) for letters, _ in terms):
        return _unknown_tensor(trace, node, *operands)  # may repeat a dimension, or take a diagonal
    carried: dict[str, Dim] = {}
    weighed: dict[str, bool] = {}
    for letters, value in terms:
        for d, (letter, dim) in enumerate(zip(letters, value.dims, strict=True)):
            carried[letter] = trace.labels.join(carried.get(letter, FREE), dim, f"{node.name} meets a dimension of fixed size")
            weighed[letter] = weighed.get(letter, False) or value.is_weight
            if value.is_weight and letter not in output:
                trace.reads(value, d)
    for letter, dim in carried.items():
        if letter not in output and not weighed[letter]:
            trace.labels.pin(dim, f"{node.name} sums over it with activations only")
    return Value(_shape(node), tuple(carried[letter] for letter in output))


# --- norms -------------------------------------------------------------------------------------------


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
    """Without silent channels the rest is a larger share of the average: the weight has to grow."""
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


# --- what consumes a dimension without weights -------------------------------------------------------


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "argmax", "argmin")
def along_one(trace: Trace, node: Any, x: Value, dim: int = -1, *rest: Any, **keywords: Any) -> Any:
    if not isinstance(dim, int):
        return unknown(trace, node, x)
    trace.labels.pin(x.dims[dim], f"{node.name} mixes it")
    shape = _shape(node)
    return _settled(x, [dim]) if shape == x.shape else Value(shape, _without(x.dims, [dim], len(shape)))


def _settled(x: Value, dims: Iterable[int]) -> Value:
    """What differs from index to index of some dimensions, also where `x` was made to fit and does not."""
    fixed = {d % len(x.shape) for d in dims}
    return Value(x.shape, tuple(FIXED if i in fixed else d for i, d in enumerate(x.dims)))


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "any", "all")
def reduction(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    shape = _shape(node)
    given = _argument(node, "dim", arguments, keywords)
    dims = range(len(x.shape)) if given is None or given == [] else [given] if isinstance(given, int) else given
    dims = [d % len(x.shape) for d in dims]
    if trace.exact or not _is_average(node):
        trace.labels.pin_all([x.dims[d] for d in dims], f"{node.name} takes one number of it")
    return Value(shape, _without(x.dims, dims, len(shape)))


def _is_average(node: Any) -> bool:
    """What tells of a dimension's scale, and moves little where some of its channels, silent ones, go."""
    return str(node.target).split(".")[1] in ("mean", "var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")


def _argument(node: Any, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """An argument after the first, by its name in the operation's schema."""
    names = [a.name for a in node.target._schema.arguments][1:]
    return {**dict(zip(names, arguments, strict=False)), **keywords}.get(name)


@rule("max", "min", "median", "mode", "sort", "topk", "kthvalue", "aminmax", "var_mean", "std_mean", "cummax", "cummin")
def extremes(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    """The largest of two tensors, of all, or along a dimension."""
    if arguments and isinstance(arguments[0], Value):
        return elementwise(trace, node, x, *arguments, **keywords)
    if not isinstance(node.meta["val"], list | tuple):
        return reduction(trace, node, x, *arguments, **keywords)
    given = _argument(node, "dim", arguments, keywords)
    if given is None:
        return unknown(trace, node, x)
    gone = [d % len(x.shape) for d in ([given] if isinstance(given, int) else given)]
    if trace.exact or not _is_average(node):
        trace.labels.pin_all([x.dims[d] for d in gone], f"{node.name} takes some of it")
    fixed = [FIXED if i in gone else d for i, d in enumerate(x.dims)]
    shapes = [tuple(int(n) for n in value.shape) for value in node.meta["val"]]
    return [Value(s, tuple(fixed) if len(s) == len(fixed) else _without(x.dims, gone, len(s))) for s in shapes]


@rule("flip")
def flip(trace: Trace, node: Any, x: Value, dims: Sequence[int]) -> Value:
    for d in dims:
        trace.labels.pin(x.dims[d], f"{node.name} turns it round")
    return _settled(x, dims)


def _without(dims: Sequence[Dim], gone: Sequence[int], length: int) -> tuple[Dim, ...]:
    """The dimensions after a reduction over some; with `keepdim` they stay, at size 1."""
    gone = [g % len(dims) for g in gone]
    if length == len(dims):
        return tuple(FREE if i in gone else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in gone)


@rule("scaled_dot_product_attention")
def attention(
    trace: Trace, node: Any, q: Value, k: Value, v: Value, mask: Value | None = None, *rest: Any, **keywords: Any
) -> Value:
    labels, name = trace.labels, node.name
    labels.pin_all([q.dims[-1], k.dims[-1]], f"{name}'s scale depends on the width of a head")
    labels.pin_all([q.dims[-2], k.dims[-2], v.dims[-2]], f"{name} runs over it")
    batch = q.shape[:-2]
    mask = mask if mask is not None else keywords.get("attn_mask")
    heads = [Value(x.shape[:-2], x.dims[:-2]) for x in (q, k, v)]
    if keywords.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        heads = [heads[0], *(_repeat_heads(trace, x, q.shape[-3]) for x in heads[1:])]
    if mask is not None:
        labels.pin_all(mask.dims[-2:], f"{name} runs over it")
        heads.append(Value(mask.shape[:-2], mask.dims[:-2]))
    return Value(_shape(node), (*broadcast(trace, name, heads, batch).dims, q.dims[-2], v.dims[-1]))


def _repeat_heads(trace: Trace, x: Value, heads: int) -> Value:
    """Grouped queries: each head of the keys serves a run of the queries' heads."""
    dim = x.dims[-1]
    repeated = np.repeat(dim, heads // x.shape[-1]) if isinstance(dim, np.ndarray) else dim
    return Value((*x.shape[:-1], heads), (*x.dims[:-1], repeated))


# --- spatial -----------------------------------------------------------------------------------------


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("_upsample_nearest_exact2d", "max_pool2d_with_indices", "reflection_pad2d", "replication_pad2d", "reflection_pad1d"),
)
def spatial(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    kept = len(x.shape) - int(next(c for c in str(node.target) if c in "123"))
    trace.labels.pin_all(x.dims[kept:], f"{node.name} runs over it")
    values = node.meta["val"]
    shapes = [tuple(int(n) for n in v.shape) for v in (values if isinstance(values, list | tuple) else [values])]
    results = [Value(shape, (*x.dims[:kept], *_fixed(shape[kept:]))) for shape in shapes]
    return results if isinstance(values, list | tuple) else results[0]


@rule("pad", "constant_pad_nd")
def pad(trace: Trace, node: Any, x: Value, padding: Sequence[int], *rest: Any, **keywords: Any) -> Value:
    shape = _shape(node)
    dims = []
    for before, after, dim in zip(x.shape, shape, x.dims, strict=True):
        if before != after:
            trace.labels.pin(dim, f"{node.name} pads it")
        dims.append(dim if before == after else FIXED)
    return Value(shape, tuple(dims))


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, node: Any, x: Value, factor: int) -> Value:
    shape, channel = _shape(node), x.dims[-3]
    trace.labels.pin_all(x.dims[-2:], f"{node.name} runs over it")
    if isinstance(channel, np.ndarray):
        channel = trace.labels.unify(channel.reshape(-1, factor * factor))
    return Value(shape, (*x.dims[:-3], channel, FIXED, FIXED))


@rule("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, node: Any, x: Value, factor: int) -> Value:
    shape, channel = _shape(node), x.dims[-3]
    trace.labels.pin_all(x.dims[-2:], f"{node.name} runs over it")
    if isinstance(channel, np.ndarray):
        channel = np.repeat(channel, factor * factor)
    return Value(shape, (*x.dims[:-3], channel, FIXED, FIXED))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, node: Any, x: Value, groups: int) -> Value:
    channel = x.dims[-3]
    if isinstance(channel, np.ndarray):
        channel = np.repeat(trace.labels.unify(channel.reshape(groups, -1).T), groups)
    return Value(x.shape, (*x.dims[:-3], channel, *x.dims[-2:]))


# --- moving dimensions -------------------------------------------------------------------------------


@rule("permute")
def permute(trace: Trace, node: Any, x: Value, order: Sequence[int]) -> Value:
    return Value(_shape(node), tuple(x.dims[i] for i in order))


@rule("transpose", "swapaxes", "swapdims")
def transpose(trace: Trace, node: Any, x: Value, a: int, b: int) -> Value:
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return Value(_shape(node), tuple(dims))


@rule("t", "numpy_T", "mT")
def transposed(trace: Trace, node: Any, x: Value) -> Value:
    if "mT" in str(node.target):
        return Value(_shape(node), (*x.dims[:-2], x.dims[-1], x.dims[-2]))
    return Value(_shape(node), x.dims[::-1])


@rule("movedim")
def movedim(trace: Trace, node: Any, x: Value, source: Any, destination: Any) -> Value:
    order = np.moveaxis(np.empty((0,) * 0 + tuple(range(1, len(x.shape) + 1))), source, destination).shape
    return Value(_shape(node), tuple(x.dims[i - 1] for i in order))


@rule("unsqueeze")
def unsqueeze(trace: Trace, node: Any, x: Value, dim: int) -> Value:
    dims = list(x.dims)
    dims.insert(dim % (len(dims) + 1), FREE)
    return Value(_shape(node), tuple(dims))


@rule("squeeze")
def squeeze(trace: Trace, node: Any, x: Value, dim: Any = None) -> Value:
    given = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(x.shape) for d in given if x.shape[d] == 1}
    for d in gone:
        trace.labels.pin(x.dims[d], f"{node.name} takes it for a dimension of size 1")
    return Value(_shape(node), tuple(d for i, d in enumerate(x.dims) if i not in gone))


@rule("expand", "expand_as", "broadcast_to")
def expand(trace: Trace, node: Any, x: Value, *rest: Any, **keywords: Any) -> Value:
    shape = _shape(node)
    dims: list[Dim] = [FREE] * len(shape)
    for i in range(1, len(x.shape) + 1):
        if x.shape[-i] == shape[-i]:
            dims[-i] = x.dims[-i]
        else:
            trace.labels.pin(x.dims[-i], f"{node.name} repeats it")
    return Value(shape, tuple(dims))


@rule("repeat", "tile")
def repeat(trace: Trace, node: Any, x: Value, times: Sequence[int]) -> Value:
    shape = _shape(node)
    dims: list[Dim] = [FREE] * len(shape)
    for i in range(1, len(x.shape) + 1):
        dim, count = x.dims[-i], shape[-i] // x.shape[-i]
        carried: Dim = np.tile(dim, count) if isinstance(dim, np.ndarray) else dim
        dims[-i] = carried
    return Value(shape, tuple(dims))


@rule("repeat_interleave")
def repeat_interleave(trace: Trace, node: Any, x: Value, times: Any, dim: int | None = None, **keywords: Any) -> Value:
    if not isinstance(times, int) or dim is None:
        return _unknown_tensor(trace, node, x, times)
    dims = list(x.dims)
    carried = dims[dim]
    dims[dim] = np.repeat(carried, times) if isinstance(carried, np.ndarray) else carried
    return Value(_shape(node), tuple(dims))


@rule("roll")
def roll(trace: Trace, node: Any, x: Value, shifts: Any, dims: Any = ()) -> Value:
    moved = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
    for d in moved:
        trace.labels.pin(x.dims[d], f"{node.name} moves it")
    return _settled(x, moved)


# --- taking apart and putting together ---------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(trace: Trace, node: Any, values: Sequence[Value], dim: int = 0) -> Value:
    shape = _shape(node)
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
            trace.labels.pin(parts[-1], f"{name} puts a part of fixed size there")
    return np.concatenate(parts)


@rule("stack")
def stack(trace: Trace, node: Any, values: Sequence[Value], dim: int = 0) -> Value:
    inner = broadcast(trace, node.name, values, values[0].shape)
    dims = list(inner.dims)
    dims.insert(dim % (len(dims) + 1), FIXED)
    return Value(_shape(node), tuple(dims))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split")
def parts(trace: Trace, node: Any, x: Value, sizes: Any = None, dim: int = 0, **keywords: Any) -> list[Value]:
    if "unbind" in str(node.target):
        dim = keywords.get("dim", sizes if isinstance(sizes, int) else 0)
        trace.labels.pin(x.dims[dim], f"{node.name} takes it apart")
        shapes = [tuple(v.shape) for v in node.meta["val"]]
        return [Value(s, _without(x.dims, [dim], len(s))) for s in shapes]
    shapes = [tuple(int(n) for n in v.shape) for v in node.meta["val"]]
    cut = x.dims[dim]
    lengths = [s[dim] for s in shapes]
    if isinstance(cut, np.ndarray):
        if len(set(lengths)) == 1:  # the same index of every part goes, so that the parts stay equal
            trace.labels.unify(cut.reshape(len(lengths), -1).T)
        else:
            trace.labels.pin(cut, f"{node.name} cuts it at fixed places")
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
    shape = _shape(node)
    dims = list(x.dims)
    if shape[dim] != x.shape[dim]:
        trace.labels.pin(dims[dim], f"{node.name} cuts it at fixed places")
        dims[dim] = FIXED
    return Value(shape, tuple(dims))


@rule("select")
def select(trace: Trace, node: Any, x: Value, dim: int, index: int) -> Value:
    trace.labels.pin(x.dims[dim], f"{node.name} takes one index of it")
    return Value(_shape(node), _without(x.dims, [dim], len(x.dims) - 1))


@rule("index")
def index(trace: Trace, node: Any, x: Value, indices: Sequence[Value | None]) -> Value:
    indexed = [i for i, at in enumerate(indices) if at is not None]
    for at in _values(indices):
        trace.labels.pin_all(at.dims, f"{node.name} takes its values for indices")
    trace.labels.pin_all([x.dims[i] for i in indexed], f"{node.name} asks it by index")
    shape = _shape(node)
    if indexed != list(range(indexed[0], indexed[-1] + 1)):
        return _unknown_tensor(trace, node, x)
    count = len(shape) - (len(x.shape) - len(indexed))
    return Value(shape, (*x.dims[: indexed[0]], *(FIXED,) * count, *x.dims[indexed[-1] + 1 :]))


@rule("glu")
def glu(trace: Trace, node: Any, x: Value, dim: int = -1) -> Value:
    dims = list(x.dims)
    cut = dims[dim]
    if isinstance(cut, np.ndarray):
        dims[dim] = trace.labels.unify(cut.reshape(2, -1).T)
    return Value(_shape(node), tuple(dims))


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def reshape(trace: Trace, node: Any, x: Value, *rest: Any, **keywords: Any) -> Value:
    shape = _shape(node)
    if math.prod(shape) != math.prod(x.shape):
        return _unknown_tensor(trace, node, x)  # in another type
    dims: list[Dim] = []
    for number, (before, after) in enumerate(_matching(x.shape, shape)):
        flat = _merge(trace, node.name, [x.dims[i] for i in before], [x.shape[i] for i in before])
        dims += _split(trace, f"{node.name}/{number}", flat, [shape[j] for j in after])
    return Value(shape, tuple(dims))


def _matching(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions on both sides that hold the same number of elements."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        n, m = math.prod(before[k] for k in left), math.prod(after[k] for k in right)
        while n != m:
            if n < m:
                n, left, i = n * before[i], [*left, i], i + 1
            else:
                m, right, j = m * after[j], [*right, j], j + 1
        runs.append((left, right))
    return runs


def _merge(trace: Trace, name: str, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Dimensions made one: labels repeat along the others."""
    labelled = [i for i, d in enumerate(dims) if is_labelled(d) and sizes[i] > 1]
    for i, d in enumerate(dims):
        if sizes[i] == 1:
            trace.labels.pin(d, f"{name} takes it for a dimension of size 1") if len(dims) > 1 else None
    if len(dims) == 1:
        return dims[0]
    if not labelled:
        return FREE if all(d is FREE for d in dims) else FIXED
    if len(labelled) > 1:
        trace.labels.pin_all([dims[i] for i in labelled], f"{name} makes one dimension of two that might shrink")
        return FIXED
    (at,) = labelled
    shape = [1] * len(sizes)
    shape[at] = sizes[at]
    merged: Array = np.broadcast_to(np.asarray(dims[at]).reshape(shape), tuple(sizes)).reshape(-1)
    return merged


def _split(trace: Trace, name: str, flat: Dim, sizes: Sequence[int]) -> list[Dim]:
    """One dimension made several: one of the factors carries the labels, and the result stays rectangular."""
    if not isinstance(flat, np.ndarray) or len(sizes) < 2:
        return [flat] * len(sizes) if len(sizes) != 0 else []
    factors = [k for k, size in enumerate(sizes) if size > 1]
    if not factors:
        trace.labels.pin(flat, f"{name} takes it for a dimension of size 1")
        return [FIXED] * len(sizes)
    rows = [np.moveaxis(flat.reshape(sizes), k, 0).reshape(sizes[k], -1) for k in factors]
    # Where labels only repeat along the other factors, nothing is lost and nothing is to be decided.
    repeated = [i for i, r in enumerate(rows) if (r == r[:, :1]).all()]
    way = repeated[0] if repeated else trace.choose(f"split {tuple(sizes)}", len(factors))
    dims: list[Dim] = [FIXED] * len(sizes)
    dims[factors[way]] = trace.labels.unify(rows[way])
    return dims


# --- recurrent ---------------------------------------------------------------------------------------


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(
    trace: Trace, node: Any, x: Value, states: Any, weights: Sequence[Value], has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool | None = None,
) -> Any:  # fmt: skip
    labels, name = trace.labels, node.name
    directions, per_cell = 2 if bidirectional else 1, 4 if has_biases else 2
    if batch_first is None or len(weights) != layers * directions * per_cell:  # packed sequences, projections
        return unknown(trace, node, x, states, weights, has_biases)
    given = states if isinstance(states, list | tuple) else [states]
    for state in given:
        labels.pin_all(state.dims[:-1], f"{name} runs over it")
    labels.pin_all(x.dims[:-1], f"{name} runs over it")
    read: Dim = x.dims[-1]
    cells = [weights[i : i + per_cell] for i in range(0, len(weights), per_cell)]
    for layer in range(layers):
        hidden = [_cell(trace, name, read, cell) for cell in cells[layer * directions : (layer + 1) * directions]]
        # One hidden size for all: the same index goes in both directions, and in every layer, as the module has one number.
        read = hidden[0] if len(hidden) == 1 else np.concatenate(hidden)
    first = [_hidden(cell) for cell in cells]
    for other in [*first[1:], *(state.dims[-1] for state in given)]:
        labels.join(first[0], other, f"{name} is given its states")
    values = [tuple(int(n) for n in v.shape) for v in node.meta["val"]]
    outputs = [Value(values[0], (*x.dims[:-1], read))]
    return outputs + [Value(s, (FIXED, FIXED, first[0])) for s in values[1:]]


def _hidden(cell: Sequence[Value]) -> Array:
    dim = cell[1].dims[1]
    assert isinstance(dim, np.ndarray)
    return dim


def _cell(trace: Trace, name: str, read: Dim, cell: Sequence[Value]) -> Array:
    labels = trace.labels
    labels.join(read, cell[0].dims[1], f"{name} reads a dimension of fixed size")
    trace.reads(cell[0], 1)
    trace.reads(cell[1], 1)
    hidden = _hidden(cell)
    for value in cell:
        rows = value.dims[0]
        if isinstance(rows, np.ndarray):
            labels.join(labels.unify(rows.reshape(-1, hidden.size).T), hidden, name)
    return hidden


def unknown(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """An operation that is not understood: all that it reads stays as it is, with its name as the reason."""
    for value in _values([arguments, keywords]):
        trace.labels.pin_all(value.dims, f"{node.target} is not understood ({node.name})")
    result = node.meta.get("val")
    if isinstance(result, list | tuple):
        return [Value(tuple(v.shape), _fixed(v.shape)) if hasattr(v, "shape") else v for v in result]
    return Value(tuple(result.shape), _fixed(result.shape)) if hasattr(result, "shape") else result


def _unknown_tensor(trace: Trace, node: Any, *arguments: Any) -> Value:
    result = unknown(trace, node, *arguments)
    assert isinstance(result, Value)
    return result


def _values(nested: Any) -> list[Value]:
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [v for item in nested for v in _values(item)] if isinstance(nested, list | tuple) else []
