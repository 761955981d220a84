from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.graph.channels import channel_graph
from tests.graph.rules.cases import Case, both, convs, goes_as_it_says, linears, stands_in_the_program

CASES = [
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
        {**both, ("n.weight", 0): 8},
    ),
    Case(
        ("layer_norm",),
        lambda m, x: m.b(m.n(m.a(x).sigmoid())),
        lambda: {**linears()(), "n": nn.LayerNorm(8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "not zero where its channel is silent", ("n.weight", 0): "layer_norm"},
        "layer norm of what is not zero",
    ),
    Case(
        ("native_layer_norm",),
        lambda m, x: m.b(torch.native_layer_norm(m.a(x), (8,), m.n.weight, m.n.bias, 1e-5)[0]),
        lambda: {**linears()(), "n": nn.LayerNorm(8)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "layer_norm", ("n.weight", 0): "layer_norm"},
        "layer norm outside of a module that could be told",
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)


@pytest.mark.parametrize(
    ("exact", "channels", "rescaled"),
    [(True, [[0, 1, 2, 3], [4, 5, 6, 7]], []), (False, [[0, 4], [1, 5], [2, 6], [3, 7]], ["1.weight"])],
)
def test_the_same_channel_of_each_group_goes_where_outputs_may_move(
    exact: bool, channels: list[list[int]], rescaled: list[str]
) -> None:
    """That is finer than whole groups, and moves all averages, for which the norm's weight makes up."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    graph = channel_graph(net, (torch.zeros(2, 3, 6, 6),), exact)
    (group,) = graph.groups
    assert [group.places[place].tolist() for place in (("0.weight", 0), ("1.weight", 0), ("2.weight", 1))] == [channels] * 3
    assert sorted(graph.rescaled) == rescaled
