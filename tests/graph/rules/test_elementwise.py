from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.graph.rules.cases import (
    Case,
    around,
    aten,
    both,
    goes_as_it_says,
    linears,
    over_zeros,
    side_by_side,
    stands_in_the_program,
)

UNARY = (
    *("relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "log_sigmoid", "hardshrink", "softshrink", "rrelu", "abs", "neg", "exp", "log", "log1p"),
    *("expm1", "sqrt", "rsqrt", "reciprocal", "square", "sign", "erf", "erfc", "sin", "cos", "tan", "atan", "sinh", "cosh"),
    *("floor", "ceil", "round", "trunc", "nan_to_num", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "log2"),
    *("log10", "exp2"),
)
COMPARED = ("eq", "ne", "gt", "ge", "lt", "le")
LOGICAL = (
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "__and__",
    "__or__",
    "__xor__",
)
BINARY = (
    *("add", "sub", "mul", "div", "maximum", "minimum", "fmod", "remainder", "multiply", "divide", "subtract", "true_divide"),
    *("atan2",),
)

#: Functions of numbers within one.
WITHIN_ONE = ("asin", "acos", "asinh", "atanh", "erfinv", "lgamma", "digamma", "logit", "sinc", "sgn", "frac")

ELEMENTWISE = [
    *(around(op, getattr(aten, op)) for op in UNARY),
    *(around(op, lambda x, op=op: getattr(aten, op)(x, x.flip(0).cos() + 2)) for op in BINARY),
    *(around(op, lambda x, op=op: getattr(aten, op)(x, 1.0).to(x.dtype) + x) for op in COMPARED),
    *(around(op, lambda x, op=op: getattr(aten, op)(x > 1, x > 0.8).to(x.dtype) + x) for op in LOGICAL),
    *(around(op, lambda x, op=op: getattr(aten, op)(x > 1).to(x.dtype) + x) for op in ("logical_not", "bitwise_not")),
    *(around(op, lambda x, op=op: getattr(aten, op)(x).to(x.dtype) + x) for op in ("isnan", "isinf", "isfinite")),
    *(around(op, lambda x, op=op: getattr(torch, op)(x / 2)) for op in WITHIN_ONE),
    around("acosh", lambda x: torch.acosh(x + 1)),
    *(around(op, lambda x, op=op: getattr(torch, op)(x, x.exp())) for op in ("hypot", "logaddexp", "xlogy", "fmax", "fmin")),
    *(around(op, lambda x, op=op: getattr(torch, op)(x, x.exp()) + x) for op in ("heaviside", "copysign")),
    around("rsub", lambda x: aten.rsub(x, 1.0)),
    around("floor_divide", lambda x: aten.floor_divide(x, 0.3)),
    around("pow", lambda x: aten.pow(x, 1.7)),
    around("where", lambda x: torch.where(x > 1, x, -x)),
    around("lerp", lambda x: torch.lerp(x, x.exp(), 0.3)),
    around("addcmul", lambda x: torch.addcmul(x, x, x.exp())),
    around("addcdiv", lambda x: torch.addcdiv(x, x, x.exp())),
    around("threshold", lambda x: F.threshold(x, 1.0, 0.2)),
    around("clamp", lambda x: x.clamp(0.7, 1.2)),
    around("clip", lambda x: aten.clip(x, 0.7, 1.2)),
    around("clamp_min", lambda x: x.clamp_min(0.7)),
    around("clamp_max", lambda x: x.clamp_max(0.7)),
    around("masked_fill", lambda x: x.masked_fill(x > 1, 0.3)),
    around("dropout", lambda x: aten.dropout(x, 0.5, False)),
    around("feature_dropout", lambda x: aten.feature_dropout(x, 0.5, False)),
    around("alpha_dropout", lambda x: aten.alpha_dropout(x, 0.5, False)),
    around("_assert_tensor_metadata", lambda x: x.to(torch.float32).to(torch.float64)),
    around("to", lambda x: x.to(torch.float32).to(torch.float64)),
    around("_to_copy", lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float32), dtype=torch.float64)),
    around("type_as", lambda x: x.float().type_as(x)),
    around("copy", lambda x: aten.copy(x.exp(), x)),
    around("fill", lambda x: aten.fill(x, 1.0) + x),
    around("zero", lambda x: aten.zero(x) + x),
]

CREATED = [
    around("zeros", lambda x: x + torch.zeros(x.shape, dtype=x.dtype)),
    around("ones", lambda x: x + torch.ones(x.shape, dtype=x.dtype)),
    around("full", lambda x: x + torch.full(x.shape, 2.0, dtype=x.dtype)),
    around("empty", lambda x: x + torch.empty(x.shape, dtype=x.dtype).fill_(1.0)),
    around("new_zeros", lambda x: x + x.new_zeros(x.shape)),
    around("new_ones", lambda x: x + x.new_ones(x.shape)),
    around("new_full", lambda x: x + x.new_full(x.shape, 3.0)),
    around("new_empty", lambda x: x + x.new_empty(x.shape).fill_(2.0)),
    around("empty_like", lambda x: x + torch.empty_like(x).fill_(2.0)),
    around("scalar_tensor", lambda x: x + torch.scalar_tensor(2.0)),
    around("zeros_like", lambda x: x + torch.zeros_like(x)),
    around("ones_like", lambda x: x + torch.ones_like(x)),
    around("full_like", lambda x: x + torch.full_like(x, 0.5)),
]

OTHERS = [
    Case(
        ("arange",),
        lambda m, x: m.b(m.a(x) * torch.arange(8)),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "mul"},
        "arange differs from index to index",
    ),
    *(
        Case(
            (op,),
            lambda m, x, make=make: m.b(m.a(x) * make()),
            linears(),
            (4, 6),
            {},
            {("a.weight", 0): "mul"},
            f"{op} differs from index to index",
        )
        for op, make in {
            "linspace": lambda: torch.linspace(0, 1, 8, dtype=torch.float64),
            "logspace": lambda: torch.logspace(0, 1, 8, dtype=torch.float64),
            "eye": lambda: torch.eye(8, dtype=torch.float64)[2],
            "tril_indices": lambda: torch.tril_indices(4, 4)[0][:8],
            "triu_indices": lambda: torch.triu_indices(4, 4)[1][:8],
        }.items()
    ),
    Case(
        ("zeros", "copy"),
        lambda m, x: aten.copy_(torch.zeros(len(x), 3, dtype=x.dtype), m.b(m.a(x))),
        linears(),
        (4, 6),
        both,
        {("b.weight", 0): "output"},
        "an output written into zeros",
    ),
]

#: Zero for zero, and not known to be so: a mark less keeps channels that could go, and nothing worse.
NEEDLESSLY_OTHER = {"rrelu", "fmod", "remainder", "atan2", "minimum"}
AT_ZERO = {
    **{op: getattr(aten, op) for op in UNARY},
    **{op: lambda x, op=op: getattr(aten, op)(x, x + 1) for op in BINARY},
    **{f"{op} of zeros": lambda x, op=op: getattr(aten, op)(x, x.sin()) for op in ("add", "sub", "maximum", "minimum")},
    "clamp": lambda x: x.clamp(-0.2, 0.3),
    "clamp from above zero": lambda x: x.clamp(0.1, 0.3),
    "clamp by a maximum": lambda x: torch.clamp(x, max=0.4),
    "clamp_min": lambda x: x.clamp_min(-0.3),
    "clamp_min above zero": lambda x: x.clamp_min(0.3),
    "clamp_max": lambda x: x.clamp_max(0.3),
    "clamp_max below zero": lambda x: x.clamp_max(-0.3),
    "pow": lambda x: x.abs() ** 1.5,
    "pow, of zero": lambda x: x**0,
    "masked_fill": lambda x: x.masked_fill(x > 0.2, 0.0),
    "masked_fill with one": lambda x: x.masked_fill(x > -0.2, 1.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "where, else one": lambda x: torch.where(x > 0, x, 1.0),
    "addcmul": lambda x: torch.addcmul(x, x.exp(), x),
    "addcmul with one": lambda x: torch.addcmul(x, x.exp(), x.cos()),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "add a number": lambda x: x + 0.2,
    "dropout": lambda x: aten.dropout(x, 0.5, False),
    "in place": lambda x: x.clone().mul_(2.0).relu_(),
    "added in place": lambda x: x.clone().add_(1.0),
    "added to a view": lambda x: added_to_a_view(x.clone()),
    "scaled in a view": lambda x: scaled_in_a_view(x.clone()),
    "expanded as another": lambda x: x.sum(1, keepdim=True).cos().expand_as(x),
    "over itself": lambda x: x / (x + x.detach()).clamp_min(1.0),
}


def added_to_a_view(x: torch.Tensor) -> torch.Tensor:
    x.view(x.shape).add_(1.0)
    return x


def scaled_in_a_view(x: torch.Tensor) -> torch.Tensor:
    x.view(x.shape).mul_(2.0)
    return x


def is_zero_for_zero(op: str) -> bool:
    return not bool(AT_ZERO[op](torch.zeros(2, 2, dtype=torch.float64)).any())


def summed(op: str) -> Case:
    """A sum over an operation's result: it lets channels go that are zero there, and no others."""
    goes = is_zero_for_zero(op) and op not in NEEDLESSLY_OTHER
    f = lambda x: AT_ZERO[op](x).sum(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0) * x  # noqa: E731
    return over_zeros("sum", f, "" if goes else "it is not zero where its channel is silent")


ZEROS = {op: summed(op) for op in AT_ZERO}
GONE = [case for case in ZEROS.values() if case.goes]
STAYS = [case for case in ZEROS.values() if not case.goes]
CASES = [*side_by_side([*ELEMENTWISE, *CREATED]), *side_by_side(GONE, 20), *side_by_side(STAYS, 20), *OTHERS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
