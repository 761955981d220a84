"""Removal as users meet it: what is silent goes, what is not is refused and nothing has changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.model.cuts import note_optimizer
from fasterai.prune.check import largest_sound
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import mask_channels_, remove, silent_channels, take_out
from fasterai.sparse.sparsifier import Sparsifier

SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def lively(net: Any) -> Any:
    """In eval mode, with norms that scale and shift."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for n, b in net.named_buffers() if "running" in n)]:
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.02)
    return net.eval()


def conv_net(middle: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), middle or nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    return lively(nn.Sequential(*layers))


def half_of(graph: Any, seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.arange(g.channels) % 2 == 0) for g in graph.groups]


def moved(net: nn.Module, x: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        found = net(x)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


models = torchvision.models
NETS: dict[str, tuple[Any, int, float]] = {  # constructor, side of the picture, share of the parameters left at most
    "resnet18": (lambda: models.resnet18(num_classes=10), 32, 0.28),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=10, width_mult=0.35), 32, 0.35),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=10), 32, 0.35),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=10), 32, 0.35),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32, 0.34),
    "swin": (lambda: models.SwinTransformer([2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=10), 32, 0.3),
}


@pytest.mark.parametrize("name", NETS)
def test_torchvision_nets_compute_the_same_without_half_of_their_channels(name: str) -> None:
    build, side, left = NETS[name]
    torch.manual_seed(0)
    net = lively(build().double())
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    kept = half_of(graph)
    mask_channels_(net, graph, kept)
    with torch.no_grad():
        wanted = net(x)
    removal = remove(net, x, measure=False)
    assert moved(net, x, wanted) <= 1e-9
    before, after = removal.parameters
    assert after == sum(p.numel() for p in net.parameters())
    assert after <= left * before
    assert removal.refused == {}


def test_plain_filter_masks_of_the_sparsifier_are_taken_out() -> None:
    net = conv_net()
    Sparsifier(net, "filter", "local", example_inputs=SMALL).sparsify_model(0.5)
    with torch.no_grad():
        wanted = net(SMALL)
    removal = remove(net, SMALL)
    assert moved(net, SMALL, wanted) <= 1e-5
    assert [tuple(net[i].weight.shape) for i in (0, 1, 3, 5)] == [(4, 3, 3, 3), (4,), (3, 4, 3, 3), (4, 3, 1, 1)]
    assert removal.removed == {"0.weight": (8, 4), "3.weight": (6, 3)}
    assert removal.refused == {}


@pytest.mark.parametrize("side", ["made", "read"])
def test_weights_zeroed_by_hand_are_taken_out(side: str) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        if side == "made":
            net[0].weight[2], net[0].bias[2] = 0, 0
        else:
            net[2].weight[:, 2] = 0
        x = torch.randn(4, 5)
        wanted = net(x)
    assert remove(net, x).removed == {"0.weight": (8, 7)}
    assert net[2].in_features == 7
    assert moved(net, x, wanted) <= 1e-6


def snapshot(net: nn.Module) -> tuple[Any, ...]:
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int | tuple | str)} for m in net.modules()]
    return {n: t.clone() for n, t in net.state_dict().items()}, numbers, [(id(p), p.requires_grad) for p in net.parameters()]


def assert_unchanged(net: nn.Module, before: tuple[Any, ...]) -> None:
    state, numbers, parameters = snapshot(net)
    assert all(torch.equal(state[n], t) for n, t in before[0].items())
    assert (numbers, parameters) == before[1:]


def test_a_channel_that_is_not_silent_is_refused_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3))  # a zero becomes a half
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
    before, state = snapshot(net), copy.deepcopy(optimizer.state_dict())
    removal = remove(net, torch.randn(4, 5), optimizer=optimizer)
    assert list(removal.refused) == ["0.weight"]
    assert "it is not silent" in removal.refused["0.weight"]
    assert removal.removed == {}
    assert removal.parameters[0] == removal.parameters[1]
    assert "nothing was removed: see above" in str(removal)
    assert_unchanged(net, before)
    for key, values in state["state"].items():
        assert all(torch.equal(v, optimizer.state_dict()["state"][key][n]) for n, v in values.items())


class HardCoded(nn.Module):
    """One of its two layers is read through a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.c(x.view(-1, 8))


def masked_in_half(net: nn.Module, x: Tensor) -> Tensor:
    """Return what a network computes once half of the channels of each group are zero."""
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, half_of(graph))
    with torch.no_grad():
        return net(x)


def widths(net: Any) -> tuple[int, ...]:
    return net.a.out_features, net.b.in_features, net.b.out_features, net.c.in_features


def test_a_size_that_a_forward_hard_codes_is_put_right() -> None:
    net, x = HardCoded(), torch.randn(4, 5)
    wanted = masked_in_half(net, x)
    removal = remove(net, x)
    assert removal.refused == {}
    assert removal.removed == {"a.weight": (8, 4), "b.weight": (8, 4)}
    assert widths(net) == (4, 4, 4, 4)
    assert moved(net, x, wanted) <= 1e-6


def test_a_forward_that_hard_codes_a_size_is_refused_with_its_line_and_the_rest_goes() -> None:
    net, x = HardCoded(), torch.randn(4, 5)
    wanted = masked_in_half(net, x)
    removal = remove(net, x, rewrite=False)
    line = HardCoded.forward.__code__.co_firstlineno + 2
    assert list(removal.refused) == ["b.weight"]
    assert f"(forward, line {line} of test_removal.py)" in removal.refused["b.weight"]
    assert removal.removed == {"a.weight": (8, 4)}
    assert widths(net) == (4, 4, 8, 8)
    assert moved(net, x, wanted) <= 1e-6


def test_nothing_silent_says_so() -> None:
    net = conv_net()
    before = snapshot(net)
    removal = remove(net, SMALL)
    assert (removal.removed, removal.refused, removal.difference) == ({}, {}, 0.0)
    assert not removal.plan
    assert "nothing was removed: no removable channel is silent" in str(removal)
    assert_unchanged(net, before)


def test_the_report_says_what_went_and_what_stays() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[:, 2] = 0
    removal = remove(net, torch.randn(4, 5))
    assert removal.parameters == (75, 66)
    assert "0.weight: 8 -> 7 channels" in str(removal)
    assert "parameters: 75 -> 66 (88.0%)" in str(removal)
    assert removal.pinned["2.weight", 0] == "it is an output of the network"


def test_one_channel_of_each_group_stays() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight.zero_()
    assert remove(net, torch.randn(4, 5)).removed == {"0.weight": (8, 1)}


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam, torch.optim.AdamW], ids=["SGD", "Adam", "AdamW"]
)
def test_the_optimizer_goes_on_with_the_very_parameters(make: Any) -> None:
    net = conv_net().train()
    optimizer = make(net.parameters())
    net(SMALL).sum().backward()
    optimizer.step()
    graph = channel_graph(net, (SMALL,))
    mask_channels_(net, graph, half_of(graph))
    identities = [id(p) for p in net.parameters()]
    remove(net, SMALL, optimizer=optimizer)
    assert [id(p) for p in net.parameters()] == identities == [id(p) for g in optimizer.param_groups for p in g["params"]]
    for parameter in net.parameters():
        tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.dim()]
        assert tensors
        assert {v.shape for v in tensors} == {parameter.shape}
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    net(SMALL).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_modes_random_numbers_and_copies_stay_as_they_were() -> None:
    net = conv_net().train()
    net[1].eval()
    graph = channel_graph(net, (SMALL,))
    mask_channels_(net, graph, half_of(graph))
    statistics = net[1].running_mean.clone()
    state = torch.get_rng_state()
    remove(net, SMALL)
    assert [m.training for m in net] == [True, False, True, True, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert set(net[1].running_mean.tolist()) <= set(statistics.tolist())
    assert torch.equal(copy.deepcopy(net).eval()(SMALL), net.eval()(SMALL))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_types(dtype: torch.dtype, bound: float) -> None:
    net, x = conv_net().to(dtype), SMALL.to(dtype)
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, half_of(graph))
    with torch.no_grad():
        wanted = net(x)
    assert remove(net, x).removed == {"0.weight": (8, 4), "3.weight": (6, 3)}
    assert net[0].weight.dtype == dtype
    assert moved(net, x, wanted) <= bound


def test_masks_silence_every_slice_and_no_buffer() -> None:
    net = conv_net()
    graph = channel_graph(net, (SMALL,))
    before = snapshot(net)[0]
    kept = [np.arange(g.channels) != 1 for g in graph.groups]
    mask_channels_(net, graph, kept)
    for name, dim in (
        ("0.weight", 0),
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("3.weight", 0),
        ("3.weight", 1),
        ("5.weight", 1),
    ):
        assert not net.get_parameter(name).select(dim, 1).any()
    assert torch.equal(net[0].weight[[0, 2]], before["0.weight"][[0, 2]])
    assert torch.equal(net[1].running_mean, before["1.running_mean"])
    assert torch.equal(net[5].weight[:, 0], before["5.weight"][:, 0])
    assert [s.tolist() for s in silent_channels(net, graph)] == [(~k).tolist() for k in kept]


def test_one_group_that_moves_the_outputs_does_not_hold_up_the_others() -> None:
    net = conv_net()
    graph = channel_graph(net, (SMALL,))
    kept = half_of(graph)
    mask_channels_(net, graph, [kept[0], np.ones_like(kept[1])])
    removal = take_out(net, graph, largest_sound(net, graph, kept, (SMALL,)), (SMALL,))
    assert list(removal.removed) == [graph.groups[0].name]
    assert list(removal.refused) == [graph.groups[1].name]
    assert removal.difference < 1e-5


def test_a_model_that_does_not_run_on_the_inputs_is_named() -> None:
    net = conv_net()
    before = snapshot(net)
    with pytest.raises(ValueError, match="example_inputs"):
        remove(net, torch.randn(2, 5, 8, 8))
    assert_unchanged(net, before)


def test_a_nan_among_the_outputs_is_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[:, 2] = 0
        net[2].bias.fill_(math.nan)
    assert remove(net, torch.randn(4, 5)).removed == {}


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_torchs_attention_go(batch_first: bool) -> None:
    torch.manual_seed(0)
    net = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=batch_first), 2, enable_nested_tensor=False)
        .double()
        .eval()
    )
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, half_of(graph))
    with torch.no_grad():
        wanted = net(x)
    removal = remove(net, x)
    assert removal.refused == {}
    assert [layer.self_attn.num_heads for layer in net.layers] == [2, 2]
    assert moved(net, x, wanted) <= 1e-9
    assert remove(net, x).removed == {}  # and it can be read again


class Scores(nn.Module):
    """Scores of which one is masked out by minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + torch.tensor([0.0, -math.inf, 0.0])


def test_infinities_that_stay_do_not_stand_in_the_way() -> None:
    net = Scores()
    with torch.no_grad():
        net.b.weight[:, 2] = 0
    removal = remove(net, torch.randn(4, 5))
    assert removal.removed == {"a.weight": (8, 7)}
    assert removal.difference < 1e-5


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.into(x)).relu()).relu())


def test_a_weight_that_two_layers_share_stays_shared() -> None:
    net = Tied().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, half_of(graph))
    with torch.no_grad():
        wanted = net(x)
    assert remove(net, x).refused == {}
    assert net.second.weight is net.first.weight
    assert net.first.weight.shape == (3, 3)
    assert (net.second.in_features, net.second.out_features) == (3, 3)
    assert moved(net, x, wanted) <= 1e-9


# --- norms without parameters ------------------------------------------------------------------------------------------------

# The norm between the convolutions, of eight channels; what its numbers are when half of the groups have gone.
BARE: dict[str, tuple[Any, dict[str, Any]]] = {
    "group": (lambda: nn.GroupNorm(4, 8, affine=False), {"num_groups": 2, "num_channels": 4}),
    "group, affine": (lambda: nn.GroupNorm(4, 8), {"num_groups": 2, "num_channels": 4}),
    "instance": (lambda: nn.InstanceNorm2d(8), {"num_features": 4}),
    "instance, running": (lambda: nn.InstanceNorm2d(8, track_running_stats=True), {"num_features": 4}),
    "batch": (lambda: nn.BatchNorm2d(8, affine=False), {"num_features": 4}),
    "batch, of the batch": (lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False), {"num_features": 4}),
}


def normed_net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.filterwarnings("error")  # an instance norm warns where its number is not that of the channels
def test_norms_without_parameters_keep_the_number_that_is_left(kind: str) -> None:
    build, numbers = BARE[kind]
    net, x = normed_net(build()), SMALL.double()
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, [np.arange(g.channels) % 2 == 0 for g in graph.groups])
    with torch.no_grad():
        wanted = net(x)
    removal = remove(net, x)
    assert removal.refused == {}
    assert net[0].out_channels == 4
    assert {name: getattr(net[1], name) for name in numbers} == numbers
    assert moved(net, x, wanted) <= 1e-9
    assert net.train()(x).shape == (2, 2, 6, 6)


def test_a_norm_that_is_called_on_two_streams_keeps_its_number_and_is_refused_where_it_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, affine=False)
            self.c, self.d = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.a(x))) + self.d(self.norm(self.b(x)))

    net, x = Twice().double(), SMALL.double()
    with torch.no_grad():
        net.c.weight[:, :2] = 0
        wanted = net(x)
    removal = remove(net, x)
    assert removal.removed == {}
    assert list(removal.refused) == ["a.weight"]
    assert net.norm.num_groups == 4
    assert moved(net, x, wanted) == 0


# --- exact=False -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm, with a stream of eight and a hidden layer of sixteen."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class WrittenOut(nn.Module):
    """A root-mean-square norm as models write it themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NORMS: dict[str, Any] = {
    "layer": nn.LayerNorm,
    "layer, without a shift": lambda n: nn.LayerNorm(n, bias=False),
    "layer, bare": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "rms": nn.RMSNorm,
    "rms, bare": lambda n: nn.RMSNorm(n, elementwise_affine=False),
    "rms, written out": WrittenOut,
}


def stream(norm: Any, first: nn.Module | None = None) -> nn.Sequential:
    """Two blocks, whose stream is what `first` makes of what enters it: by default all of it, so that zeros stay zeros."""
    torch.manual_seed(0)
    into = nn.Sequential(nn.Linear(5, 8), first or nn.Identity())
    return nn.Sequential(into, Block(norm), Block(norm), norm(8), nn.Linear(8, 3)).double().eval()


@pytest.mark.parametrize("kind", NORMS)
def test_a_stream_under_norms_goes_exactly_and_again(kind: str) -> None:
    net, x = stream(NORMS[kind]), torch.randn(4, 7, 5, dtype=torch.float64)
    wide, small = NORMS[kind](8).double(), torch.randn(2, 4, dtype=torch.float64)
    for silent, left in (([1, 4], 6), ([0, 3], 4)):
        graph = channel_graph(net, (x,))
        (place,) = [g for g in graph.groups if g.name == "0.0.weight"]
        mask_channels_(net, graph, [~np.isin(np.arange(g.channels), silent) if g is place else half(g) for g in graph.groups])
        with torch.no_grad():
            wanted = net(x)
        removal = remove(net, x, measure=False)
        assert removal.refused == {}
        assert moved(net, x, wanted) <= 1e-12
        assert (net[0][0].out_features, net[3].dense_size) == (left, 8)
        if hasattr(wide, "normalized_shape"):
            assert net[3].normalized_shape == (left,)
    assert isinstance(net[3], type(wide))
    expected = wide(torch.cat([small, torch.zeros(2, 4, dtype=torch.float64)], 1))[:, :4]
    for name, parameter in net[3].named_parameters():
        if name == "weight":
            parameter.data.fill_(1.0)
    assert torch.allclose(net[3](small), expected, atol=1e-12, rtol=0)


def half(group: Any) -> Any:
    return np.arange(group.channels) % 2 == 0


def test_a_channel_of_a_normed_stream_is_silent_only_where_it_is_zero() -> None:
    """Without a reader it still takes part in the averages."""
    net, x = stream(nn.LayerNorm), torch.randn(4, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        net[1].up.weight[:, 2] = net[2].up.weight[:, 2] = net[4].weight[:, 2] = 0
    graph = channel_graph(net, (x,))
    assert not any(flags.any() for flags in silent_channels(net, graph))


@pytest.mark.parametrize("kind", NORMS)
def test_a_normed_stream_that_is_not_zero_goes_only_where_outputs_may_move(kind: str) -> None:
    """A sigmoid makes a half of zero, which the norms average over, and no channel reads."""
    net, x = stream(NORMS[kind], nn.Sigmoid()), torch.randn(4, 7, 5, dtype=torch.float64)
    graph = channel_graph(net, (x,), exact=False)
    mask_channels_(net, graph, [np.arange(g.channels) != 1 for g in graph.groups])
    exact = channel_graph(net, (x,))
    assert "0.0.weight" not in [g.name for g in exact.groups]
    assert "0.0.weight" in [g.name for g in graph.groups]
    with torch.no_grad():
        wanted = net(x)
    copied = copy.deepcopy(net)
    assert "0.0.weight" not in remove(copied, x, measure=False).removed
    assert moved(copied, x, wanted) <= 1e-9
    removal = remove(net, x, exact=False, measure=False)
    assert removal.removed["0.0.weight"] == (8, 7)
    assert removal.refused == {}
    assert net[0][0].weight.shape == (7, 5)
    assert net[1].norm(torch.zeros(2, 7, dtype=torch.float64)).shape == (2, 7)
    assert getattr(net[1].norm, "normalized_shape", (7,)) == (7,)
    assert 1e-4 < moved(net, x, wanted) <= removal.difference < 1
    assert removal.plan.scales == {}  # what goes was no zero, so that an average over the rest is not one over fewer squares
    assert f"outputs moved by at most {removal.difference:.1e} of their scale, as was allowed (exact=False)" in str(removal)


class InCode(nn.Module):
    """A root-mean-square norm that no module holds: once it is traced, nothing can be told how many channels there were."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(nn.functional.rms_norm(x, x.shape[-1:], self.scale))


def test_a_weight_makes_up_for_an_average_over_fewer_squares() -> None:
    net, x = torch.fx.symbolic_trace(InCode()), torch.randn(4, 5, dtype=torch.float64)
    graph = channel_graph(net, (x,), exact=False)
    assert channel_graph(net, (x,)).groups == ()
    mask_channels_(net, graph, [np.arange(8) != 1])
    with torch.no_grad():
        wanted = net(x)
    removal = remove(net, x, exact=False, measure=False)
    assert removal.removed == {"a.weight": (8, 7)}
    assert removal.plan.scales == pytest.approx({"scale": math.sqrt(8 / 7)})  # an average over seven of eight is 8 / 7
    assert net.scale.tolist() == pytest.approx([math.sqrt(8 / 7)] * 7)
    assert 0 < moved(net, x, wanted) <= removal.difference < 1e-4  # by its eps


def test_a_group_norm_of_one_group_loses_channels_exactly() -> None:
    net, x = normed_net(nn.GroupNorm(1, 8)), SMALL.double()
    (group,) = channel_graph(net, (x,)).groups
    assert group.channels == 8
    mask_channels_(net, channel_graph(net, (x,)), [np.arange(8) != 3])
    with torch.no_grad():
        wanted = net(x)
    assert remove(net, x).removed == {"0.weight": (8, 7)}
    assert (net[1].num_groups, net[1].num_channels, net[1].dense_size) == (1, 7, 8)
    assert net[1].weight.tolist() == [1.0] * 7
    assert moved(net, x, wanted) <= 1e-12


def test_a_group_norm_over_what_is_not_zero_loses_channels_only_where_outputs_may_move() -> None:
    net, x = normed_net(nn.Sequential(nn.Sigmoid(), nn.GroupNorm(1, 8))), SMALL.double()
    assert channel_graph(net, (x,)).groups == ()
    graph = channel_graph(net, (x,), exact=False)
    mask_channels_(net, graph, [np.arange(8) != 3])
    removal = remove(net, x, exact=False)
    assert removal.removed == {"0.weight": (8, 7)}
    assert (net[1][1].num_groups, net[1][1].num_channels) == (1, 7)
    assert 1e-4 < removal.difference < 1


def test_group_norms_lose_whole_groups_where_that_is_as_much() -> None:
    net, x = normed_net(nn.GroupNorm(4, 8)), SMALL.double()
    (group,) = channel_graph(net, (x,), exact=False).groups
    assert group.channels == 4


def test_what_the_model_fails_without_stays_where_outputs_may_move() -> None:
    net, x = HardCoded(), torch.randn(4, 5)
    masked_in_half(net, x)
    removal = remove(net, x, exact=False, rewrite=False)
    assert list(removal.refused) == ["b.weight"]
    assert removal.removed == {"a.weight": (8, 4)}


def test_a_nan_is_no_movement() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) * torch.tensor(y.shape[-1] - 7.5).sqrt()  # of a negative number without one of them

    net = Root()
    with torch.no_grad():
        net.b.weight[:, 2] = 0
    before = snapshot(net)
    removal = remove(net, torch.randn(4, 5), exact=False)
    assert removal.refused == {"a.weight": "an output would be NaN or infinite: it is not silent"}
    assert_unchanged(net, before)


NORMED: dict[str, tuple[Any, float]] = {  # share of the parameters left at most, without a quarter of the channels
    "convnext": (
        lambda: models.ConvNeXt([models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 2)]),
        0.85,
    ),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 0.75),
}


@pytest.mark.parametrize("name", NORMED)
def test_torchvisions_normed_nets_lose_their_streams_where_outputs_may_move(name: str) -> None:
    build, left = NORMED[name]
    torch.manual_seed(0)
    net = lively(build().double())
    for parameter in net.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.006:  # heads and tokens that start at zero would leave no scale
            nn.init.normal_(parameter)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = channel_graph(net, (x,), exact=False)
    mask_channels_(net, graph, [np.arange(g.channels) % 4 != 1 for g in graph.groups])
    with torch.no_grad():
        wanted = net(x)
    removal = remove(net, x, exact=False, measure=False)
    assert removal.refused == {}
    assert removal.parameters[1] <= left * removal.parameters[0]
    assert 0 < moved(net, x, wanted) <= removal.difference < 0.5
    assert channel_graph(net, (x,)).groups


# --- copies ------------------------------------------------------------------------------------------------------------------


def test_copies_lose_the_same_channels() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    average = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        net[2].weight[:, 2] = 0
    whole = average.module[0].weight.detach().clone()
    removal = remove(net, torch.randn(4, 5), copies=[average])
    assert removal.removed == {"0.weight": (8, 7)}
    assert torch.equal(average.module[0].weight, whole[[0, 1, 3, 4, 5, 6, 7]])
    average.update_parameters(net)


def test_a_copy_of_another_structure_is_refused_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[:, 2] = 0
    before = snapshot(net)
    with pytest.raises(ValueError, match="copies"):
        remove(net, torch.randn(4, 5), copies=nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    assert_unchanged(net, before)


def test_attention_that_is_the_model_itself_is_refused_with_the_repair() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    attention, x = Own(8, 4, batch_first=True).eval(), torch.randn(2, 5, 8)
    graph = channel_graph(attention, (x,))
    mask_channels_(attention, graph, [np.arange(g.channels) != 1 for g in graph.groups])
    before = snapshot(attention)
    removal = remove(attention, x)
    assert removal.removed == {}
    assert "put the attention into an nn.Sequential" in removal.refused["in_proj_weight"]
    assert_unchanged(attention, before)


def test_masks_have_followed_when_the_timing_is_interrupted(monkeypatch):
    net = conv_net()
    sparsifier = Sparsifier(net, "coupled", example_inputs=SMALL)
    sparsifier.sparsify_model(0.5)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasterai.prune.removal.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(net, SMALL)
    assert net[0].out_channels == 4
    sparsifier.apply_masks()
    assert sparsifier.masks["0.weight"].shape == net[0].weight.shape


def test_a_noted_optimizer_whose_state_cannot_be_cut_is_no_hindrance():
    class Wrapped:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.state = optimizer, optimizer.state

    net = conv_net()
    optimizer = Wrapped(torch.optim.LBFGS(net.parameters()))
    note_optimizer(net, optimizer)
    Sparsifier(net, "coupled", example_inputs=SMALL).sparsify_model(0.5)
    remove(net, SMALL, measure=False)
    assert net[0].out_channels == 4


def test_a_call_that_removes_nothing_warns():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="nothing was removed: no removable channel is silent; masks hold only while"):
        remove(model, torch.randn(2, 4), measure=False)


class OneWeight(nn.Module):
    """One weight makes the hidden units and reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8)
        nn.init.zeros_(self.a.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x).relu(), self.a.weight.t())


@pytest.mark.parametrize("gone", [(), (1, 4, 5)])
def test_a_weight_that_makes_and_reads_has_to_be_zero_for_silence(gone: tuple[int, ...]) -> None:
    net, x = OneWeight(), torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        net.a.weight[list(gone)] = 0
    (flags,) = silent_channels(net, channel_graph(net, (x,)))
    assert flags.nonzero()[0].tolist() == list(gone)
    if gone:
        assert list(remove(net, x, measure=False).removed.values()) == [(8, 5)]


# --- layers that are heard through a norm alone ---

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class BehindNorm(nn.Module):
    """Four channels through a norm, which the readers read; `direct` ones read them in front of it."""

    def __init__(self, norm: nn.Module, *, direct: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.direct = nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1), direct
        with torch.no_grad():
            for tensor in [*self.norm.parameters(), *self.norm.buffers()]:
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.norm(y)
        return self.b((z + y if self.direct else z).relu())


@torch.no_grad()
def silence(net: Any, *names: str, channels: tuple[int, ...] = (1, 3)) -> Any:
    for name in names:
        net.get_parameter(name).data[list(channels)] = 0
    return net


def silent(net: nn.Module) -> list[int]:
    (flags,) = silent_channels(net, channel_graph(net, (IMAGES,)))
    return [int(i) for i in flags.nonzero()[0]]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)], ids=str)
def test_channels_whose_scale_and_shift_are_zero_are_silent(norm: nn.Module) -> None:
    net = silence(BehindNorm(norm), "norm.weight", "norm.bias")
    assert silent(net) == [1, 3]
    wanted = net(IMAGES)
    assert remove(net, IMAGES, measure=False).removed == {"a.weight": (4, 2)}
    torch.testing.assert_close(net(IMAGES), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [("norm.weight",), ("norm.bias",)])
def test_either_alone_is_not_enough(names: tuple[str, ...]) -> None:
    assert silent(silence(BehindNorm(nn.BatchNorm2d(4)), *names)) == []


def test_what_is_read_in_front_of_the_norm_as_well_is_not_silent() -> None:
    assert silent(silence(BehindNorm(nn.BatchNorm2d(4), direct=True), "norm.weight", "norm.bias")) == []


def test_a_pruner_takes_them_first() -> None:
    net = silence(BehindNorm(nn.BatchNorm2d(4)), "norm.weight", "norm.bias")
    with torch.no_grad():
        net.a.weight[[1, 3]] *= 100
    wanted = net(IMAGES)
    Pruner(net, 0.5, "local", "large_final", example_inputs=IMAGES).prune_model(measure=False)
    torch.testing.assert_close(net(IMAGES), wanted, rtol=0, atol=1e-12)


def test_rows_zeroed_by_hand_in_front_of_a_fresh_norm_are_silent() -> None:
    net = silence(BehindNorm(nn.BatchNorm2d(4)), "a.weight", "a.bias", "norm.bias")
    assert silent(net) == []  # its running mean is not zero: the norm makes something of nothing
    net.norm.running_mean[[1, 3]] = 0
    assert silent(net) == [1, 3]
    assert silent(silence(BehindNorm(nn.InstanceNorm2d(4, affine=True)), "a.weight", "a.bias", "norm.bias")) == [1, 3]
    # a group norm takes zeros together with other channels, and does not leave them zero
    assert silent(silence(BehindNorm(nn.GroupNorm(2, 4)), "a.weight", "a.bias", "norm.bias")) == []


def test_outputs_that_are_all_zero_are_said_to_compare_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 0
        for parameter in model[2].parameters():
            parameter.zero_()  # as the head of a torchvision ViT
    report = str(remove(model, torch.randn(2, 4), measure=False))
    assert "outputs are all zero, before and after: there was nothing to compare" in report
    assert "moved by" not in report


class Encoded(nn.Module):
    """torch's own encoder, which in eval mode has one fused kernel for a layer, norms included."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_torchs_fused_encoder_is_not_used_over_a_slim_stream() -> None:
    """Its kernel knows nothing of how many channels there were; the check runs without it, a user does not."""
    torch.manual_seed(0)
    net, x = lively(Encoded().double()), torch.randn(3, 6, 5, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([[4], [6], [5]])
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, [half(g) if g.name == "embed.weight" else np.ones(g.channels, bool) for g in graph.groups])
    with torch.no_grad():
        wanted, padded = net(x), net(x, padding)
        removal = remove(net, x, measure=False)
        assert removal.removed == {"embed.weight": (8, 4)}
        assert torch.allclose(net(x), wanted, atol=1e-12, rtol=0)
        assert torch.allclose(net(x, padding)[~padding], padded[~padding], atol=1e-12, rtol=0)
