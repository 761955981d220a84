"""Networks that sum, average and choose over channels: without those that are zero they compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove, silent_channels
from fasterai.prune.small_files import load_small, save_small


class CBAM(nn.Module):
    """Gates of channels and of places (Woo et al. 2018): a mean and a maximum over channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(c, c // 2, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 2, c, 1, bias=False))
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (self.fc(F.adaptive_avg_pool2d(x, 1)) + self.fc(F.adaptive_max_pool2d(x, 1))).sigmoid()
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.spatial(both).sigmoid()


class GCT(nn.Module):
    """A gate by the norms of channels, divided by the root of their mean square (Yang et al. 2020)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.randn(1, c, 1, 1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        e = (x.square().sum((2, 3), keepdim=True) + 1e-5).sqrt() * self.alpha
        n = self.gamma / (e.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * (1 + torch.tanh(e * n + self.beta))


class ECA(nn.Module):
    """A gate by a convolution along the channels of what is pooled (Wang et al. 2020)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


class NAF(nn.Module):
    """NAFNet's block without its norm (Chen et al. 2022): a product of halves for an activation, a gate of one layer."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.Conv2d(c, 2 * c, 1),
            nn.Conv2d(2 * c, 2 * c, 3, 1, 1, groups=2 * c),
            nn.Conv2d(c, c, 1),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.beta = nn.Parameter(torch.randn(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.two(self.one(x)).chunk(2, dim=1)
        y = a * b
        return x + self.three(y * self.gate(y)) * self.beta


class CondConv(nn.Module):
    """Kernels blended by what is seen, one blend a picture (Yang et al. 2019)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, c, c, 3, 3) / 5)
        self.route = nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.einsum("bn,noikl->boikl", self.route(x.mean((2, 3))).sigmoid(), self.w)
        b, c, h, width = x.shape
        y = F.conv2d(x.reshape(1, b * c, h, width), w.reshape(b * w.shape[1], c, 3, 3), padding=1, groups=b)
        return y.reshape(b, -1, h, width)


class DyConv(nn.Module):
    """Kernels blended by attention (Chen et al. 2020); the blend is a product of matrices, for which the kernels lie flat."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.w, self.out, self.count = nn.Parameter(torch.randn(3, c, c, 3, 3) / 5), c, 3
        self.a = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, width = x.shape
        w = (self.a(x).softmax(1) @ self.w.view(self.count, -1)).view(b * self.out, c, 3, 3)
        return F.conv2d(x.view(1, -1, h, width), w, padding=1, groups=b).view(b, self.out, h, width)


class StyleConv(nn.Module):
    """StyleGAN2's convolution (Karras et al. 2020): kernels times a style, divided by their norm over what they read."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.w, self.bias, self.style = nn.Parameter(torch.randn(1, o, i, 3, 3)), nn.Parameter(torch.randn(o)), nn.Linear(8, i)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        b, c, h, width = x.shape
        w = self.w * self.style(s).view(b, 1, c, 1, 1)
        w = w * torch.rsqrt(w.square().sum([2, 3, 4]) + 1e-8).view(b, -1, 1, 1, 1)
        y = F.conv2d(x.reshape(1, b * c, h, width), w.view(-1, c, 3, 3), padding=1, groups=b)
        return F.leaky_relu(y.view(b, -1, h, width) + self.bias[:, None, None], 0.2)


class Style(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.const = nn.Sequential(nn.Linear(5, 8), nn.ReLU()), nn.Parameter(torch.randn(1, 8, 4, 4))
        self.a, self.b, self.rgb = StyleConv(8, 8), StyleConv(8, 6), nn.Conv2d(6, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        s = self.map(z)
        x = self.a(self.const.repeat(len(z), 1, 1, 1), s)
        return self.rgb(self.b(F.interpolate(x, scale_factor=2), s))


class ReAttention(nn.Module):
    """DeepViT's attention (Zhou et al. 2021): maps of attention are mixed over heads, which stay; the width of a head goes."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (c // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c)
        self.mix, self.norm = nn.Conv2d(heads, heads, 1), nn.BatchNorm2d(heads)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = self.norm(self.mix((q @ k.transpose(-2, -1) * self.scale).softmax(-1)))
        return self.proj((a @ v).transpose(1, 2).reshape(b, t, -1))


class DeepViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.norm, self.a, self.f = nn.Linear(5, 16), nn.LayerNorm(16), ReAttention(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        return self.f((x + self.a(self.norm(x))).mean(1))


class MANN(nn.Module):
    """Layers whose weights are blended by a gate, as mode-adaptive networks have them (Zhang et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3), nn.Softmax(1))
        self.w = nn.ParameterList(torch.randn(3, o, i) for i, o in ((6, 8), (8, 8), (8, 4)))
        self.b = nn.ParameterList(torch.randn(3, o, 1) for o in (8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x).view(len(x), -1, 1, 1)
        y = x[:, :, None]
        for i, (w, b) in enumerate(zip(self.w, self.b, strict=True)):
            y = torch.bmm((w[None] * g).sum(1), y) + (b[None] * g).sum(1)
            y = F.elu(y) if i < 2 else y
        return y[:, :, 0]


def of_pictures(make: Callable[[int], nn.Module]) -> nn.Module:
    ends = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), make(8)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), make(8), *ends),
    )


PICTURES = (2, 3, 8, 8)
#: Network -> how to make it, the shape of its input, and what at most is left where half of every group goes.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "CBAM": (lambda: of_pictures(CBAM), PICTURES, 0.36),
    "GCT": (lambda: of_pictures(GCT), PICTURES, 0.36),
    "ECA": (lambda: of_pictures(ECA), PICTURES, 0.35),
    "NAFNet": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NAF(8), NAF(8), nn.Conv2d(8, 3, 3)), PICTURES, 0.43),
    "CondConv": (lambda: of_pictures(CondConv), PICTURES, 0.32),
    "DyConv": (lambda: of_pictures(DyConv), PICTURES, 0.33),
    "StyleGAN": (Style, (2, 5), 0.3),
    "DeepViT": (DeepViT, (2, 6, 5), 0.3),
    "MANN": (MANN, (3, 6), 0.44),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[name]
    net = make().double().eval()
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for n, b in net.named_buffers() if "running" in n)]:
            tensor.add_(torch.rand_like(tensor), alpha=0.3)
    return net, torch.randn(shape, dtype=torch.float64)


def halved(net: nn.Module, x: Tensor) -> None:
    graph = channel_graph(net, (x,))
    mask_channels_(net, graph, [np.arange(group.channels) % 2 == 0 for group in graph.groups])


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@torch.no_grad()
def on(net: nn.Module, probes: list[Tensor]) -> list[Tensor]:
    return [net(probe).clone() for probe in probes]


def alike(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(float((a - b).abs().max()) <= 1e-9 * float(a.abs().max()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_group_goes_and_the_outputs_stay(name: str) -> None:
    net, x = made(name)
    probes = [x, torch.randn(5, *x.shape[1:], dtype=x.dtype)]
    probes += [torch.randn(1, 3, 11, 9, dtype=x.dtype)] if x.dim() == 4 else []
    dense = size(net)
    halved(net, x)
    wanted = on(net, probes)
    assert remove(net, x, measure=False).refused == {}
    assert alike(wanted, on(net, probes))
    assert size(net) <= NETWORKS[name][2] * dense


@pytest.mark.parametrize("name", ["CBAM", "ECA"])
def test_what_is_told_of_all_that_has_gone_is_told_again(name: str) -> None:
    """8 channels, then 4, then 2: a mean is one of 8 still, 8 stand along a convolution, and copies are copied and trained."""
    net, x = made(name)
    for _ in range(2):
        halved(net, x)
        wanted = on(net, [x])
        assert remove(net, x, measure=False).refused == {}
        assert alike(wanted, on(net, [x]))
        assert alike(wanted, on(copy.deepcopy(net), [x]))
    assert net[0].out_channels == 2
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(("name", "why"), [("CBAM", "max"), ("ECA", "conv1d computes across it")])
def test_without_rewriting_what_is_chosen_from_or_has_neighbours_stays(name: str, why: str) -> None:
    net, x = made(name)
    assert why in channel_graph(net, (x,), rewrite=False).pinned["0.weight", 0]


def test_places_along_a_convolution_are_data_and_go_into_a_file(tmp_path: Path) -> None:
    net, x = made("ECA")
    for _ in range(2):
        halved(net, x)
        removal = remove(net, x, measure=False)
    (edit,) = removal.plan.rewrites["3.conv"].edits
    assert edit.to_list() == ["conv1d", "spread", [], [1, 8, 0, 8], [0, 4]]  # of 0 2 4 6
    assert "3.conv: its code goes by all channels that there were; it runs a traced copy now" in str(removal)
    save_small(tmp_path / "small.safetensors", net)
    assert torch.equal(load_small(tmp_path / "small.safetensors", made("ECA")[0])(x), net(x))


class Norms(nn.Module):
    """A layer whose outputs are divided by their norm, once a batch norm has read them; its bias is no partner of one."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8, bias=bias), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).relu()
        return self.b(y / (y.norm(dim=1, keepdim=True) + 1))


def off(net: nn.Module, *names: str) -> None:
    """Set channels 1 and 2 of some tensors to zero: columns of `b`, rows of others."""
    with torch.no_grad():
        for name in names:
            tensor = net.state_dict()[name]
            tensor[:, 1:3].zero_() if name == "b.weight" else tensor[1:3].zero_()


@pytest.mark.parametrize(
    ("zero", "silent"),
    [
        (("norm.weight", "norm.bias"), True),  # what the norm hands on is zero, whatever it reads
        (("a.weight", "norm.bias", "norm.running_mean"), True),
        (("a.weight", "norm.bias"), False),  # it subtracts a mean that is not zero
        (("a.weight",), False),
        (("norm.weight",), False),
        (("b.weight",), False),  # nothing reads it, and the norm is one of all channels all the same
        (("a.weight", "b.weight"), False),
    ],
)
def test_what_is_summed_is_silent_where_it_is_zero_all_the_way(zero: tuple[str, ...], silent: bool) -> None:
    torch.manual_seed(0)
    net = Norms().double().eval()
    net.norm.running_mean.normal_()
    nn.init.normal_(net.norm.bias)
    off(net, *zero)
    x = torch.randn(4, 5, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    (found,) = silent_channels(net, graph)
    assert np.flatnonzero(found).tolist() == ([1, 2] if silent else [])
    if silent:
        wanted = on(net, [x])
        assert remove(net, x, measure=False).refused == {}
        assert alike(wanted, on(net, [x]))
        assert net.a.out_features == 6


def test_a_buffer_that_is_added_is_not_zero_and_the_reason_names_it() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("pos", torch.randn(1, 9, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.pos[:, : x.shape[1]]
            return self.b(y / y.norm(dim=-1, keepdim=True))

    reason = channel_graph(Positions(), (torch.randn(2, 6, 5),)).pinned["a.weight", 0]
    assert "not zero where its channel is silent" in reason
    assert "pos is a buffer" in reason


def test_of_an_attention_by_hand_heads_go_before_the_width_of_a_head() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
            self.near = nn.Parameter(torch.randn(6, 8))  # positions, of the width of a head

        def forward(self, x: Tensor) -> Any:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
            a = (q @ (k + self.near).transpose(-2, -1) / 2).softmax(-1)
            return self.proj((a @ v).transpose(1, 2).reshape(b, t, -1))

    graph = channel_graph(Attention(), (torch.randn(2, 6, 16),))
    assert [group.channels for group in graph.groups if ("qkv.weight", 0) in group.places] == [2]
    assert graph.groups[0].places["qkv.weight", 0].shape == (2, 24)  # a head's q, k and v


class BySum(nn.Module):
    """A norm that divides a sum by the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.size(-1) + 1e-6) * self.g


class ByLength(BySum):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 + 1e-6) * self.g


@pytest.mark.parametrize("norm", [BySum, ByLength])
def test_a_norm_that_divides_by_a_width_in_its_code_is_told_the_dense_one(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), norm(), nn.Linear(8, 3)).double().eval(), torch.randn(4, 6).double()
    halved(net, x)
    wanted = on(net, [x, x[:1]])
    assert remove(net, x, measure=False).refused == {}
    assert net[0].out_features == 4 and alike(wanted, on(net, [x, x[:1]]))
