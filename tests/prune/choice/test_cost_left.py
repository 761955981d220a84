"""What is left of parameters, MACs and time: against counts by hand and against models that are really cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

from fasterai.analyze.cost import cost
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.prune.choice import cost_left as shares
from fasterai.prune.choice.cost_left import macs_left, parameters_left, time_left
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import make_plan
from tests.networks import perceptron, short_mobilenet

X = torch.zeros(1, 4)


def mlp() -> nn.Module:
    """8 x (4 + 1 + 2) + 2 = 58 parameters, 8 x (4 + 2) = 48 MACs; a hidden channel is 7 and 6 of them."""
    return perceptron(4, 8, 2)


def some_of(graph: ChannelGraph, seed: int = 0) -> list[np.ndarray]:
    dice = np.random.default_rng(seed)
    kept = [dice.random(group.channels) < 0.6 for group in graph.groups]
    for keep in kept:
        keep[0] = True
    return kept


def first(n: int, of: int) -> list[np.ndarray]:
    return [np.arange(of) < n]


def test_parameters_by_hand() -> None:
    model = mlp()
    left = parameters_left(model, channel_graph(model, (X,)), model)
    assert left(first(8, 8)) == 1
    assert left(first(3, 8)) == 23 / 58


def test_macs_by_hand_for_any_batch() -> None:
    model = mlp()
    for batch in (1, 5):
        left = macs_left(model, channel_graph(model, (X,)), (X.repeat(batch, 1),), model)
        assert left(first(8, 8)) == 1
        assert left(first(3, 8)) == 18 / 48


def test_shares_are_of_the_dense_model() -> None:
    dense = mlp()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = channel_graph(model, (X,))
    assert parameters_left(model, graph, dense)(first(4, 4)) == 30 / 58
    assert macs_left(model, graph, (X,), dense)(first(4, 4)) == 24 / 48
    assert macs_left(model, graph, (X,), dense)(first(1, 4)) == 6 / 48


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.decoder = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.decoder.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.decoder(self.encoder(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AttentionWithConstant(Attention):
    """Counted with its weights, where torch would run the layer as one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((16,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


NETWORKS = {
    "resnet18": (lambda: resnet18(weights=None), (1, 3, 32, 32)),
    "mobilenet_v2": (short_mobilenet, (1, 3, 32, 32)),
    "vit": (lambda: VisionTransformer(32, 8, 2, 4, 32, 64), (1, 3, 32, 32)),
    "attention": (Attention, (1, 6, 16)),
    "attention_with_constant": (AttentionWithConstant, (1, 6, 16)),
    "tied": (Tied, (1, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_are_those_of_a_model_that_is_cut(name: str) -> None:
    torch.set_num_threads(1)
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.randn(shape)
    graph = channel_graph(model, (x,))
    assert graph.groups
    kept = some_of(graph)
    small = copy.deepcopy(model)
    Surgery(small, make_plan(small, graph, kept, streams=name == "vit"))
    dense_cost, small_cost = cost(model, x), cost(small, x)
    assert small_cost.macs < dense_cost.macs
    assert parameters_left(model, graph, model)(kept) == small_cost.parameters / dense_cost.parameters
    left = macs_left(model, graph, (x,), model)
    assert left(kept) == left(kept) == small_cost.macs / dense_cost.macs


class Constant(nn.Module):
    """A tensor that is neither parameter nor buffer: a copy without weights does not run with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.scale = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * self.scale).relu())


def test_code_that_needs_values_is_counted_with_them() -> None:
    model = Constant()
    with pytest.raises(RuntimeError, match="meta"):
        copy.deepcopy(model).to("meta")(X.to("meta"))
    assert macs_left(model, channel_graph(model, (X,)), (X,), model)(first(3, 8)) == 18 / 48


def test_a_copy_without_weights_is_used_where_it_runs() -> None:
    shell, inputs = shares._shell(mlp(), (X,))
    assert all(p.is_meta for p in shell.parameters())
    assert inputs[0].is_meta


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3)).train()
    x = torch.randn(2, 3, 8, 8)
    graph = channel_graph(model, (x,))
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    for left in (parameters_left(model, graph, model), macs_left(model, graph, (x,), model)):
        left(first(3, 8))
    time_left(model, graph, (x,), model)(first(3, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert model.training
    assert all(m.training for m in model.modules())
    after = model.state_dict(keep_vars=True)
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, values)
        assert tensor.grad is None
    assert model[0].out_channels == 8


def test_time_is_that_of_undisturbed_passes_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model takes 1 of 4 seconds; of the passes of either five in seven are disturbed, up to a hundred times."""
    model, calls = mlp(), []
    monkeypatch.setattr(shares, "SECONDS", 0.0)

    def seconds(one: nn.Module, inputs: tuple[Tensor, ...]) -> float:
        small = one[0].out_features == 2
        assert torch.get_num_threads() == 1
        assert not one.training
        assert inputs[0].shape == (1, 4)
        calls.append("small" if small else "dense")
        round_ = (len(calls) - 1) // 2 - shares.WARM_UP
        return (1.0 if small else 4.0) * (1 if round_ % 7 in ((1, 4) if small else (2, 5)) else 10.0 + 90 * small)

    monkeypatch.setattr(shares, "seconds_per_pass", seconds)
    torch.set_num_threads(2)
    try:
        left = time_left(model, channel_graph(model, (X,)), (X,), model)(first(2, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert left == 0.25
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(pairs) == shares.WARM_UP + shares.PAIRS
    assert all(set(pair) == {"dense", "small"} for pair in pairs)
    assert {("dense", "small"), ("small", "dense")} == set(pairs[shares.WARM_UP :])


def test_time_of_a_wide_layer_falls_with_its_channels() -> None:
    torch.set_num_threads(1)
    model, x = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)), torch.randn(64, 512)
    left = time_left(model, channel_graph(model, (x,)), (x,), model)
    assert left(first(128, 2048)) < 0.6
