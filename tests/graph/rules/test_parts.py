from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.rules.cases import (
    Case,
    aten,
    beside,
    both,
    goes_as_it_says,
    linears,
    one,
    over_channels,
    stands_in_the_program,
)


def gated(parts: Any) -> Tensor:
    """One half lets the other through."""
    y: Tensor = parts[0] * parts[1].sigmoid()
    return y


CASES = [
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
        {("b.weight", 1): 5},
        rewrite=True,
    ),
    Case(("unbind",), lambda m, x: m.b(sum(m.a(x).unbind(1))), linears(), (2, 4, 6), both),
    Case(
        ("unbind",),
        lambda m, x: sum(m.a(x).unbind(1)),
        lambda: {"a": nn.Linear(6, 8)},
        (4, 6),
        {},
        {("a.weight", 0): "splits it into single entries"},
        "unbind over channels",
    ),
    beside("slice", lambda x: x[:, 1:3]),
    beside("select", lambda x: x[:, 0]),
    beside("index", lambda x: x[:, torch.tensor([0, 2])]),
    Case(
        ("slice",),
        lambda m, x: m.b(m.a(x)[:, 2:6]),
        linears(back=4),
        (4, 6),
        {("b.weight", 1): 4},
        name="slice of channels",
        rewrite=True,
    ),
    over_channels("select", lambda x: x[:, 1].unsqueeze(1), 1),
    over_channels("index", lambda x: x[:, torch.tensor([1, 0])], 2),
    Case(("glu",), lambda m, x: m.b(F.glu(m.a(x))), linears(back=4), (4, 6), {("a.weight", 0): 4, ("b.weight", 1): 4}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
