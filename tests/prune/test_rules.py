"""Every rule around a small network: what it lets go computes the same without it, what it pins says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.prune.graph import channel_graph
from fasterai.prune.labels import FIXED
from fasterai.prune.removal import mask_channels_, remove
from fasterai.prune.rules import RULES, Trace, Value, rule

aten = torch.ops.aten
Place = tuple[str, int]


@torch.library.custom_op("tests::grouped_mm_fallback", mutates_args=())
def grouped_mm_fallback(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows by experts, as one opaque operation, as libraries of language models have it."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[i:j] @ w for i, j, w in zip(starts, ends.tolist(), weight, strict=True)])


@grouped_mm_fallback.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


class Net(nn.Module):
    """Layers by name, and a forward pass as a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
            elif isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.register_buffer(name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A network around some operations.

    `goes`: place -> how many channels its group has. `stays`: place -> what the reason says. `where`: which of the
    operation's names must stand in the exported program.
    """

    ops: tuple[str, ...]
    run: Callable[..., Any]
    layers: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    goes: dict[Place, int] = field(default_factory=dict)
    stays: dict[Place, str] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or "-".join(self.ops[:2])

    def net(self) -> Net:
        torch.manual_seed(0)
        net = Net(self.run, **self.layers()).double().eval()
        with torch.no_grad():
            for tensor in [*net.parameters(), *(b for n, b in net.named_buffers() if "running" in n)]:
                tensor.add_(torch.rand_like(tensor), alpha=0.3)
        return net

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linears(middle: int = 8, back: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": nn.Linear(6, middle), "b": nn.Linear(back, 3)}


def convs(dims: int = 2, middle: int = 8, back: int = 8, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: {"a": conv(3, middle, 3, padding=1), "b": conv(back, 4, 1), **{n: make() for n, make in more.items()}}


def around(op: str, f: Callable[[Tensor], Tensor]) -> Case:
    """An elementwise operation between two linear layers; its input stays within (0.5, 1.5)."""
    return Case((op,), lambda m, x: m.b(f(m.a(x).sigmoid() + 0.5)), linears(), (4, 6), {("a.weight", 0): 8, ("b.weight", 1): 8})


def on_images(op: str, f: Callable[[Tensor], Tensor], dims: int = 2) -> Case:
    """An operation over the picture between two convolutions."""
    size = (6, 8, 6)[:dims]
    goes = {("a.weight", 0): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(f(m.a(x)).contiguous()), convs(dims), (2, 3, *size), goes)


def over_channels(op: str, f: Callable[[Tensor], Tensor], back: int = 8) -> Case:
    """An operation that runs over the channels, which stay."""
    stays = {("a.weight", 0): op.strip("_")}
    run = lambda m, x: m.b(f(m.a(x)))  # noqa: E731
    return Case((op,), run, linears(8, back), (4, 6), {}, stays, f"{op} over channels")


def beside(op: str, f: Callable[[Tensor], Tensor]) -> Case:
    """An operation along another dimension than the channels of (N, T, C)."""
    goes = {("a.weight", 0): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(f(m.a(x))), linears(), (2, 4, 6), goes, {}, f"{op} beside channels")


one = {("a.weight", 0): 8}
both = {("a.weight", 0): 8, ("b.weight", 1): 8}

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

ELEMENTWISE = [
    *(around(op, getattr(aten, op)) for op in UNARY),
    *(around(op, lambda x, op=op: getattr(aten, op)(x, x.flip(0).cos() + 2)) for op in BINARY),
    *(around(op, lambda x, op=op: getattr(aten, op)(x, 1.0).to(x.dtype) + x) for op in COMPARED),
    *(around(op, lambda x, op=op: getattr(aten, op)(x > 1, x > 0.8).to(x.dtype) + x) for op in LOGICAL),
    *(around(op, lambda x, op=op: getattr(aten, op)(x > 1).to(x.dtype) + x) for op in ("logical_not", "bitwise_not")),
    *(around(op, lambda x, op=op: getattr(aten, op)(x).to(x.dtype) + x) for op in ("isnan", "isinf", "isfinite")),
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
    around("zeros_like", lambda x: x + torch.zeros_like(x)),
    around("ones_like", lambda x: x + torch.ones_like(x)),
    around("full_like", lambda x: x + torch.full_like(x, 0.5)),
    Case(
        ("arange",),
        lambda m, x: m.b(m.a(x) * torch.arange(8)),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "mul"},
        "arange differs from index to index",
    ),
    Case(
        ("zeros", "copy"),
        lambda m, x: aten.copy_(torch.zeros(len(x), 3, dtype=x.dtype), m.b(m.a(x))),
        linears(),
        (4, 6),
        both,
        {("b.weight", 0): "writes it"},
        "an output written into zeros",
    ),
]


def written(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
    out[:] = m.b(m.a(x))
    return out


def keys(c: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {**{n: nn.Linear(6, c) for n in "qkv"}, "o": nn.Linear(c, 6)}


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def sdpa(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(heads(layer(x), 4) for layer in (m.q, m.k, m.v)))
    return m.o(y.transpose(1, 2).flatten(2))


def sdpa_masked(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(heads(layer(x), 4) for layer in (m.q, m.k, m.v)), attn_mask=m.mask)
    return m.o(y.transpose(1, 2).flatten(2))


def by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
    return m.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.o(y.transpose(1, 2).flatten(2))


def repeated_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grouped_layers() -> dict[str, Any]:
    return {"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "o": nn.Linear(16, 6)}


WEIGHTS = [
    Case(("linear",), lambda m, x: m.b(m.a(x)), linears(), (4, 6), both, {("b.weight", 0): "output", ("a.weight", 1): "fixed"}),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c)),
        lambda: {**linears()(), "c": torch.randn(8, 8)},
        (4, 6),
        {},
        {("a.weight", 0): "no parameter"},
        "linear by a buffer",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c.tanh())),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(8, 8))},
        (4, 6),
        {("b.weight", 1): 8},
        {("a.weight", 0): "no parameter"},
        "linear by a weight worked out",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c.softmax(0))),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(8, 8))},
        (4, 6),
        {},
        {("a.weight", 0): "no parameter"},
        "linear by a softmaxed weight",
    ),
    Case(
        ("t",),
        lambda m, x: m.b(F.linear(F.linear(m.a(x), m.c), m.c.t())),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(5, 8))},
        (4, 6),
        {**both, ("c", 0): 5},
        {},
        "tied autoencoder",
    ),
    *(Case((f"conv{d}d",), lambda m, x: m.b(m.a(x).relu()), convs(d), (2, 3, *(5,) * d), both) for d in (1, 2, 3)),
    Case(("conv2d",), lambda m, x: m.b(m.a(x)), convs(), (3, 7, 7), both, {}, "conv2d without a batch"),
    Case(
        ("conv2d",),
        lambda m, x: m.b(m.g(m.a(x))),
        convs(g=lambda: nn.Conv2d(8, 8, 3, groups=8)),
        (2, 3, 6, 6),
        {**both, ("g.weight", 0): 8},
        {},
        "depthwise",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(m.g(m.a(x))),
        convs(back=16, g=lambda: nn.Conv2d(8, 16, 3, groups=8)),
        (2, 3, 6, 6),
        {**one, ("b.weight", 1): 8, ("g.weight", 0): 8},
        {},
        "depthwise with a multiplier",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(m.g(x)),
        lambda: {"g": nn.Conv2d(3, 12, 3, groups=3), "b": nn.Conv2d(12, 2, 1)},
        (2, 3, 6, 6),
        {("g.weight", 0): 4, ("b.weight", 1): 4},
        {},
        "depthwise on the input",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(m.g(m.a(x))),
        convs(back=12, g=lambda: nn.Conv2d(8, 12, 3, groups=2)),
        (2, 3, 6, 6),
        {**one, ("g.weight", 1): 4, ("g.weight", 0): 6} | {("a.weight", 0): 4},
        {},
        "grouped, thinned in every group",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(m.g(m.s(m.a(x)))),
        convs(g=lambda: nn.Conv2d(8, 8, 3, groups=4), s=lambda: nn.GroupNorm(4, 8)),
        (2, 3, 6, 6),
        {("a.weight", 0): 4, ("g.weight", 0): 4, ("b.weight", 1): 4, ("s.weight", 0): 4},
        {("g.weight", 1): "width of its groups"},
        "grouped, whole groups",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(F.conv2d(m.a(x), m.blur, groups=m.blur.shape[0])),
        lambda: {**convs()(), "blur": torch.ones(8, 1, 3, 3)},
        (2, 3, 6, 6),
        {**both, ("blur", 0): 8},
        {},
        "blurred by a buffer",
    ),
    Case(
        ("conv2d",),
        lambda m, x: m.b(F.conv2d(m.a(x), m.c)),
        lambda: {**convs()(), "c": torch.randn(8, 8, 1, 1)},
        (2, 3, 6, 6),
        {},
        {("a.weight", 0): "a buffer"},
        "convolved with a buffer",
    ),
    Case(
        ("conv1d",),
        lambda m, x: m.b(m.a(x) * m.e(m.a(x).mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()[:, :, None, None]),
        convs(e=lambda: nn.Conv1d(1, 1, 3, padding=1)),
        (2, 3, 6, 6),
        {},
        {("a.weight", 0): "conv1d"},
        "a convolution along channels",
    ),
    Case(
        ("convolution",),
        lambda m, x: m.b(aten.convolution(m.a(x), m.c, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        lambda: {**convs()(), "c": nn.Parameter(torch.randn(8, 8, 1, 1))},
        (2, 3, 4, 4),
        {**both, ("c", 1): 8, ("c", 0): 8},
    ),
    Case(
        ("convolution",),
        lambda m, x: m.b(aten.convolution(m.a(x), m.c, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)),
        lambda: {**convs(back=5)(), "c": nn.Parameter(torch.randn(8, 5, 1, 1))},
        (2, 3, 4, 4),
        {**one, ("c", 0): 8, ("c", 1): 5, ("b.weight", 1): 5},
        {},
        "convolution, transposed",
    ),
    *(
        Case(
            (f"conv_transpose{d}d",),
            lambda m, x: m.b(m.t(m.a(x))),
            convs(d, back=5, t=lambda d=d: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1](8, 5, 2, 2)),
            (2, 3, *(3,) * d),
            {**one, ("t.weight", 0): 8, ("t.weight", 1): 5},
        )
        for d in (1, 2, 3)
    ),
    Case(
        ("conv_transpose2d",),
        lambda m, x: m.b(m.t(m.a(x))),
        convs(back=12, t=lambda: nn.ConvTranspose2d(8, 12, 2, 2, groups=2)),
        (2, 3, 4, 4),
        {("a.weight", 0): 4, ("t.weight", 1): 6, ("b.weight", 1): 6},
        {},
        "transposed, grouped",
    ),
    Case(
        ("conv_transpose2d",),
        lambda m, x: m.b(m.t(m.a(x))),
        convs(back=16, t=lambda: nn.ConvTranspose2d(8, 16, 2, 2, groups=8)),
        (2, 3, 4, 4),
        {("a.weight", 0): 8, ("t.weight", 0): 8, ("b.weight", 1): 8},
        {("t.weight", 1): "width"},
        "transposed, depthwise",
    ),
    Case(
        ("embedding",),
        lambda m, x: m.b(m.e(x.abs().long() % 7)),
        lambda: {"e": nn.Embedding(7, 8), "b": nn.Linear(8, 3)},
        (4, 5),
        {("e.weight", 1): 8, ("b.weight", 1): 8},
        {("e.weight", 0): "asked by index"},
    ),
    Case(
        ("embedding",),
        lambda m, x: F.linear(m.a(m.e(x.abs().long() % 7)), m.e.weight),
        lambda: {"e": nn.Embedding(7, 8), "a": nn.Linear(8, 8)},
        (4, 5),
        {("e.weight", 1): 8, ("a.weight", 1): 8},
        {("e.weight", 0): ""},
        "tied embedding",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(m.c(m.c(m.a(x)))),
        lambda: {**linears()(), "c": nn.Linear(8, 8)},
        (4, 6),
        {**both, ("c.weight", 0): 8, ("c.weight", 1): 8},
        {},
        "one linear layer used twice",
    ),
    Case(
        ("matmul",),
        lambda m, x: (m.a(x).relu() @ m.w) @ m.u,
        lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(8, 5)), "u": nn.Parameter(torch.randn(5))},
        (4, 6),
        {**one, ("w", 0): 8, ("w", 1): 5, ("u", 0): 5},
    ),
    Case(
        ("mm",),
        lambda m, x: aten.mm(m.a(x).relu(), m.w),
        lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(8, 5))},
        (4, 6),
        {**one, ("w", 0): 8},
        {("w", 1): "output"},
    ),
    Case(("bmm",), lambda m, x: m.b(torch.bmm(x @ x.transpose(1, 2), m.a(x))), linears(), (2, 4, 6), both),
    Case(
        ("matmul",),
        lambda m, x: m.a(x) @ m.b(x).transpose(1, 2),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "sums over it", ("b.weight", 0): "sums over it"},
        "two activations contracted",
    ),
    Case(
        ("addmm",),
        lambda m, x: torch.addmm(m.c, m.a(x), m.w),
        lambda: {"a": nn.Linear(6, 8), "c": nn.Parameter(torch.zeros(5)), "w": nn.Parameter(torch.randn(8, 5))},
        (4, 6),
        {**one, ("w", 0): 8},
        {("c", 0): "output"},
    ),
    Case(
        ("baddbmm",),
        lambda m, x: m.b(torch.baddbmm(m.c(x), x @ x.transpose(1, 2), m.a(x), beta=0.5, alpha=0.3)),
        lambda: {**linears()(), "c": nn.Linear(6, 8)},
        (2, 4, 6),
        {**both, ("c.weight", 0): 8},
    ),
    *(
        Case(
            (op,),
            lambda m, x, mm=mm: mm(m.a(x).float(), m.w.float(), torch.tensor([1, len(x)], dtype=torch.int32)),
            lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(2, 8, 4))},
            (4, 6),
            {**one, ("w", 1): 8},
            {("w", 0): "experts", ("w", 2): "output"},
            f"{op}, experts",
        )
        for op, mm in (("_grouped_mm", aten._grouped_mm), ("grouped_mm_fallback", torch.ops.tests.grouped_mm_fallback))
    ),
    Case(
        ("_grouped_mm",),
        lambda m, x: aten._grouped_mm(m.a(x).float(), m.w.float()),
        lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(2, 8, 4))},
        (2, 4, 6),
        {},
        {("a.weight", 0): "_grouped_mm"},
        "_grouped_mm without rows to share out",
    ),
    Case(
        ("einsum",),
        lambda m, x: m.b(torch.einsum("btc,cd->btd", m.a(x), m.w)),
        lambda: {**linears(back=5)(), "w": nn.Parameter(torch.randn(8, 5))},
        (2, 4, 6),
        {**one, ("w", 0): 8, ("w", 1): 5},
    ),
    Case(
        ("einsum",),
        lambda m, x: torch.einsum("btc,bsc->bts", m.a(x), m.b(x)),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "activations only"},
        "einsum of activations",
    ),
    Case(
        ("einsum",),
        lambda m, x: torch.einsum("...c,dc->...d", m.a(x), m.w),
        lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(5, 8))},
        (2, 4, 6),
        {},
        {("a.weight", 0): "einsum"},
        "einsum, dots",
    ),
    Case(
        ("prelu",),
        lambda m, x: m.b(m.p(m.a(x))),
        lambda: {**convs()(), "p": nn.PReLU(8)},
        (2, 3, 4, 4),
        {**both, ("p.weight", 0): 8},
    ),
    Case(
        ("prelu",),
        lambda m, x: m.b(m.p(m.a(x))),
        lambda: {**convs()(), "p": nn.PReLU()},
        (2, 3, 4, 4),
        both,
        {},
        "prelu, one slope",
    ),
]

NORMS = [
    Case(
        ("batch_norm",),
        lambda m, x: m.b(m.n(m.a(x)).relu()),
        convs(n=lambda: nn.BatchNorm2d(8)),
        (2, 3, 4, 4),
        {**both, ("n.weight", 0): 8, ("n.running_var", 0): 8},
    ),
    Case(
        ("batch_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.BatchNorm1d(4)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "averages over it"},
        "batch norm over channels that stand last",
    ),
    Case(
        ("instance_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        convs(n=lambda: nn.InstanceNorm2d(8, affine=True)),
        (2, 3, 4, 4),
        {**both, ("n.weight", 0): 8},
    ),
    Case(
        ("instance_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.InstanceNorm1d(4, affine=True)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "averages over it"},
        "instance norm over channels that stand last",
    ),
    Case(
        ("group_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        convs(n=lambda: nn.GroupNorm(4, 8)),
        (2, 3, 4, 4),
        {("a.weight", 0): 4, ("n.weight", 0): 4, ("b.weight", 1): 4},
    ),
    Case(
        ("group_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.GroupNorm(2, 4)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "averages over it"},
        "group norm over channels that stand last",
    ),
    Case(
        ("layer_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.LayerNorm(8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "layer_norm", ("n.weight", 0): "layer_norm"},
    ),
    Case(
        ("rms_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.RMSNorm(8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "rms_norm"},
    ),
]

CONSUMERS = [
    over_channels("softmax", lambda x: x.softmax(-1)),
    over_channels("log_softmax", lambda x: x.log_softmax(1)),
    over_channels("_softmax", lambda x: aten._softmax(x, -1, False)),
    over_channels("_log_softmax", lambda x: aten._log_softmax(x, -1, False)),
    over_channels("cumsum", lambda x: x.cumsum(1)),
    over_channels("flip", lambda x: x.flip(1)),
    over_channels("roll", lambda x: x.roll(1, 1)),
    over_channels("roll", lambda x: x.roll(1)),
    *(over_channels(op, lambda x, op=op: getattr(aten, op)(x, 1, True) + x) for op in ("argmax", "argmin")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)(1, keepdim=True) + x) for op in ("mean", "sum", "amax", "amin")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)(1, keepdim=True) + x) for op in ("var", "std", "logsumexp", "prod")),
    *(over_channels(op, lambda x, op=op: getattr(x > 0, op)(1, keepdim=True) + x) for op in ("any", "all")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)() + x) for op in ("mean", "sum", "max", "min", "median")),
    *(
        over_channels(op, lambda x, op=op: getattr(torch, op)(x, 1, keepdim=True)[0] + x)
        for op in ("max", "min", "median", "mode")
    ),
    *(over_channels(op, lambda x, op=op: getattr(torch, op)(x, 1)[0] + x) for op in ("sort", "cummax", "cummin")),
    *(over_channels(op, lambda x, op=op: getattr(torch, op)(x, 8, 1)[0] + x) for op in ("topk",)),
    over_channels("kthvalue", lambda x: torch.kthvalue(x, 3, 1, keepdim=True)[0] + x),
    over_channels("aminmax", lambda x: torch.aminmax(x, dim=1, keepdim=True)[0] + x),
    *(over_channels(op, lambda x, op=op: getattr(torch, op)(x, 1, keepdim=True)[0] + x) for op in ("var_mean", "std_mean")),
    over_channels("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, 2, 1, keepdim=True) + x),
    over_channels("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, 2) + x),
    over_channels("norm", lambda x: aten.norm(x, 2, [1], True) + x),
    over_channels("norm", lambda x: aten.norm(x, 2) + x),
    beside("softmax", lambda x: x.softmax(1)),
    beside("log_softmax", lambda x: x.log_softmax(1)),
    beside("_softmax", lambda x: aten._softmax(x, 1, False)),
    beside("_log_softmax", lambda x: aten._log_softmax(x, 1, False)),
    beside("cumsum", lambda x: x.cumsum(1)),
    beside("flip", lambda x: x.flip(1)),
    beside("roll", lambda x: x.roll(1, 1)),
    *(beside(op, lambda x, op=op: getattr(aten, op)(x, 1).double()) for op in ("argmax", "argmin")),
    *(
        beside(op, lambda x, op=op: getattr(x, op)(1))
        for op in ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod")
    ),
    *(beside(op, lambda x, op=op: getattr(x > 0, op)(1).double()) for op in ("any", "all")),
    *(
        beside(op, lambda x, op=op: getattr(torch, op)(x, 1)[0])
        for op in ("max", "min", "median", "mode", "sort", "cummax", "cummin")
    ),
    *(beside(op, lambda x, op=op: getattr(torch, op)(x, 2, 1)[0]) for op in ("topk", "kthvalue")),
    beside("aminmax", lambda x: torch.aminmax(x, dim=1)[1]),
    *(beside(op, lambda x, op=op: getattr(torch, op)(x, 1)[0]) for op in ("var_mean", "std_mean")),
    beside("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, 2, 1)),
    beside("norm", lambda x: aten.norm(x, 2, [1])),
    around("max", lambda x: torch.max(x, x.exp() - 1)),
    around("min", lambda x: torch.min(x, x.exp() - 1)),
]

ATTENTION = [
    Case(
        ("scaled_dot_product_attention",),
        sdpa,
        keys(),
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("v.weight", 0): 2, ("o.weight", 1): 2},
    ),
    Case(
        ("scaled_dot_product_attention",),
        sdpa_masked,
        lambda: {**keys()(), "mask": nn.Parameter(torch.randn(2, 5, 5))},
        (2, 5, 6),
        {("q.weight", 0): 2, ("mask", 0): 2},
        {("mask", 1): "runs over it", ("mask", 2): "runs over it"},
        "attention with a learnt bias",
    ),
    Case(
        ("scaled_dot_product_attention",),
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        keys(),
        (2, 5, 6),
        {("v.weight", 0): 8, ("o.weight", 1): 8},
        {("q.weight", 0): "width of a head"},
        "attention with one head",
    ),
    Case(
        ("scaled_dot_product_attention",),
        grouped_queries,
        grouped_layers,
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("v.weight", 0): 2, ("o.weight", 1): 2},
        {},
        "grouped queries",
    ),
    Case(
        ("repeat_interleave",),
        repeated_keys,
        grouped_layers,
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("o.weight", 1): 2},
    ),
    Case(("matmul", "softmax"), by_hand, keys(), (2, 5, 6), {("q.weight", 0): 2, ("v.weight", 0): 2}, {}, "attention by hand"),
]

SPATIAL = [
    *(on_images(f"max_pool{d}d", lambda x, d=d: getattr(F, f"max_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(on_images(f"avg_pool{d}d", lambda x, d=d: getattr(F, f"avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(on_images(f"adaptive_avg_pool{d}d", lambda x, d=d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(
        on_images(f"adaptive_max_pool{d}d", lambda x, d=d: getattr(aten, f"adaptive_max_pool{d}d")(x, [2] * d)[0], d)
        for d in (1, 2, 3)
    ),
    on_images("max_pool2d_with_indices", lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0]),
    *(on_images(f"upsample_nearest{d}d", lambda x: F.interpolate(x, scale_factor=2), d) for d in (1, 2, 3)),
    on_images("_upsample_nearest_exact2d", lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    on_images("upsample_linear1d", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), 1),
    on_images("upsample_bilinear2d", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    on_images("upsample_bicubic2d", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    on_images("upsample_trilinear3d", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), 3),
    on_images("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, (4, 4), mode="bilinear", antialias=True)),
    on_images("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, (4, 4), mode="bicubic", antialias=True)),
    on_images("reflection_pad1d", lambda x: aten.reflection_pad1d(x, [1, 1]), 1),
    on_images("reflection_pad2d", lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1])),
    on_images("replication_pad2d", lambda x: aten.replication_pad2d(x, [1, 1, 1, 1])),
    on_images("pad", lambda x: F.pad(x, (1, 1, 2, 2))),
    on_images("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 1], 0.0)),
    on_images("channel_shuffle", lambda x: aten.channel_shuffle(x, 1)),
    over_channels("avg_pool1d", lambda x: F.avg_pool1d(x.unsqueeze(1), 2).squeeze(1), 4),
    over_channels("max_pool1d", lambda x: F.max_pool1d(x.unsqueeze(1), 2).squeeze(1), 4),
    over_channels("upsample_nearest1d", lambda x: F.interpolate(x.unsqueeze(1), scale_factor=0.5).squeeze(1), 4),
    over_channels("pad", lambda x: F.pad(x, (0, 1)), 9),
    *(
        Case(
            (op,),
            lambda m, x, op=op: m.b(getattr(aten, op)(m.a(x), 2)),
            convs(),
            (2, 3, 4, 4),
            {("a.weight", 0): 4, ("b.weight", 1): 4},
        )
        for op in ("channel_shuffle", "native_channel_shuffle")
    ),
    Case(
        ("pixel_shuffle",),
        lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)),
        convs(back=2),
        (2, 3, 4, 4),
        {("a.weight", 0): 2, ("b.weight", 1): 2},
    ),
    Case(
        ("pixel_unshuffle",),
        lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)),
        convs(back=32),
        (2, 3, 4, 4),
        {("a.weight", 0): 8, ("b.weight", 1): 8},
    ),
]


def gated(parts: Any) -> Tensor:
    """One half lets the other through."""
    y: Tensor = parts[0] * parts[1].sigmoid()
    return y


def to_last(op: str, f: Callable[[Tensor], Tensor], dims: int = 2) -> Case:
    layers = lambda: {"a": convs(dims)()["a"], "l": nn.Linear(8, 3)}  # noqa: E731
    goes = {("a.weight", 0): 8, ("l.weight", 1): 8}
    return Case((op,), lambda m, x: m.l(f(m.a(x))), layers, (2, 3, *(4, 5, 2)[:dims]), goes)


MOVED = [
    to_last("permute", lambda x: x.permute(0, 2, 3, 1)),
    to_last("permute", lambda x: x.permute(0, -1, -2, -3)),
    to_last("movedim", lambda x: x.movedim(1, -1)),
    to_last("movedim", lambda x: x.movedim((1, 2), (-1, 1))),
    *(to_last(op, lambda x, op=op: getattr(x, op)(1, -1), 1) for op in ("transpose", "swapaxes", "swapdims")),
    to_last("mT", aten.mT, 1),
    to_last("numpy_T", lambda x: aten.numpy_T(aten.numpy_T(x).permute(2, 1, 0)).permute(2, 0, 1), 1),
    Case(("t",), lambda m, x: m.b(m.a(x).t().t()), linears(), (4, 6), both),
    beside("unsqueeze", lambda x: x.unsqueeze(-1).unsqueeze(0).sum((0, -1))),
    beside("squeeze", lambda x: x.unsqueeze(1).squeeze(1)),
    beside("squeeze", lambda x: x.unsqueeze(0).squeeze()),
    beside("expand", lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1)),
    beside("broadcast_to", lambda x: x.unsqueeze(1).broadcast_to(x.shape[0], 3, *x.shape[1:])),
    beside("expand_as", lambda x: x[:, :1].expand_as(x)),
    Case(("repeat",), lambda m, x: m.b(m.a(x).repeat(1, 2)), linears(back=16), (4, 6), both),
    Case(("tile",), lambda m, x: m.b(m.a(x).tile(2)), linears(back=16), (4, 6), both),
    Case(("repeat_interleave",), lambda m, x: m.b(m.a(x).repeat_interleave(2, 1)), linears(back=16), (4, 6), both),
    Case(
        ("repeat_interleave",),
        lambda m, x: m.b(m.a(x).repeat_interleave(m.n, 1)),
        lambda: {**linears(back=16)(), "n": torch.full((8,), 2)},
        (4, 6),
        {},
        {("a.weight", 0): "not understood"},
        "repeated by a tensor",
    ),
    *(
        Case(
            (op,),
            lambda m, x, op=op: m.b(getattr(torch, op)([m.a(x), m.c(x)], 1)),
            lambda: {**linears(back=13)(), "c": nn.Linear(6, 5)},
            (4, 6),
            {**one, ("c.weight", 0): 5},
        )
        for op in ("cat", "concat", "concatenate")
    ),
    Case(("cat",), lambda m, x: m.b(torch.cat([m.a(x), x], 1)), linears(back=14), (4, 6), one, {}, "cat with the input"),
    Case(
        ("stack",),
        lambda m, x: m.b(torch.stack([m.a(x), m.c(x)], 1)).sum(1),
        lambda: {**linears()(), "c": nn.Linear(6, 8)},
        (4, 6),
        {**both, ("c.weight", 0): 8},
    ),
    *(
        Case(
            (op,),
            lambda m, x, op=op, size=size: m.b(gated(getattr(aten, op)(m.a(x), size, 1))),
            linears(back=4),
            (4, 6),
            {("a.weight", 0): 4, ("b.weight", 1): 4},
        )
        for op, size in (("chunk", 2), ("unsafe_chunk", 2), ("tensor_split", 2))
    ),
    *(
        Case(
            (op,),
            lambda m, x, op=op: m.b(gated(getattr(aten, op)(y := m.a(x), y.shape[1] // 2, 1))),
            linears(back=4),
            (4, 6),
            {("a.weight", 0): 4, ("b.weight", 1): 4},
        )
        for op in ("split", "unsafe_split")
    ),
    Case(
        ("split_with_sizes",),
        lambda m, x: m.b(aten.split_with_sizes(m.a(x), [5, 3], 1)[0]),
        linears(back=5),
        (4, 6),
        {},
        {("a.weight", 0): "fixed places"},
    ),
    Case(("unbind",), lambda m, x: m.b(sum(m.a(x).unbind(1))), linears(), (2, 4, 6), both),
    Case(
        ("unbind",),
        lambda m, x: sum(m.a(x).unbind(1)),
        lambda: {"a": nn.Linear(6, 8)},
        (4, 6),
        {},
        {("a.weight", 0): "takes it apart"},
        "unbind over channels",
    ),
    beside("slice", lambda x: x[:, 1:3]),
    beside("select", lambda x: x[:, 0]),
    beside("index", lambda x: x[:, torch.tensor([0, 2])]),
    over_channels("slice", lambda x: x[:, 2:6], 4),
    over_channels("select", lambda x: x[:, 1].unsqueeze(1), 1),
    over_channels("index", lambda x: x[:, torch.tensor([1, 0])], 2),
    Case(("glu",), lambda m, x: m.b(F.glu(m.a(x))), linears(back=4), (4, 6), {("a.weight", 0): 4, ("b.weight", 1): 4}),
    Case(
        ("flatten",),
        lambda m, x: m.l(m.a(x).flatten(1)),
        lambda: {"a": convs()()["a"], "l": nn.Linear(72, 3)},
        (2, 3, 3, 3),
        {**one, ("l.weight", 1): 8},
    ),
    Case(
        ("view",),
        lambda m, x: m.l((y := m.a(x)).view(y.shape[0], -1)),
        lambda: {"a": convs()()["a"], "l": nn.Linear(72, 3)},
        (2, 3, 3, 3),
        {**one, ("l.weight", 1): 8},
    ),
    Case(
        ("reshape",),
        lambda m, x: m.l(m.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
        lambda: {"a": convs()()["a"], "l": nn.Linear(72, 3)},
        (2, 3, 3, 3),
        {**one, ("l.weight", 1): 8},
    ),
    Case(
        ("unflatten",),
        lambda m, x: m.b(m.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1)),
        linears(),
        (4, 6),
        {("a.weight", 0): 4, ("b.weight", 1): 4},
        {},
        "channels shuffled by hand",
    ),
    Case(("_unsafe_view",), lambda m, x: m.b(aten._unsafe_view(m.a(x), [x.shape[0] * 4, -1])), linears(), (2, 4, 6), both),
    Case(("view_as",), lambda m, x: m.b((y := m.a(x)).flatten(0, 1).view_as(y)), linears(), (2, 4, 6), both),
    Case(("reshape_as",), lambda m, x: m.b((y := m.a(x)).flatten(0, 1).reshape_as(y)), linears(), (2, 4, 6), both),
]


def recurrent(kind: type[nn.RNNBase], **how: Any) -> Case:
    directions = 2 if how.get("bidirectional") else 1
    layers = lambda: {"a": nn.Linear(6, 5), "r": kind(5, 8, batch_first=True, **how), "b": nn.Linear(8 * directions, 3)}  # noqa: E731
    op = {nn.LSTM: "lstm", nn.GRU: "gru"}.get(kind, f"rnn_{how.get('nonlinearity', 'tanh')}")
    goes = {("a.weight", 0): 5, ("r.weight_ih_l0", 1): 5, ("r.weight_hh_l0", 1): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(m.r(m.a(x))[0]), layers, (2, 4, 6), goes, {}, f"{op} {how}")


def with_states(m: Any, x: Tensor) -> Tensor:
    state = torch.ones(1, x.shape[0], 8, dtype=x.dtype).cumsum(2)
    return m.b(m.r(m.a(x), (state, state))[0])


RECURRENT = [
    *(
        recurrent(kind, **how)
        for kind in (nn.LSTM, nn.GRU)
        for how in ({}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False})
    ),
    recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    recurrent(nn.RNN),
    recurrent(nn.RNN, nonlinearity="relu"),
    Case(
        ("lstm",),
        lambda m, x: m.b(m.r(m.a(x), (m.s + x[None, :, 0, :1] * 0, m.s + x[None, :, 0, :1] * 0))[0]),
        lambda: {
            "a": nn.Linear(6, 5),
            "r": nn.LSTM(5, 8, batch_first=True),
            "b": nn.Linear(8, 3),
            "s": nn.Parameter(torch.randn(1, 1, 8)),
        },
        (2, 4, 6),
        {("r.weight_hh_l0", 1): 8, ("s", 2): 8},
        {},
        "learnt states",
    ),
    Case(
        ("lstm",),
        with_states,
        lambda: {"a": nn.Linear(6, 5), "r": nn.LSTM(5, 8, batch_first=True), "b": nn.Linear(8, 3)},
        (2, 4, 6),
        {("a.weight", 0): 5},
        {("r.weight_hh_l0", 1): "given its states"},
        "fixed states",
    ),
    Case(
        ("lstm",),
        lambda m, x: m.b(m.r(m.a(x))[0]),
        lambda: {"a": nn.Linear(6, 5), "r": nn.LSTM(5, 8, proj_size=4), "b": nn.Linear(4, 3)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "not understood", ("r.weight_hh_l0", 0): "not understood"},
        "lstm with projections",
    ),
]

OTHERS = [
    Case(
        (),
        lambda m, x: m.b(m.a(x)) + x,
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(8, 6)},
        (4, 6),
        both,
        {("b.weight", 0): "add"},
        "residual with the input",
    ),
    Case(
        (),
        lambda m, x: m.b(m.a(x) + m.c(x)),
        lambda: {**linears()(), "c": nn.Linear(6, 8)},
        (4, 6),
        {**both, ("c.weight", 0): 8},
        {},
        "residual of two layers",
    ),
    Case(
        (),
        lambda m, x: m.b(torch.special.entr(m.a(x).sigmoid())),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "special_entr"},
        "unknown operation",
    ),
    Case(
        (),
        lambda m, x: m.b((y := m.a(x)) * m.f(m.e(y.mean((2, 3), keepdim=True)).relu()).sigmoid()),
        convs(e=lambda: nn.Conv2d(8, 4, 1), f=lambda: nn.Conv2d(4, 8, 1)),
        (2, 3, 4, 4),
        {**both, ("e.weight", 0): 4, ("f.weight", 0): 8, ("f.weight", 1): 4},
        {},
        "squeeze and excitation",
    ),
    Case(
        (),
        lambda m, x: m.b(torch.cat([y := m.a(x), m.c(y)], 1)),
        convs(back=13, c=lambda: nn.Conv2d(8, 5, 1)),
        (2, 3, 4, 4),
        {**one, ("c.weight", 0): 5, ("c.weight", 1): 8},
        {},
        "dense block",
    ),
    Case((), written, linears(), (4, 6), both, {("b.weight", 0): ""}, "an output written into a slice"),
    Case(
        (),
        lambda m, x: m.b(m.a(x)).log_softmax(1),
        linears(),
        (4, 6),
        both,
        {("b.weight", 0): "log_softmax"},
        "head, log-softmax",
    ),
    Case((), lambda m, x: m.b(m.a(x)).view(-1), linears(), (4, 6), both, {("b.weight", 0): "output"}, "head, view"),
    Case(
        (),
        lambda m, x: m.b(m.a(x)) * m.s,
        lambda: {**linears()(), "s": nn.Parameter(torch.ones(3))},
        (4, 6),
        both,
        {("b.weight", 0): "output", ("s", 0): "output"},
        "head, scale",
    ),
    Case((), lambda m, x: {"y": [m.b(m.a(x))]}, linears(), (4, 6), both, {("b.weight", 0): "output"}, "outputs in a dict"),
    Case(
        (), lambda m, x: m.b(m.a(x)).flatten(1), convs(), (2, 3, 4, 4), both, {("b.weight", 0): "output"}, "head, convolution"
    ),
]

CASES = [*ELEMENTWISE, *CREATED, *WEIGHTS, *NORMS, *CONSUMERS, *ATTENTION, *SPATIAL, *MOVED, *RECURRENT, *OTHERS]


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(net(x))
    return [y.clone() for y in found]


def test_every_rule_has_a_case() -> None:
    covered = {op for case in CASES for op in case.ops}
    assert {name for name in RULES if name not in covered and name.removesuffix("_") not in covered} == set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    net, x = case.net(), case.inputs()
    graph = channel_graph(net, (x,))
    channels = {place: group.channels for group in graph.groups for place in group.places}
    assert {place: channels.get(place) for place in case.goes} == case.goes
    for place, reason in case.stays.items():
        assert reason in graph.pinned[place]

    generator = np.random.default_rng(0)
    kept = [generator.permutation(np.arange(g.channels) % 2 == 0) for g in graph.groups]
    mask_channels_(net, graph, kept)
    probes = [x, torch.cat([x, x.flip(0)])] if x.dim() != 3 else [x]
    wanted = [y for probe in probes for y in outputs(net, probe)]
    sizes = {n: list(t.shape) for n, t in tensors(net).items()}
    for group, keep in zip(graph.groups, kept, strict=True):
        for (name, d), indices in group.places.items():
            sizes[name][d] -= int((~keep).sum()) * indices.shape[1]

    assert remove(net, x).refused == {}
    assert {n: list(t.shape) for n, t in tensors(net).items()} == sizes
    found = [y for probe in probes for y in outputs(net, probe)]
    for before, after in zip(wanted, found, strict=True):
        assert before.shape == after.shape
        limit = 1e-9 if before.dtype == torch.float64 else 1e-5
        assert float((before - after).abs().max()) <= limit * max(1.0, float(before.abs().max()))


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    net, x = case.net(), case.inputs()
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=False)
    names = {str(node.target).split(".")[1].removesuffix("_") for node in program.graph.nodes if "." in str(node.target)}
    assert {op.removesuffix("_") if op != "_to_copy" else op for op in case.ops} <= names


def test_a_rule_can_be_added() -> None:
    case = next(c for c in CASES if c.name == "unknown operation")
    before = dict(RULES)
    try:
        rule("special_entr")(lambda trace, node, x: x)
        graph = channel_graph(case.net(), (case.inputs(),))
    finally:
        for name in RULES.keys() - before.keys():
            del RULES[name]
    assert ("a.weight", 0) in {place for group in graph.groups for place in group.places}


def test_a_value_has_a_dimension_for_each_size() -> None:
    with pytest.raises(AssertionError):
        Value((2, 3), (FIXED,))


def test_choices_default_to_the_first_way() -> None:
    trace = Trace({"split": 1})
    assert trace.choose("split", 2) == 1
    assert trace.choose("groups", 3) == 0
    assert trace.options == {"split": 2, "groups": 3}
