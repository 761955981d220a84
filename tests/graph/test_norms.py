"""Which norms alone read a layer, and what is silent because of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.exported import exported
from fasterai.graph.norms import Norm, norms_behind
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove, silent_channels

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
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
    (flags,) = silent_channels(net, channel_graph(net, (X,)))
    return [int(i) for i in flags.nonzero()[0]]


def test_a_norm_is_found_where_it_alone_reads_a_layer() -> None:
    norm = Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", "norm.running_mean", True)
    assert list(norms_behind(exported(Net(nn.BatchNorm2d(4)), (X,))[0])) == [norm]
    assert list(norms_behind(exported(Net(nn.BatchNorm2d(4), direct=True), (X,))[0])) == []
    group = Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", None, False)
    assert list(norms_behind(exported(Net(nn.GroupNorm(2, 4)), (X,))[0])) == [group]


def test_a_layer_that_is_used_twice_is_not_heard_through_one_norm_alone() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)) + self.a(x + 1))

    assert list(norms_behind(exported(Twice(nn.BatchNorm2d(4)), (X,))[0])) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)], ids=str)
def test_channels_whose_scale_and_shift_are_zero_are_silent(norm: nn.Module) -> None:
    net = silence(Net(norm), "norm.weight", "norm.bias")
    assert silent(net) == [1, 3]
    wanted = net(X)
    assert remove(net, X, measure=False).removed == {"a.weight": (4, 2)}
    torch.testing.assert_close(net(X), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [("norm.weight",), ("norm.bias",)])
def test_either_alone_is_not_enough(names: tuple[str, ...]) -> None:
    assert silent(silence(Net(nn.BatchNorm2d(4)), *names)) == []


def test_what_is_read_in_front_of_the_norm_as_well_is_not_silent() -> None:
    assert silent(silence(Net(nn.BatchNorm2d(4), direct=True), "norm.weight", "norm.bias")) == []


def test_a_pruner_takes_them_first() -> None:
    net = silence(Net(nn.BatchNorm2d(4)), "norm.weight", "norm.bias")
    with torch.no_grad():
        net.a.weight[[1, 3]] *= 100
    wanted = net(X)
    Pruner(net, 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    torch.testing.assert_close(net(X), wanted, rtol=0, atol=1e-12)


def test_rows_zeroed_by_hand_in_front_of_a_fresh_norm_are_silent() -> None:
    net = silence(Net(nn.BatchNorm2d(4)), "a.weight", "a.bias", "norm.bias")
    assert silent(net) == []  # its running mean is not zero: the norm makes something of nothing
    net.norm.running_mean[[1, 3]] = 0
    assert silent(net) == [1, 3]
    assert silent(silence(Net(nn.InstanceNorm2d(4, affine=True)), "a.weight", "a.bias", "norm.bias")) == [1, 3]
    # a group norm takes zeros together with other channels, and does not leave them zero
    assert silent(silence(Net(nn.GroupNorm(2, 4)), "a.weight", "a.bias", "norm.bias")) == []
