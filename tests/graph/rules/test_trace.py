from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.labels import FIXED
from fasterai.graph.rules import RULES, Trace, Value, rule
from tests.graph.rules import (
    test_attention,
    test_consumers,
    test_einsum,
    test_elementwise,
    test_moving,
    test_norms,
    test_parts,
    test_recurrent,
    test_reshaping,
    test_spatial,
    test_spectral,
    test_values,
    test_weights,
    test_writing,
)
from tests.graph.rules.cases import Case, both, convs, goes_as_it_says, linears, one


def written(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
    out[:] = m.b(m.a(x))
    return out


CASES = [
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

ELSEWHERE = [
    test_elementwise.CASES,
    test_weights.CASES,
    test_writing.CASES,
    test_einsum.CASES,
    test_norms.CASES,
    test_consumers.CASES,
    test_attention.CASES,
    test_spatial.CASES,
    test_spectral.CASES,
    test_moving.CASES,
    test_parts.CASES,
    test_reshaping.CASES,
    test_recurrent.CASES,
    test_values.CASES,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


def test_every_rule_has_a_case() -> None:
    covered = {op for cases in [CASES, *ELSEWHERE] for case in cases for op in case.ops}
    assert {name for name in RULES if name not in covered and name.removesuffix("_") not in covered} == set()


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
