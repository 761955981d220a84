from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasterai.graph.channels import channel_graph
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import mask_channels_, remove
from tests.networks import Sloping

IMAGES = torch.randn(2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(y + self.norm(self.b(y)))


def test_a_residual_couples_its_layers() -> None:
    graph = channel_graph(Residual(), (IMAGES,))
    (group,) = graph.groups
    assert group.channels == 4
    assert set(group.places) == {
        ("a.weight", 0),
        ("a.bias", 0),
        ("b.weight", 0),
        ("b.weight", 1),
        ("b.bias", 0),
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("norm.running_mean", 0),
        ("norm.running_var", 0),
        ("c.weight", 1),
    }
    assert all(indices.tolist() == [[0], [1], [2], [3]] for indices in group.places.values())
    assert group.name == "a.weight"
    assert graph.readers == {("a.weight", 1), ("b.weight", 1), ("c.weight", 1)}
    assert graph.pinned["c.weight", 0] == "it is an output of the network"
    assert graph.pinned["a.weight", 1] == "conv2d reads a dimension of fixed size"


def test_a_channel_that_several_pixels_carry_is_read_at_each() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    (group,) = channel_graph(net, (torch.randn(2, 3, 2, 2),)).groups
    assert group.places["2.weight", 1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_heads_of_a_fused_projection() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    groups = {g.name: g for g in channel_graph(layer, (torch.randn(2, 5, 8),)).groups}
    heads = groups["self_attn.in_proj_weight"]
    assert heads.channels == 4
    assert heads.places["self_attn.in_proj_weight", 0][1].tolist() == [2, 3, 10, 11, 18, 19]
    assert heads.places["self_attn.out_proj.weight", 1][1].tolist() == [2, 3]
    assert groups["linear1.weight"].channels == 16


class Attending(nn.Module):
    """Attention between two linear layers, called as `nn.MultiheadAttention` is called by default: its weights are dropped."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        self.a, self.attention, self.b = nn.Linear(6, 8), nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)
        self.positions = nn.Parameter(torch.randn(1, 5, 8)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x if self.positions is None else x + self.positions
        return self.b(x + self.attention(x, x, x)[0])


@pytest.mark.parametrize("positions", [False, True])
def test_attention_weights_that_nobody_reads_pin_neither_heads_nor_stream(positions: bool) -> None:
    graph = channel_graph(Attending(positions), (torch.randn(2, 5, 6),))
    assert {g.name: g.channels for g in graph.groups} == {"a.weight": 8, "attention.in_proj_weight": 4}
    assert ("positions", 2) in graph.groups[0].places or not positions


class Telling(nn.Module):
    """Attention that gives out its weights too: their average over the heads, or those of each."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.a, self.attention, self.average = nn.Linear(8, 8), nn.MultiheadAttention(8, 4, batch_first=True), average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        found: tuple[Tensor, Tensor] = self.attention(x, x, x, average_attn_weights=self.average)
        return found


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_that_are_given_out_pin_the_heads(average: bool) -> None:
    net, x = Telling(average).eval(), torch.randn(2, 5, 8)
    graph = channel_graph(net, (x,))
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= {name for name, d in graph.pinned if d == 0}
    assert [g.name for g in graph.groups] == ["a.weight"]
    mask_channels_(net, graph, [np.arange(8) > 3])
    before = net(x)
    removal = remove(net, (x,), measure=False)
    assert removal.removed == {"a.weight": (8, 4)} and net.attention.num_heads == 4
    for old, new in zip(before, net(x), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("average", [True, False])
def test_heads_whose_weights_are_given_out_lose_no_width_either(average: bool) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return self.attention(q, k, v, average_attn_weights=average)

    x = (torch.randn(5, 2, 8),) * 3
    assert channel_graph(Three(), x).groups == ()
    assert channel_graph(nn.MultiheadAttention(8, 4), x).groups == ()


class Unheard(nn.Module):
    """A layer whose output nobody uses runs all the same, and has to fit what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.b = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.idle(x).mean()
        return self.b(x)


def test_a_layer_that_nobody_hears_is_cut_where_it_reads() -> None:
    (group,) = (g for g in channel_graph(Unheard(), (torch.randn(2, 3),)).groups if g.name == "a.weight")
    assert ("idle.weight", 1) in group.places


class Shuffled(nn.Module):
    """Two grouped convolutions with channels shuffled by hand between them, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.g(self.a(x))).shape
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def test_a_shuffle_by_hand_leaves_as_much_to_go_as_the_module() -> None:
    with_module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=2), nn.ChannelShuffle(2), nn.Conv2d(16, 4, 1))
    for net in (Shuffled(), with_module):
        # the same index of both groups: 8 channels of what is read, 8 of what is made
        assert [g.channels for g in channel_graph(net, (IMAGES,)).groups] == [8, 8]


def test_what_nothing_reads_stays() -> None:
    net = Residual()
    net.spare = nn.Linear(3, 5)
    graph = channel_graph(net, (IMAGES,))
    assert len(graph.groups) == 1
    assert graph.pinned["spare.weight", 0] == "no operation reads it"


class GroupNormAndPixels(nn.GroupNorm):
    """A group norm that averages over rows of pixels too, so that it cannot be told of channels that are gone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(super().forward(x), x.shape[-1:])


def test_all_of_a_layer_does_not_go_at_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), GroupNormAndPixels(1, 4), nn.Conv2d(4, 2, 1))
    graph = channel_graph(net, (IMAGES,))
    assert graph.groups == ()
    assert graph.pinned["0.weight", 0] == "its channels can only be removed all together"


def test_all_but_one_of_a_layer_go_behind_a_norm_that_remembers_its_size() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    graph = channel_graph(net, (IMAGES,))
    assert [g.channels for g in graph.groups] == [4]
    mask_channels_(net, graph, [np.arange(4) == 2])
    before = net(IMAGES)
    remove(net, (IMAGES,), measure=False)
    assert net[0].weight.shape[0] == net[2].weight.shape[1] == 1
    torch.testing.assert_close(net(IMAGES), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.into = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.into(x)).relu()).relu())


def test_a_shared_weight_carries_the_labels_of_both_uses() -> None:
    (group,) = channel_graph(Tied(), (torch.randn(2, 5),)).groups
    assert group.channels == 6
    assert {("first.weight", 0), ("first.weight", 1), ("second.bias", 0), ("into.weight", 0), ("head.weight", 1)} <= set(
        group.places
    )
    assert not any(name == "second.weight" for name, _ in group.places)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_wrappers_leave_the_names_alone() -> None:
    plain = channel_graph(Residual(), (IMAGES,))
    for wrapped in (torch.nn.DataParallel(Residual()), torch.compile(Residual())):
        assert [set(g.places) for g in channel_graph(wrapped, (IMAGES,)).groups] == [set(g.places) for g in plain.groups]


def snapshot(net: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    return [[t.clone() for t in net.state_dict().values()], [m.training for m in net.modules()], hooks, torch.get_rng_state()]


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    net = Residual().train()
    net.norm.eval()
    before = snapshot(net)
    fast = torch.backends.mha.get_fastpath_enabled()
    channel_graph(net, (IMAGES,))
    after = snapshot(net)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_model_that_cannot_be_exported_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"model must be one that torch.export can read on example_inputs, got .*, or whose operations",
    ):
        channel_graph(Sloping(nn.Linear(3, 3)), (torch.randn(2, 3),))
    assert torch.backends.mha.get_fastpath_enabled()


class Twice(nn.Module):
    """Grouped convolutions in two nets that want two ways: whole groups behind a group norm, the same index without."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), norm
        self.g, self.b = nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(self.norm(self.a(x))))


@pytest.mark.parametrize(
    ("norm", "channels"),
    [(GroupNormAndPixels(4, 8), 4), (nn.GroupNorm(4, 8), 2), (nn.BatchNorm2d(8), 2)],
    ids=["group norm and pixels", "group norm", "batch norm"],
)
def test_a_grouped_convolution_goes_the_way_that_leaves_something_to_go(norm: nn.Module, channels: int) -> None:
    net = Twice(norm).eval()
    graph = channel_graph(net, (IMAGES,))
    assert graph.groups and {g.channels for g in graph.groups} == {channels}
    mask_channels_(net, graph, [np.arange(channels) % 2 == 1 for _ in graph.groups])
    before = net(IMAGES)
    assert remove(net, (IMAGES,), measure=False).refused == {}
    assert len(net.a.weight) == len(net.g.weight) == 4
    torch.testing.assert_close(net(IMAGES), before)


def test_every_index_stands_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
    graph = channel_graph(net, (IMAGES,))
    assert graph.groups
    shapes = {n: t.shape for n, t in net.state_dict().items()}
    for place in {p for g in graph.groups for p in g.places}:
        indices = np.concatenate([g.places[place].ravel() for g in graph.groups if place in g.places])
        assert sorted(indices.tolist()) == list(range(shapes[place[0]][place[1]]))


def test_fastais_unet_is_followed_through_its_casts():
    """Its layers cast to fastai's own tensor class, skip connections are concatenated, and pixels shuffled."""
    unet = pytest.importorskip("fastai.vision.models.unet")
    torch.manual_seed(0)
    cast = torch.Tensor.as_subclass
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
    )
    model, x = unet.DynamicUnet(encoder, 5, (32, 32)).eval(), torch.randn(2, 3, 32, 32)
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model(measure=False)
    assert removal.refused == {}
    assert {"layers.0.0.weight", "layers.0.2.weight", "layers.0.4.weight"} <= set(removal.removed)
    assert removal.parameters[1] < 0.35 * removal.parameters[0]
    assert model(x).shape == (2, 5, 32, 32)
    assert torch.Tensor.as_subclass is cast
