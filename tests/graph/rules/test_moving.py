from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.graph.rules.cases import Case, aten, beside, both, convs, goes_as_it_says, linears, stands_in_the_program


def to_last(op: str, f: Callable[[Tensor], Tensor], dims: int = 2) -> Case:
    layers = lambda: {"a": convs(dims)()["a"], "l": nn.Linear(8, 3)}  # noqa: E731
    goes = {("a.weight", 0): 8, ("l.weight", 1): 8}
    return Case((op,), lambda m, x: m.l(f(m.a(x))), layers, (2, 3, *(4, 5, 2)[:dims]), goes)


CASES = [
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
    beside("broadcast_tensors", lambda x: torch.broadcast_tensors(x, x[:, :1].exp())[0]),
    beside("unfold", lambda x: x.unfold(1, 2, 1).sum(-1)),
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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
