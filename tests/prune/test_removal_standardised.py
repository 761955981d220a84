"""Weights that are standardised before a convolution reads them: the averages of what is left of a weight are those of all."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.plan import Plan


class Standard(nn.Conv2d):
    """The weight is standardised as it is called, before a convolution reads it."""

    def standardised(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised(self.weight), self.bias, self.stride, self.padding)


class ByBatchNorm(Standard):
    """As timm's StdConv2d."""

    def standardised(self, w: Tensor) -> Tensor:
        rows = w.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


class Scaled(Standard):
    """As timm's ScaledStdConv2d, of networks without norms: each row has a gain."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.gain, self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), self.weight[0].numel() ** -0.5

    def standardised(self, w: Tensor) -> Tensor:
        rows, gain = w.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


class ByMeans(Standard):
    """As the authors wrote it (Qiao et al. 2019): a mean of means, and the deviation of what is left, which lies flat."""

    def standardised(self, w: Tensor) -> Tensor:
        w = w - w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return w / std.expand_as(w)


class ByVarMean(Standard):
    """As BiT has it."""

    def standardised(self, w: Tensor) -> Tensor:
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return (w - m) / torch.sqrt(v + 1e-10)


class BySquares(Standard):
    """A mean taken away, and the mean of the squares of the rest."""

    def standardised(self, w: Tensor) -> Tensor:
        w = w - w.mean((1, 2, 3), keepdim=True)
        return w * (w.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).rsqrt()


class Flat(Standard):
    """Mean and deviation of rows that lie flat."""

    def standardised(self, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)).view_as(w)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


KINDS: dict[type[Standard], set[str]] = {
    Scaled: {"standard"},
    ByMeans: {"mean", "centred"},
    BySquares: {"mean", "centred"},
    Flat: {"mean", "variance"},
}
X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(*kinds: type[Standard]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        layer for i, kind in enumerate(kinds) for layer in (kind(8, 8, 1 if i == 1 else 3, padding=int(i != 1)), nn.Tanh())
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, Pooled(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.rand_like(p), alpha=0.3)  # means that are not zero
    return net


def halved(net: nn.Module, dice: int = 0) -> Tensor:
    """What the network gives with half of every group masked."""
    graph, order = channel_graph(net, (X,)), np.random.default_rng(dice)
    mask_channels_(net, graph, [order.permutation(g.channels) >= g.channels // 2 for g in graph.groups])
    return net(X)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-12 * b.abs().max())


def test_half_of_every_group_goes_again_and_again_and_what_is_left_is_copied_and_saved(tmp_path: Path) -> None:
    net = built(*KINDS)
    for left in (4, 2):
        wanted = halved(net, left)
        removal = remove(net, X, measure=False)
        assert removal.refused == {} and same(net(X), wanted)
        for i, kind in enumerate(KINDS):
            assert net[2 + 2 * i].weight.shape[:2] == (left, left)
            assert {edit.kind for edit in removal.plan.rewrites[str(2 + 2 * i)].edits} == KINDS[kind]
    wanted = net(X)
    wanted.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    assert Plan.from_dict(json.loads(json.dumps(removal.plan.to_dict()))).rewrites == removal.plan.rewrites
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(X), wanted)
    save_small(tmp_path / "small.safetensors", net)
    assert torch.equal(load_small(tmp_path / "small.safetensors", built(*KINDS))(X), wanted)


def test_a_column_is_silent_where_it_is_zero_and_what_it_reads_too() -> None:
    """A column of zeros reads its channel all the same, once the mean was taken away."""
    net = built(ByVarMean)
    graph = channel_graph(net, (X,))
    group = next(g for g in graph.groups if ("2.weight", 1) in g.places)
    assert group.is_summed and set(group.places) == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    with torch.no_grad():
        net[2].weight[:, 3] = 0
        net[0].weight[4], net[0].bias[4] = 0, 0
    wanted = net(X)
    with pytest.warns(UserWarning, match="nothing was removed"):
        remove(net, X, measure=False)
    with torch.no_grad():
        net[2].weight[:, 4] = 0
    wanted = net(X)
    assert remove(net, X, measure=False).removed == {"0.weight": (8, 7)} and same(net(X), wanted)


def test_what_is_not_zero_where_it_is_silent_stays_and_all_stays_without_rewriting() -> None:
    net = built(Flat)
    net[1] = nn.Sigmoid()
    assert "not zero where its channel is silent" in channel_graph(net, (X,)).pinned["2.weight", 1]
    pinned = channel_graph(built(ByBatchNorm), (X,), rewrite=False).pinned
    assert pinned["2.weight", 1] == "batch_norm averages over it"
