from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import remove
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, check_plan, cut_normed, make_plan, tensors_of

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


def test_a_plan_is_of_what_it_cuts_whatever_modules_note_of_it() -> None:
    assert Plan({"w": (4,)}, {("w", 0): np.array([0, 1])}, (), {})


SOUND = Plan({"0.weight": (4, 3, 3, 3)}, {("0.weight", 0): np.array([0, 3])}, (("0", "out_channels", 4, 2),), {})
BROKEN = {
    "below the first": ({"keep": {("0.weight", 0): np.array([-1, 0])}}, r"that keeps indices of 0\.weight which do not exist"),
    "beyond the last": ({"keep": {("0.weight", 0): np.array([0, 4])}}, r"that keeps indices of 0\.weight which do not exist"),
    "none": ({"keep": {("0.weight", 0): np.array([], np.int64)}}, r"that keeps indices of 0\.weight which do not exist"),
    "beyond the dimensions": (
        {"keep": {("0.weight", 4): np.array([0])}},
        r"that keeps indices of 0\.weight which do not exist",
    ),
    "of no known shape": ({"keep": {("0.bias", 0): np.array([0])}}, r"that keeps indices of 0\.bias which do not exist"),
    "no tensor": ({"shapes": {"0.scale": (4,)}}, r"that cuts 0\.scale, which is missing here"),
    "another shape": ({"shapes": {"0.weight": (4, 3, 3, 1)}}, r"where 0\.weight is \(4, 3, 3, 1\), here \(4, 3, 3, 3\)"),
    "no module": ({"attributes": (("4", "out_channels", 4, 2),)}, r"that sets 4\.out_channels, which is missing here"),
    "no attribute": ({"attributes": (("2", "out_channels", 4, 2),)}, r"that sets 2\.out_channels, which is missing here"),
    "another number": ({"attributes": (("0", "out_channels", 5, 2),)}, r"where 0\.out_channels is 5, here 4"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_plan_that_does_not_fit_is_refused_by_what_differs(kind: str) -> None:
    changes, message = BROKEN[kind]
    check_plan(small_net(), SOUND)
    with pytest.raises(ValueError, match=f"^plan must be for this model, got one {message}$"):
        check_plan(small_net(), replace(SOUND, **changes))


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


def test_heads_that_all_stay_are_no_change() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    graph = channel_graph(layer, (torch.randn(2, 5, 8),))
    plan = make_plan(layer, graph, [np.arange(g.channels) < (12 if g.channels == 16 else g.channels) for g in graph.groups])
    assert plan.slim == {}
    assert set(plan.attributes) == {("linear1", "out_features", 16, 12), ("linear2", "in_features", 16, 12)}
    net = Attention(fused=False)
    plan = make_plan(net, channel_graph(net, (torch.randn(2, 5, 6),)), [np.ones(4, np.bool_)])
    assert plan.attributes == ()


class Grouped(nn.Module):
    """Attention that reads channels in groups of two, of which whole ones may go."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8), nn.GroupNorm(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.a(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.b(self.attention(y, y, y, need_weights=False)[0])


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_heads_are_not_mistaken_for_channels_that_attention_reads(heads: int) -> None:
    net, x = Grouped(heads).eval(), torch.randn(2, 3, 5)
    graph = channel_graph(net, (x,))
    places = [("a.weight", 0), ("attention.in_proj_weight", 0)]
    counts = [next(g.channels for g in graph.groups if place in g.places) for place in places]
    assert counts == [4, heads]
    for fewer in (0, 1):
        gone = {places[0]: 1, places[1]: fewer}
        kept = [np.arange(g.channels) >= max(gone.get(place, 0) for place in g.places) for g in graph.groups]
        plan = make_plan(net, graph, kept)
        assert plan.slim == {"attention": heads - fewer}
        assert {("attention", "kdim", 8, 6), ("attention", "vdim", 8, 6)} <= set(plan.attributes)


class Cross(nn.Module):
    """Attention whose keys and values are of other widths, each made by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.attention(query, self.k(x), self.v(x), need_weights=False)[0]


@pytest.mark.parametrize(("made_by", "attribute", "size"), [("k.weight", "kdim", 6), ("v.weight", "vdim", 4)])
def test_attention_that_reads_less_of_one_kind_is_slim_with_all_of_its_heads(made_by: str, attribute: str, size: int) -> None:
    net = Cross().eval()
    graph = channel_graph(net, (torch.randn(2, 3, 8), torch.randn(2, 3, 5)))
    plan = make_plan(net, graph, [np.arange(g.channels) >= (g.name == made_by) for g in graph.groups])
    assert plan.slim == {"attention": 2}
    changed = [a for a in plan.attributes if a[0] == "attention"]
    assert changed == [("attention", attribute, size, size - 1)]


class FourAndFour(nn.Module):
    """Its number of heads is the number of its hidden units, which are no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.a, self.b = 4, nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_single_channels_are_no_heads() -> None:
    net = FourAndFour()
    plan = make_plan(net, channel_graph(net, (torch.randn(2, 5),)), [np.array([True, False, True, True])])
    assert set(plan.attributes) == {("a", "out_features", 4, 3), ("b", "in_features", 4, 3)}


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


def test_what_a_norm_averages_over_grows_by_the_root_of_the_share_that_goes() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    graph = channel_graph(net, (torch.randn(2, 5),), exact=False)
    plan = make_plan(net, replace(graph, rescaled=frozenset({"1.weight"})), [np.arange(8) < 2])
    assert plan.scales == {"1.weight": 2.0}  # two of eight are left: the mean of squares is four times as large


def test_a_norm_that_is_told_how_many_there_were_keeps_its_weight() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    for exact in (True, False):
        plan = make_plan(net, channel_graph(net, (torch.randn(2, 5),), exact), [np.arange(8) < 2])
        assert (plan.scales, plan.slim) == ({}, {"1": 8})


class TwoPaths(nn.Module):
    """Two paths with norms without parameters, each of which goes with its own path."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(5, 6), nn.Linear(6, 3)
        self.one, self.two = nn.GroupNorm(4, 8, affine=False), nn.GroupNorm(3, 6, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.one(self.a(x))) + self.d(self.two(self.c(x)))


def test_norms_without_parameters_keep_their_numbers_where_nothing_goes() -> None:
    net = TwoPaths()
    graph = channel_graph(net, (torch.randn(2, 5),))
    plan = make_plan(net, graph, [np.arange(g.channels) >= (g.name == "a.weight") for g in graph.groups])
    changed = [a for a in plan.attributes if a[0] in ("one", "two")]
    assert sorted(changed) == [("one", "num_channels", 8, 6), ("one", "num_groups", 4, 3)]


class Stream(nn.Module):
    """Keeps the width of its hidden layers as a number."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = 8
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, hidden), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize(("hidden", "changes"), [(6, [("", "hidden_dim", 8, 7)]), (8, [])])
def test_a_number_follows_where_all_of_its_size_become_one_other(hidden: int, changes: list[tuple[str, str, int, int]]) -> None:
    """With eight channels behind the layer that loses one, eight is left of one layer and becomes seven of another."""
    net = Stream(hidden)
    graph = channel_graph(net, (torch.randn(2, 5),))
    kept = [np.arange(g.channels) >= (g.name == "a.weight") for g in graph.groups]
    assert [a for a in make_plan(net, graph, kept, streams=True).attributes if a[0] == ""] == changes
    assert [a for a in make_plan(net, graph, kept).attributes if a[0] == ""] == []


class Scale(nn.Module):
    """A number for each channel, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.weight = 8, nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_number_that_is_known_already_is_set_once() -> None:
    net = nn.Sequential(nn.Linear(5, 8), Scale(), nn.Linear(8, 3))
    plan = make_plan(net, channel_graph(net, (torch.randn(2, 5),)), [np.arange(8) > 0], streams=True)
    assert [a for a in plan.attributes if a[0] == "1"] == [("1", "channels", 8, 7)]


class Upsample(nn.Module):
    """Keeps its width, and asserts it of what it reads, as blocks of diffusers do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0))


def test_a_width_that_reads_and_makes_different_numbers_is_that_of_what_it_reads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Upsample(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight[:5] = net[0].bias[:5] = 0
        net[1].conv.weight[:2] = net[1].conv.bias[:2] = 0
        before = net(x)
        assert not remove(net, x, measure=False).refused
        assert torch.allclose(net(x), before, rtol=0, atol=1e-12)
    assert (net[1].channels, tuple(net[1].conv.weight.shape)) == (3, (6, 3, 3, 3))


class Heads(nn.Module):
    """A module that keeps the number of the heads which a layer two levels below it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 8
        self.to_v = nn.Sequential(nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU()))
        self.out = nn.Sequential(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        v = self.to_v(x).view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)
        return self.out((x @ x.transpose(1, 2)).softmax(-1)[:, None].matmul(v).transpose(1, 2).flatten(2))


def test_the_number_of_heads_of_layers_further_below_becomes_less_and_widths_do_not() -> None:
    net, x = Heads().eval(), torch.randn(2, 3, 6)
    with torch.no_grad():
        net.to_v[0][0].weight.view(4, 2, 6)[1::2] = 0.0
    wanted = net(x)
    assert remove(net, x, measure=False, rewrite=False).refused == {}
    assert (net.heads, net.dim, net.out[0].in_features) == (2, 8, 4)
    torch.testing.assert_close(net(x), wanted)


def test_the_width_of_an_encoder_and_decoder_becomes_that_of_its_stream() -> None:
    net = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True).eval()
    inner = nn.Sequential(OrderedDict(a=nn.Linear(3, 8), b=nn.Linear(8, 2)))
    model = EncodedDecoded(net, inner).eval()
    x = torch.randn(2, 4, 3)
    graph = channel_graph(model, (x,))
    stream = next(i for i, g in enumerate(graph.groups) if ("inner.a.weight", 0) in g.places)
    kept = [np.arange(g.channels) % 2 == 0 if i == stream else np.ones(g.channels, bool) for i, g in enumerate(graph.groups)]
    plan = make_plan(model, graph, kept, streams=True)
    assert ("net", "d_model", 8, 4) in plan.attributes


class EncodedDecoded(nn.Module):
    def __init__(self, net: nn.Module, inner: nn.Sequential) -> None:
        super().__init__()
        self.net, self.inner = net, inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner.a(x)
        return self.inner.b(self.net(y, y[:, :2]))
