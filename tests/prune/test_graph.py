from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.prune.graph import channel_graph
from fasterai.prune.pruner import Pruner

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


def test_what_nothing_reads_stays() -> None:
    net = Residual()
    net.spare = nn.Linear(3, 5)
    graph = channel_graph(net, (IMAGES,))
    assert len(graph.groups) == 1
    assert graph.pinned["spare.weight", 0] == "nothing reads it"


def test_all_of_a_layer_does_not_go_at_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    graph = channel_graph(net, (IMAGES,))
    assert graph.groups == ()
    assert graph.pinned["0.weight", 0] == "all of it would go at once"


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


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_exported_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model must be one that torch.export can read on example_inputs, got .*data-dependent"
    ):
        channel_graph(Branching(), (torch.randn(2, 3),))
    assert torch.backends.mha.get_fastpath_enabled()


class Twice(nn.Module):
    """Grouped convolutions in two nets that want two ways: whole groups behind a group norm, the same index without."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), norm
        self.g, self.b = nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(self.norm(self.a(x))))


@pytest.mark.parametrize(("norm", "channels"), [(nn.GroupNorm(4, 8), {4}), (nn.BatchNorm2d(8), {2})])
def test_a_grouped_convolution_goes_the_way_that_leaves_something_to_go(norm: nn.Module, channels: set[int]) -> None:
    graph = channel_graph(Twice(norm), (IMAGES,))
    assert graph.groups
    if isinstance(norm, nn.GroupNorm):
        assert {g.channels for g in graph.groups} == channels


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
