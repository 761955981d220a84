from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graph.rules.cases import Case, both, goes_as_it_says, linears, one, stands_in_the_program

CASES = [
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
        {("a.weight", 0): 8, ("b.weight", 0): 8},
        {},
        "einsum of activations",
    ),
    Case(
        ("einsum",),
        lambda m, x: m.b(torch.einsum("btc,cd->btd", m.a(x), m.w)),
        lambda: {**linears(back=5)(), "w": nn.Parameter(torch.randn(8, 5))},
        (1, 4, 6),
        {**one, ("w", 0): 8, ("w", 1): 5},
        {},
        "einsum of one sample",
    ),
    *(
        Case(
            ("einsum",),
            lambda m, x, equation=equation: m.b(torch.einsum(equation, m.a(x), m.w)),
            lambda shape=shape, back=back: {**linears(back=back)(), "w": nn.Parameter(torch.randn(shape))},
            (size, 4, 6),
            {**one, ("b.weight", 1): back, **goes},
            {},
            f"einsum {equation} of {size} by {shape}",
        )
        for equation, shape, size, back, goes in (
            ("...c,dc->...d", (5, 8), 2, 5, {("w", 0): 5, ("w", 1): 8}),
            ("...c,dc->...d", (5, 8), 1, 5, {("w", 0): 5, ("w", 1): 8}),
            ("...tc,...cd->...td", (1, 8, 5), 2, 5, {("w", 1): 8, ("w", 2): 5}),
            ("b...c, cd", (8, 5), 2, 5, {("w", 0): 8, ("w", 1): 5}),
            ("btc,btc->btc", (1, 1, 8), 2, 8, {("w", 2): 8}),
            ("btc,btc->btc", (1, 4, 8), 1, 8, {("w", 2): 8}),
            ("btc,uc->btc", (1, 8), 2, 8, {("w", 1): 8}),
            ("btc,cc->btc", (8, 8), 2, 8, {("w", 0): 8, ("w", 1): 8}),
        )
    ),
    Case(
        ("einsum",),
        lambda m, x: m.b(torch.einsum("bqd,bkd,bkc->bqc", m.q, m.k(x), m.a(x))),
        lambda: {**linears()(), "k": nn.Linear(6, 5), "q": nn.Parameter(torch.randn(1, 3, 5))},
        (2, 4, 6),
        {**both, ("k.weight", 0): 5, ("q", 2): 5},
        {},
        "einsum of learnt queries of one sample",
    ),
    Case(
        ("einsum",),
        lambda m, x: torch.einsum("btc,btu->bt", m.a(x), m.w),
        lambda: {"a": nn.Linear(6, 8), "w": nn.Parameter(torch.randn(1, 4, 1))},
        (2, 4, 6),
        one,
        {},
        "einsum whose weight does not read the channels",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


def test_the_operation_stands_in_the_program() -> None:
    stands_in_the_program(CASES[0])
