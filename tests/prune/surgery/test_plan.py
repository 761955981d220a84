from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, cut_normed, make_plan, tensors_of

X = torch.randn(2, 3, 6, 6)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def small_plan(net: nn.Module) -> Plan:
    return make_plan(net, channel_graph(net, (X,)), [np.array([True, False, True, True])])


def test_a_plan_says_what_stays_and_what_the_modules_become() -> None:
    plan = small_plan(small_net())
    assert {place: kept.tolist() for place, kept in plan.keep.items()} == {
        ("0.weight", 0): [0, 2, 3],
        ("0.bias", 0): [0, 2, 3],
        ("1.weight", 0): [0, 2, 3],
        ("1.bias", 0): [0, 2, 3],
        ("1.running_mean", 0): [0, 2, 3],
        ("1.running_var", 0): [0, 2, 3],
        ("3.weight", 1): [0, 2, 3],
    }
    assert plan.shapes["0.weight"] == (4, 3, 3, 3)
    assert plan.shape_after("0.weight") == (3, 3, 3, 3)
    assert plan.shape_after("3.weight") == (2, 3, 1, 1)
    assert set(plan.attributes) == {("0", "out_channels", 4, 3), ("1", "num_features", 4, 3), ("3", "in_channels", 4, 3)}
    assert dict(plan.slim) == {}


def test_a_plan_goes_through_json_and_can_be_replayed_on_a_fresh_model() -> None:
    net, fresh = small_net(), small_net()
    plan = small_plan(net)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    assert again.attributes == plan.attributes
    Surgery(net, plan)
    Surgery(fresh, again)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(X), net.eval()(X))


def test_sizes_that_are_tuples_go_through_json() -> None:
    plan = Plan({"n.weight": (4,)}, {("n.weight", 0): np.array([0, 1])}, (("n", "normalized_shape", (4,), (2,)),), {"a": 3})
    plan = replace(plan, scales={"n.weight": 1.5})
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.scales == {"n.weight": 1.5}
    assert "n.weight: times 1.5" in str(again)
    assert again.attributes == (("n", "normalized_shape", (4,), (2,)),)
    assert again.slim == {"a": 3}
    assert again.shapes == {"n.weight": (4,)}


def test_a_plan_is_printed_line_by_line() -> None:
    lines = str(small_plan(small_net())).splitlines()
    assert "0.weight: 4x3x3x3 -> 3x3x3x3" in lines
    assert "3.in_channels: 4 -> 3" in lines
    assert str(Plan({}, {}, (), {})) == "nothing is taken out"


def test_nothing_to_take_out_is_an_empty_plan() -> None:
    net = small_net()
    plan = make_plan(net, channel_graph(net, (X,)), [np.ones(4, np.bool_)])
    assert not plan
    assert (plan.shapes, plan.keep, plan.attributes, plan.slim) == ({}, {}, (), {})
    assert small_plan(net)


def test_a_plan_changes_nothing() -> None:
    net = small_net()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    small_plan(net)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert net[0].out_channels == 4


class Attention(nn.Module):
    """Heads and widths as attributes, in one projection or in three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_size = 4, 2, 8
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(6, 24)
        else:
            self.q, self.k, self.v = (nn.Linear(6, 8) for _ in "qkv")
        self.proj = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, self.all_head_size))


@pytest.mark.parametrize("fused", [True, False])
def test_heads_and_widths_of_attention_modules(fused: bool) -> None:
    net = Attention(fused)
    x = torch.randn(2, 5, 6)
    graph = channel_graph(net, (x,))
    (group,) = graph.groups
    plan = make_plan(net, graph, [np.array([True, False, True, False])])
    assert group.channels == 4
    assert {("", "num_heads", 4, 2), ("proj", "in_features", 8, 4)} <= set(plan.attributes)
    Surgery(net, plan)
    assert net(x).shape == (2, 5, 6)
    assert net.num_heads == 2
    assert net.head_dim == 2


class Parts(nn.Module):
    """A convolution, alone or in a block of its own, whose outputs are split by a number that the network keeps."""

    def __init__(self, attribute: str, size: int, in_block: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 8, 1)
        self.first = nn.Sequential(OrderedDict(conv=conv)) if in_block else conv
        self.second, self.attribute = nn.Conv2d(4, 2, 1), attribute
        setattr(self, attribute, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = getattr(self, self.attribute) // (2 if self.attribute == "expand_chs" else 1)
        a, b = self.first(x).split(part, 1)
        return self.second(a + b)


@pytest.mark.parametrize("in_block", [True, False])
@pytest.mark.parametrize(("attribute", "size", "after"), [("width", 4, 3), ("expand_chs", 8, 6)])
def test_sizes_by_which_a_network_splits(attribute: str, size: int, after: int, in_block: bool) -> None:
    net, x = Parts(attribute, size, in_block), torch.randn(2, 3, 4, 4)
    graph = channel_graph(net, (x,))
    plan = make_plan(net, graph, [np.array([True, False, True, True])])
    assert ("", attribute, size, after) in plan.attributes
    Surgery(net, plan)
    assert net(x).shape == (2, 2, 4, 4)


def test_lost_heads_of_torchs_attention_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    graph = channel_graph(layer, (torch.randn(2, 5, 8),))
    kept = [np.arange(g.channels) % 4 != 1 for g in graph.groups]
    plan = make_plan(layer, graph, kept)
    assert plan.slim == {"self_attn": 3}
    assert plan.keep["self_attn.in_proj_weight", 0].tolist() == [n + k for n in (0, 8, 16) for k in (0, 1, 4, 5, 6, 7)]


def test_tied_tensors_stand_under_their_first_name() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    found = tensors_of(nn.Sequential(first, nn.BatchNorm1d(3), second))
    assert list(found) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "2.bias",
    ]
    assert found["0.weight"] == (first, "weight")


def test_what_modules_without_parameters_go_with_follows_a_removal() -> None:
    place, other = ("a.weight", 0), ("b.weight", 0)
    normed = {"norm": ((place, 0), (place, 1), None, (place, 3), (other, 1)), "far": ((other, 0), (other, 1))}
    followed = cut_normed(normed, {place: np.array([0, 3])})
    assert followed == {"norm": ((place, 0), None, (place, 1), (other, 1)), "far": ((other, 0), (other, 1))}
