from __future__ import annotations

import pytest
from torch import nn

from tests.graph.rules.cases import Case, aten, both, convs, goes_as_it_says, linears, one, stands_in_the_program

CASES = [
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
    Case(
        ("view",),
        lambda m, x: m.b(((y := m.a(x)).view(-1, 2, 4) * m.g(y).view(-1, 1, 2, 4).softmax(2)[:, 0]).sum(1)),
        lambda: {**linears(back=4)(), "g": nn.Linear(8, 8)},
        (4, 6),
        {("a.weight", 0): 4, ("g.weight", 0): 4, ("b.weight", 1): 4},
        {},
        "split attention",
    ),
    Case(("_unsafe_view",), lambda m, x: m.b(aten._unsafe_view(m.a(x), [x.shape[0] * 4, -1])), linears(), (2, 4, 6), both),
    Case(("view_as",), lambda m, x: m.b((y := m.a(x)).flatten(0, 1).view_as(y)), linears(), (2, 4, 6), both),
    Case(("reshape_as",), lambda m, x: m.b((y := m.a(x)).flatten(0, 1).reshape_as(y)), linears(), (2, 4, 6), both),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
