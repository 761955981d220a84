from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from tests.graph.rules.cases import (
    Case,
    aten,
    both,
    convs,
    goes_as_it_says,
    linears,
    one,
    stands_in_the_program,
)


def blend_of(net, x):
    return torch.einsum("be,eio->bio", net.g(x).softmax(-1), net.w)


both_made = {("a.weight", 0): 8, ("b.weight", 0): 8}


def slides(f, slide, goes, stays):
    """A convolution along channels, whose result is a gate of them."""
    run = lambda m, x: m.b((y := f(m.a(x))) * m.s(y[:, None])[:, 0].sigmoid())  # noqa: E731
    return Case(("conv1d",), run, lambda: {**linears()(), "s": slide()}, (4, 6), goes, stays, "conv along channels", True)


def rows(x: Tensor) -> Tensor:
    return (x[:, :2].abs() * 3).long() % 5


def bags(op: Any, m: Any, x: Tensor) -> Tensor:
    return op(m.e.weight, rows(x).ravel(), torch.arange(0, 2 * len(x), 2))[0]


CASES = [
    slides(torch.tanh, lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False), both, {}),
    slides(torch.tanh, lambda: nn.Sequential(nn.Conv1d(1, 3, 1), nn.Tanh(), nn.Conv1d(3, 1, 1)), both, {}),
    slides(torch.sigmoid, lambda: nn.Conv1d(1, 1, 3, padding=1), {}, {("a.weight", 0): "conv1d computes across it"}),
    Case(
        ("conv1d",),
        lambda m, x: m.b(m.s(m.a(x)[:, None])[:, 0]),
        lambda: {**linears(back=4)(), "s": nn.Conv1d(1, 1, 3, 2, 1, bias=False)},
        (4, 6),
        {},
        {("a.weight", 0): "computes across it"},
        "conv along channels by steps",
        True,
    ),
    Case(
        ("conv1d",),
        lambda m, x: m.b(m.s(m.a(x)[:, None])[:, 0]),
        lambda: {**linears(back=6)(), "s": nn.Conv1d(1, 1, 3)},
        (4, 6),
        {("a.weight", 0): 6, ("b.weight", 1): 6},
        {},
        "conv along channels without an edge",
        True,
    ),
    Case(("linear",), lambda m, x: m.b(m.a(x)), linears(), (4, 6), both, {("b.weight", 0): "output", ("a.weight", 1): "fixed"}),
    Case(
        ("linear", "sum"),
        lambda m, x: m.b(m.a(x)) + F.linear(m.a(x).transpose(1, 2), m.c, m.d).sum(1, keepdim=True),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(3, 4)), "d": nn.Parameter(torch.randn(3))},
        (2, 4, 6),
        {},
        {("a.weight", 0): "it is not zero where its channel is silent"},
        "rows of zeros with a bias",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c)),
        lambda: {**linears()(), "c": torch.randn(8, 8)},
        (4, 6),
        {**one, ("c", 1): 8},
        {},
        "linear by a buffer",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c.tanh())),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(8, 8))},
        (4, 6),
        {**one, ("b.weight", 1): 8, ("c", 1): 8},
        {},
        "linear by a weight worked out",
    ),
    Case(
        ("linear",),
        lambda m, x: m.b(F.linear(m.a(x), m.c.softmax(0))),
        lambda: {**linears()(), "c": nn.Parameter(torch.randn(8, 8))},
        (4, 6),
        {**one, ("c", 1): 8},
        {},
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
        lambda m, x: m.b(m.g(m.a(x).unflatten(1, (4, 2)).softmax(2).flatten(1, 2))),
        convs(g=lambda: nn.Conv2d(8, 8, 3, groups=4)),
        (2, 3, 6, 6),
        {("a.weight", 0): 4, ("g.weight", 0): 4, ("b.weight", 1): 4},
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
        {**one, ("c", 1): 8},
        {},
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
    *(
        Case(
            ("_weight_norm",),
            lambda m, x, dim=dim: m.b(F.linear(m.a(x).relu(), aten._weight_norm(m.v, m.g, dim))),
            lambda dim=dim, lengths=lengths: {
                **linears(back=5)(),
                "v": nn.Parameter(torch.rand(5, 8) + 0.1),
                "g": nn.Parameter(torch.rand(lengths)),
            },
            (4, 6),
            {**one, ("b.weight", 1): 5, **goes},
            {},
            f"weight norm along {dim}",
        )
        for dim, lengths, goes in (
            (0, (5, 1), {("g", 0): 5, ("v", 1): 8}),
            (1, (1, 8), {("g", 1): 8, ("v", 0): 5}),
            (-1, (), {("v", 0): 5, ("v", 1): 8}),
        )
    ),
    Case(
        ("_weight_norm",),
        lambda m, x: m.b(F.linear(m.a(x), aten._weight_norm(m.v.tanh(), m.g, 0))),
        lambda: {**linears()(), "v": nn.Parameter(torch.rand(8, 8)), "g": nn.Parameter(torch.rand(8, 1))},
        (4, 6),
        {},
        {("a.weight", 0): "fixed size"},
        "weight norm of rows that are worked out",
    ),
    Case(
        ("embedding",),
        lambda m, x: m.b(m.e(x.abs().long() % 7)),
        lambda: {"e": nn.Embedding(7, 8), "b": nn.Linear(8, 3)},
        (4, 5),
        {("e.weight", 1): 8, ("b.weight", 1): 8},
        {("e.weight", 0): "looks rows up by number"},
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
    Case(
        ("bilinear",),
        lambda m, x: m.b(m.c(m.a(x).relu(), m.d(x)).relu()),
        lambda: {**linears(back=5)(), "d": nn.Linear(6, 7), "c": nn.Bilinear(8, 7, 5)},
        (4, 6),
        {**one, ("d.weight", 0): 7, ("c.weight", 0): 5, ("c.weight", 1): 8, ("c.weight", 2): 7, ("b.weight", 1): 5},
    ),
    Case(
        ("mv",),
        lambda m, x: m.b(m.a(x) * torch.mv(m.a(x), m.v)[:, None]),
        lambda: {**linears()(), "v": nn.Parameter(torch.randn(8))},
        (4, 6),
        {**both, ("v", 0): 8},
    ),
    Case(
        ("dot", "vdot"),
        lambda m, x: m.b(m.a(x) * torch.dot(m.a(x)[0], m.v) * torch.vdot(m.a(x)[1], m.v)),
        lambda: {**linears()(), "v": nn.Parameter(torch.randn(8))},
        (4, 6),
        {**both, ("v", 0): 8},
    ),
    Case(
        ("outer", "ger"),
        lambda m, x: m.b(m.a(x) * torch.outer(x[:, 0], m.v) * torch.ger(x[:, 1], m.v)),
        lambda: {**linears()(), "v": nn.Parameter(torch.randn(8))},
        (4, 6),
        {**both, ("v", 0): 8},
    ),
    Case(
        ("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"),
        lambda m, x: m.b(
            m.a(x) + m.e(rows(x)) + bags(aten._embedding_bag, m, x) + bags(aten._embedding_bag_forward_only, m, x)
        ),
        lambda: {**linears()(), "e": nn.EmbeddingBag(5, 8, mode="sum")},
        (4, 6),
        {**both, ("e.weight", 1): 8},
        {("e.weight", 0): "looks rows up by number"},
    ),
    Case(("bmm",), lambda m, x: m.b(torch.bmm(x @ x.transpose(1, 2), m.a(x))), linears(), (2, 4, 6), both),
    Case(
        ("matmul",),
        lambda m, x: m.a(x) @ m.b(x).transpose(1, 2),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)},
        (2, 4, 6),
        both_made,
        {},
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
    *(
        Case(
            (op,),
            lambda m, x, blend=blend: m.b(torch.bmm(m.a(x)[:, None], blend(m.g(x).softmax(-1), m.w))[:, 0].relu()),
            lambda: {**linears(back=5)(), "g": nn.Linear(6, 3), "w": nn.Parameter(torch.randn(3, 8, 5))},
            (4, 6),
            {**one, ("w", 1): 8, ("w", 2): 5, ("b.weight", 1): 5},
            {("w", 0): "fixed size"},
            f"experts blended by {name}",
        )
        for op, name, blend in (
            ("einsum", "einsum", lambda g, w: torch.einsum("be,eio->bio", g, w)),
            ("einsum", "einsum of the transposed", lambda g, w: torch.einsum("be,eoi->boi", g, w.mT).mT),
            ("tensordot", "tensordot", lambda g, w: torch.tensordot(g, w, dims=([1], [0]))),
            ("mul", "a product and a sum", lambda g, w: (g[:, :, None, None] * w).sum(1)),
            ("multiply", "multiply", lambda g, w: torch.multiply(w, g[:, :, None, None]).sum(1)),
        )
    ),
    Case(
        ("mul",),
        lambda m, x: m.b(((m.a(x)[:, None, :, None] * m.w[None]).sum(2) * m.g(x).softmax(-1)[..., None]).sum(1)),
        lambda: {**linears(back=5)(), "g": nn.Linear(6, 3), "w": nn.Parameter(torch.randn(3, 8, 5))},
        (4, 6),
        {**one, ("w", 1): 8, ("w", 2): 5},
        {},
        "experts as a product and two sums",
    ),
    Case(
        ("index", "bmm"),
        lambda m, x: m.b(torch.bmm(m.a(x)[:, None], m.w[m.g(x).argmax(-1)])[:, 0].relu()),
        lambda: {**linears(back=5)(), "g": nn.Linear(6, 3), "w": nn.Parameter(torch.randn(3, 8, 5))},
        (4, 6),
        {**one, ("w", 1): 8, ("w", 2): 5},
        {("w", 0): "by number"},
        "experts looked up",
    ),
    Case(
        ("bmm",),
        lambda m, x: m.b(torch.bmm(m.a(x)[:, None], torch.bmm(blend_of(m, x), blend_of(m, x).mT))[:, 0]),
        lambda: {**linears()(), "g": nn.Linear(6, 3), "w": nn.Parameter(torch.randn(3, 8, 5))},
        (4, 6),
        {**one, ("w", 1): 8, ("w", 2): 5},
        {},
        "two blends contracted",
    ),
    Case(
        ("tensordot",),
        lambda m, x: torch.tensordot(m.a(x), m.b(x), dims=([1], [1])),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8)},
        (4, 6),
        both_made,
        {},
        "tensordot of activations",
    ),
    Case(
        ("tensordot",),
        lambda m, x: m.b(torch.tensordot(m.a(x), m.w, dims=([-1], [0])).relu()),
        lambda: {**linears(back=5)(), "w": nn.Parameter(torch.randn(8, 5))},
        (4, 6),
        {**one, ("w", 0): 8, ("w", 1): 5},
        {},
        "tensordot with a matrix",
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)


@pytest.mark.parametrize("case", [c for c in CASES if "experts" in c.name and ("w", 1) in c.goes], ids=str)
def test_a_stack_reads_its_inputs_and_makes_its_outputs(case: Case) -> None:
    readers = channel_graph(case.net(), (case.inputs(),)).readers
    assert ("w", 1) in readers and ("w", 2) not in readers


def test_rows_of_a_weight_norm_go_with_their_lengths_and_are_not_masked() -> None:
    """A row of zeros has no direction: 0 / 0."""
    case = next(c for c in CASES if c.name == "weight norm along 0")
    group = next(g for g in channel_graph(case.net(), (case.inputs(),)).groups if ("g", 0) in g.places)
    assert group.along.keys() == {("v", 0)} and ("v", 0) not in group.places
