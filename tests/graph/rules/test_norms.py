from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import silent_channels
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
    *(
        Case(
            ("batch_norm",),
            lambda m, x, shift=shift: m.b((y := F.batch_norm(m.a(x), None, None, m.g.exp(), shift(m), True)) / y.norm()),
            lambda: {**linears()(), "g": nn.Parameter(torch.randn(8))},
            (4, 6),
            both if name == "zeros" else {},
            {} if name == "zeros" else {("a.weight", 0): "not zero where its channel is silent"},
            f"batch norm of {name}",
        )
        for name, shift in (("zeros", lambda m: None), ("others", lambda m: m.g.cos()))
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
        {**both, ("n.weight", 0): 8},
        {},
        "layer norm in code of one's own",
    ),
    Case(
        ("rms_norm",),
        lambda m, x: m.b(m.n(m.a(x))),
        lambda: {**linears()(), "n": nn.RMSNorm(8)},
        (2, 4, 6),
        {**both, ("n.weight", 0): 8},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)


@pytest.mark.parametrize("exact", [True, False])
def test_the_same_channel_of_each_group_goes_where_it_is_zero(exact: bool) -> None:
    """That is finer than whole groups; the norm is told how many channels there were, and its weight stays."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    graph = channel_graph(net, (torch.zeros(2, 3, 6, 6),), exact)
    (group,) = graph.groups
    channels = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [group.places[place].tolist() for place in (("0.weight", 0), ("1.weight", 0), ("2.weight", 1))] == [channels] * 3
    assert not graph.rescaled
    assert [(name, size) for name, (size, _) in graph.counted.items()] == [("1", 4)]


def test_a_module_that_averages_over_two_dimensions_keeps_both() -> None:
    """`Counting` tells averages by the module they are in, so that one over something else would be changed as well."""

    class Two(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.a, self.b, self.both = nn.Linear(6, 8), nn.Linear(8, 3), both

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x * x.mean(-1, keepdim=True)
            return self.b(x * x.mean(1, keepdim=True) if self.both else x)

    goes, stays = (channel_graph(Two(both).eval(), (torch.zeros(2, 4, 6),)) for both in (False, True))
    assert [group.channels for group in goes.groups] == [8]
    assert "over other dimensions too" in stays.pinned["a.weight", 0]


def test_a_norm_without_scale_needs_readers_and_makers_to_be_zero() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight[:2], net[0].bias[:2] = 0.0, 0.0
        net[2].weight[:, 1:3] = 0.0
    graph = channel_graph(net, (torch.randn(2, 3),))
    assert [silent.tolist() for silent in silent_channels(net, graph)] == [[False, True, False, False]]
