"""Elementwise operations, and operations that create tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from fasterai.graph.labels import FREE, zeroed
from fasterai.graph.rules.trace import (
    Trace,
    Value,
    all_fixed,
    blend,
    broadcast,
    called,
    marked_as,
    rule,
    shape_of,
    unknown,
    unmarked,
    zeros_at,
)

__all__ = ["elementwise"]


@rule(
    *("add", "sub", "rsub", "div", "pow", "where", "maximum", "minimum", "fmod", "remainder", "lerp", "addcmul"),
    *("relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "log_sigmoid", "hardshrink", "softshrink", "threshold", "rrelu"),
    *("abs", "neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "square", "sign", "erf", "sin", "cos"),
    *("clamp", "clamp_min", "clamp_max", "floor", "ceil", "round", "trunc", "masked_fill", "eq", "ne", "gt", "ge", "lt", "le"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "isinf", "nan_to_num"),
    *("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach"),
    *("lift_fresh_copy", "copy", "fill", "zero", "divide", "subtract", "true_divide", "floor_divide", "clip"),
    *("log2", "log10", "exp2", "tan", "atan", "sinh", "cosh", "isfinite", "logical_xor", "bitwise_xor", "addcdiv", "atan2"),
    *(
        "erfc",
        "__and__",
        "__or__",
        "__xor__",
        "asin",
        "acos",
        "asinh",
        "acosh",
        "atanh",
        "erfinv",
        "lgamma",
        "digamma",
        "logit",
    ),
    *("sinc", "hypot", "logaddexp", "xlogy", "fmax", "fmin", "heaviside", "copysign", "sgn", "frac"),
)
def elementwise(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """Join the dimensions of the operands that meet in an elementwise operation."""
    if not hasattr(node.meta["val"], "shape"):  # `where(condition)` gives the indices at which it holds
        return unknown(trace, node, *arguments, **keywords)
    values = [a for a in (*arguments, *keywords.values()) if isinstance(a, Value)]
    name, shape = called(node), shape_of(node)
    made = broadcast(trace, node.name, values, shape)
    if name == "zero":
        return replace(made, dims=tuple(zeroed(d) if isinstance(d, np.ndarray) else d for d in made.dims))
    if name in KEEPS and _keeps(name, arguments[1:], keywords):
        return _zero_as(made, arguments[0]) if name not in QUOTIENTS else _over(made, *arguments[:2])
    if name in SUMS and all(isinstance(a, Value) or a == 0 for a in arguments[:2]):
        return _zero_as(made, *[a for a in arguments[:2] if isinstance(a, Value)])
    if name == "addcmul" and all(isinstance(a, Value) for a in arguments[:3]):
        return _zero_as(made, arguments[0], broadcast(trace, node.name, arguments[1:3], shape, product=True))
    return _zero_as(made, *arguments[1:3]) if name == "where" else unmarked(made)


#: Operations that are zero where their first operand is.
KEEPS = frozenset((
    *("relu", "relu6", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish"),
    *("hardshrink", "softshrink", "abs", "neg", "expm1", "log1p", "sqrt", "square", "sign", "erf", "sin", "tan", "atan"),
    *("sinh", "floor", "ceil", "round", "trunc", "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max", "pow", "div"),
    *("divide", "true_divide", "floor_divide", "masked_fill", "dropout", "feature_dropout", "contiguous", "clone", "alias"),
    *("detach", "lift_fresh_copy"),
))  # fmt: skip
QUOTIENTS = frozenset(("div", "divide", "true_divide", "floor_divide"))
#: Operations that are zero where both of their operands are.
SUMS = frozenset(("add", "sub", "rsub", "subtract", "maximum", "minimum", "lerp"))


def _keeps(name: str, rest: Any, keywords: Any) -> bool:
    """Tell if an operation with these further arguments gives zero for zero."""
    if name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"):
        bounds = [*rest, *keywords.values()]
        if not all(b is None or isinstance(b, int | float) for b in bounds):
            return False
        low = None if name == "clamp_max" else next(iter(rest), keywords.get("min", keywords.get("min_val")))
        high = bounds[0] if name == "clamp_max" else next(iter(rest[1:]), keywords.get("max", keywords.get("max_val")))
        return (low is None or low <= 0) and (high is None or high >= 0)
    if name == "pow":
        return len(rest) == 1 and isinstance(rest[0], int | float) and rest[0] > 0
    if name != "masked_fill":
        return True
    value = rest[1] if len(rest) > 1 else keywords.get("value")
    return isinstance(value, int | float) and value == 0


def _zero_as(made: Value, *operands: Any) -> Value:
    """Return a result that is zero where all of some operands are: none of them a number, all of the result's shape there."""
    if not all(isinstance(x, Value) for x in operands):
        return unmarked(made)
    for i in range(-len(made.shape), 0):
        flags = [zeros_at(x, i, made.shape[i]) for x in operands]
        made = marked_as(made, i, np.logical_and.reduce(flags))
    return made


def _over(made: Value, x: Any, divisor: Any) -> Value:
    """Return a quotient that is zero where its first operand is, unless the divisor may be zero there too."""
    quotient = _zero_as(made, x)
    if isinstance(divisor, Value):
        for i in range(-len(made.shape), 0):
            divides = zeros_at(divisor, i, made.shape[i])
            quotient = marked_as(quotient, i, zeros_at(quotient, i, made.shape[i]) & ~divides)
    return quotient


@rule("mul", "multiply")
def product(trace: Trace, node: Any, *factors: Any) -> Any:
    """Join the dimensions of two factors; where one is a stack of matrices, as experts are, the product is a blend of them."""
    values = [f for f in factors if isinstance(f, Value)]
    made = broadcast(trace, node.name, values, shape_of(node), product=True)
    if len(values) < 2:
        return made
    count = len(made.shape)
    origins = [[_aligned(f, made, i) for i in range(count)] for f in values]
    return blend(values, origins, made)


def _aligned(factor: Value, made: Value, i: int) -> int | None:
    """Return the dimension of a factor that meets dimension `i` of a product; None where it has none of that size."""
    d = i - len(made.shape) + len(factor.shape)
    return d if d >= 0 and factor.shape[d] == made.shape[i] else None


@rule("to", "_to_copy", "type_as")
def cast(trace: Trace, node: Any, x: Value, *other: Any, **keywords: Any) -> Value:
    """Keep the labels of the tensor that is cast; another tensor only lends its type and device."""
    return Value(shape_of(node), x.dims)


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def like(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    """Give the labels of the tensor whose sizes are taken: what meets the new tensor shrinks with that one."""
    return unmarked(Value(shape_of(node), x.dims))


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def created(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Value:
    shape = shape_of(node)
    return Value(shape, (FREE,) * len(shape))


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices")
def counted(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Value:
    """Fix the dimension of a range: its numbers differ from index to index, so what meets it must keep its size."""
    return Value(shape_of(node), all_fixed(shape_of(node)))


@rule("_assert_tensor_metadata")
def assertion(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> None:
    """Skip the types and sizes that export saw and noted; nothing depends on them."""


@rule("prelu")
def prelu(trace: Trace, node: Any, x: Value, weight: Value) -> Value:
    if math.prod(weight.shape) == 1:
        trace.labels.pin_all(weight.dims, "prelu has one slope for all channels")
    else:
        trace.labels.join(x.dims[1], weight.dims[0], "prelu")
    return x
