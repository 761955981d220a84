"""Networks written by hand: kinds that no other zoo has, and operations that people write themselves.

Each is a function that gives a network and its inputs, listed in `TABLE`. Over 300 lines, since it is a list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

__all__ = ["NAMES", "build"]

Built = tuple[nn.Module, tuple[Any, ...]]


class Net(nn.Module):
    """A network of named parts, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = run

        self.__class__ = OfOne if run.__code__.co_argcount == 2 else OfTwo

    def forward(self, x: Any, y: Any = None) -> Any:
        raise NotImplementedError


class OfOne(Net):
    """A network of one input: code that people write names its inputs, and torch.fx does not trace `*inputs`."""

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


class OfTwo(Net):
    """A network of two inputs."""

    def forward(self, x: Any, y: Any) -> Any:
        return self.run(self, x, y)


def conv(a: int, b: int, k: int = 3, **more: Any) -> nn.Sequential:
    """A convolution that keeps the size, its norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(b), nn.ReLU())


def head(a: int) -> nn.Sequential:
    """A classifier of ten classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, 10))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    pairs = list(itertools.pairwise(sizes))
    layers = [layer for a, b in pairs[:-1] for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(*pairs[-1]))


def images(n: int = 2, c: int = 3, side: int = 16) -> tuple[Tensor]:
    return (torch.randn(n, c, side, side),)


def rows(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape),)


# --- attention over channels and pixels ------------------------------------------------------------------------------


def _cbam(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    gate = m.mlp(x.mean((2, 3))) + m.mlp(x.amax((2, 3)))
    x = x * gate.sigmoid()[:, :, None, None]
    place = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return m.head(m.b(x * m.place(place).sigmoid()))


def cbam() -> Built:
    return Net(
        _cbam, a=conv(3, 16), b=conv(16, 24), mlp=mlp(16, 8, 16), place=nn.Conv2d(2, 1, 7, padding=3), head=head(24)
    ), images()


def _eca(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    gate = m.slide(x.mean((2, 3))[:, None])[:, 0].sigmoid()
    return m.head(m.b(x * gate[:, :, None, None]))


def eca() -> Built:
    return Net(_eca, a=conv(3, 16), b=conv(16, 24), slide=nn.Conv1d(1, 1, 3, padding=1, bias=False), head=head(24)), images()


def _gct(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    norm = (x.pow(2).sum((2, 3), keepdim=True) + 1e-5).sqrt() * m.alpha
    gate = 1 + (m.gamma * norm / (norm.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() + m.beta).tanh()
    return m.head(m.b(x * gate))


def gct() -> Built:
    sizes = {name: torch.rand(1, 16, 1, 1) + 0.5 for name in ("alpha", "gamma", "beta")}
    return Net(_gct, a=conv(3, 16), b=conv(16, 24), head=head(24), **sizes), images()


class Normed2d(nn.Module):
    """A layer norm over the channels of an image, as NAFNet and ConvNeXt write it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]


def _nafnet(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    a, b = m.deep(m.wide(m.norm1(x))).chunk(2, 1)
    y = a * b
    x = x + m.back(y * m.squeeze(y)) * m.beta
    a, b = m.wide2(m.norm2(x)).chunk(2, 1)
    return m.end(x + m.back2(a * b) * m.gamma)


def nafnet() -> Built:
    parts: dict[str, Any] = {
        "stem": nn.Conv2d(3, 16, 3, padding=1),
        "norm1": Normed2d(16),
        "wide": nn.Conv2d(16, 32, 1),
        "deep": nn.Conv2d(32, 32, 3, padding=1, groups=32),
        "squeeze": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1)),
        "back": nn.Conv2d(16, 16, 1),
        "norm2": Normed2d(16),
        "wide2": nn.Conv2d(16, 32, 1),
        "back2": nn.Conv2d(16, 16, 1),
        "end": nn.Conv2d(16, 3, 3, padding=1),
        "beta": torch.ones(1, 16, 1, 1),
        "gamma": torch.ones(1, 16, 1, 1),
    }
    return Net(_nafnet, **parts), images()


def _dynamic(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    share = m.route(x.mean((2, 3))).softmax(-1)
    kernels = (share @ m.kernels.flatten(1)).view(-1, *m.kernels.shape[2:])
    n, c, h, w = x.shape
    y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, -1, h, w)
    return m.head(m.norm(y))


def dynamic_convolution() -> Built:
    kernels = torch.randn(4, 24, 16, 3, 3) * 0.1
    return Net(
        _dynamic, a=conv(3, 16), route=nn.Linear(16, 4), kernels=kernels, norm=nn.BatchNorm2d(24), head=head(24)
    ), images()


def _non_local(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    q, k, v = (f(x).flatten(2) for f in (m.q, m.k, m.v))
    y = (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])
    return m.head(x + m.o(y))


def non_local() -> Built:
    return Net(_non_local, a=conv(3, 16), q=nn.Conv2d(16, 8, 1), k=nn.Conv2d(16, 8, 1), v=nn.Conv2d(16, 8, 1),
               o=nn.Conv2d(8, 16, 1), head=head(16)), images()  # fmt: skip


# --- mixtures, generators, weights that are made ---------------------------------------------------------------------


def _mann(m: Any, x: Tensor) -> Any:
    share = m.gate(x).softmax(-1)
    x = F.elu(torch.einsum("be,eoi,bi->bo", share, m.w1, x) + share @ m.b1)
    return torch.einsum("be,eoi,bi->bo", share, m.w2, x) + share @ m.b2


def blended_experts() -> Built:
    sizes = {"w1": (4, 32, 12), "b1": (4, 32), "w2": (4, 6, 32), "b2": (4, 6)}
    return Net(_mann, gate=mlp(12, 16, 4), **{k: torch.randn(v) * 0.3 for k, v in sizes.items()}), rows(3, 12)


def _style(m: Any, z: Tensor) -> Any:
    style = m.mapping(z)
    x = m.start.expand(z.shape[0], -1, -1, -1)
    for weight, affine in ((m.w1, m.s1), (m.w2, m.s2)):
        scale = affine(style) + 1
        kernels = weight[None] * scale[:, None, :, None, None]
        kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        n, c, h, w = x.shape
        x = F.conv2d(x.reshape(1, n * c, h, w), kernels.flatten(0, 1), padding=1, groups=n).view(n, -1, h, w)
        x = F.leaky_relu(x, 0.2)
    return m.image(x)


def style_generator() -> Built:
    parts = {"start": torch.randn(1, 16, 4, 4), "w1": torch.randn(24, 16, 3, 3) * 0.1, "w2": torch.randn(16, 24, 3, 3) * 0.1}
    layers = {"mapping": mlp(8, 16, 16), "s1": nn.Linear(16, 16), "s2": nn.Linear(16, 24), "image": nn.Conv2d(16, 3, 1)}
    return Net(_style, **layers, **parts), rows(2, 8)


def _hyper(m: Any, x: Tensor, z: Tensor) -> Any:
    weight = m.make(z).view(-1, 16, 8)
    return m.out(torch.bmm(weight, m.first(x).relu()[:, :, None])[:, :, 0].relu())


def hypernetwork() -> Built:
    return Net(_hyper, make=mlp(4, 16, 128), first=nn.Linear(6, 8), out=nn.Linear(16, 3)), (
        torch.randn(2, 6),
        torch.randn(2, 4),
    )


def _film(m: Any, x: Tensor, z: Tensor) -> Any:
    scale, shift = m.film(z).chunk(2, -1)
    return m.head((m.a(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]).relu())


def film() -> Built:
    return Net(_film, a=nn.Conv2d(3, 16, 3), film=mlp(4, 16, 32), head=head(16)), (*images(), torch.randn(2, 4))


def _mixture(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    share = m.gate(x).softmax(-1)
    return m.out(sum(share[:, i : i + 1] * expert(x) for i, expert in enumerate(m.experts)).relu())


def soft_mixture() -> Built:
    experts = nn.ModuleList(mlp(16, 24, 16) for _ in range(3))
    return Net(_mixture, stem=nn.Linear(8, 16), gate=nn.Linear(16, 3), experts=experts, out=nn.Linear(16, 4)), rows(3, 8)


def _vae(m: Any, x: Tensor) -> Any:
    mean, spread = m.encode(x).chunk(2, -1)
    return m.decode(mean + spread.exp() * 0.1), mean, spread


def autoencoder_variational() -> Built:
    return Net(_vae, encode=mlp(12, 32, 16), decode=mlp(8, 32, 12)), rows(3, 12)


def _tied(m: Any, x: Tensor) -> Any:
    return F.linear(m.layer(x).relu(), m.layer.weight.t())


def autoencoder_tied() -> Built:
    return Net(_tied, layer=nn.Linear(12, 24)), rows(3, 12)


def _masked(m: Any, x: Tensor) -> Any:
    return m.out(F.linear(x, m.layer.weight * torch.ones(24, 12).tril(), m.layer.bias).relu())


def masked_linear() -> Built:
    return Net(_masked, layer=nn.Linear(12, 24), out=nn.Linear(24, 12)), rows(3, 12)


def weight_normed() -> Built:
    layers = [parametrizations.weight_norm(nn.Conv1d(a, b, 3, padding=1)) for a, b in ((4, 16), (16, 24))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Conv1d(24, 4, 1)), rows(2, 4, 12)


def spectral_normed() -> Built:
    layers = [parametrizations.spectral_norm(nn.Conv2d(a, b, 3, padding=1)) for a, b in ((3, 16), (16, 24))]
    return nn.Sequential(layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), head(24)), images()


# --- sequences -------------------------------------------------------------------------------------------------------


def _wavenet(m: Any, x: Tensor) -> Any:
    x, skips = m.stem(x), 0
    for gate, filter, residual, skip in zip(m.gates, m.filters, m.residuals, m.skips, strict=True):
        y = filter(x).tanh() * gate(x).sigmoid()
        skips = skips + skip(y)
        x = x + residual(y)
    return m.out(skips.relu())


def wavenet() -> Built:
    def layers(a: int, b: int, k: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(a, b, k, padding=d * (k - 1) // 2, dilation=d) for d in (1, 2))

    parts = {
        "gates": layers(16, 12, 3),
        "filters": layers(16, 12, 3),
        "residuals": layers(12, 16, 1),
        "skips": layers(12, 20, 1),
    }
    return Net(_wavenet, stem=nn.Conv1d(2, 16, 1), out=nn.Conv1d(20, 4, 1), **parts), rows(2, 2, 24)


def _seq2seq(m: Any, x: Tensor, y: Tensor) -> Any:
    states, last = m.encoder(m.words(x))
    outputs, _ = m.decoder(m.words(y), last)
    seen = (outputs @ m.bridge(states).transpose(1, 2)).softmax(-1) @ states
    return m.out(torch.cat([outputs, seen], -1).tanh())


def recurrent_with_attention() -> Built:
    parts = {"encoder": nn.GRU(16, 24, batch_first=True), "decoder": nn.GRU(16, 24, batch_first=True)}
    net = Net(_seq2seq, words=nn.Embedding(20, 16), bridge=nn.Linear(24, 24), out=nn.Linear(48, 20), **parts)
    return net, (torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (2, 5)))


def _bidirectional(m: Any, x: Tensor) -> Any:
    return m.out(m.rnn(m.words(x))[0].amax(1))


def recurrent_both_ways() -> Built:
    rnn = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
    return Net(_bidirectional, words=nn.Embedding(20, 16), rnn=rnn, out=nn.Linear(24, 3)), (torch.randint(0, 20, (2, 7)),)


def _cells(m: Any, x: Tensor) -> Any:
    state = (x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16))
    for step in range(4):
        state = m.cell(m.stem(x[:, step]).relu(), state)
    return m.out(state[0])


def cells_by_hand() -> Built:
    return Net(_cells, stem=nn.Linear(6, 12), cell=nn.LSTMCell(12, 16), out=nn.Linear(16, 3)), rows(2, 4, 6)


def _conv_lstm(m: Any, x: Tensor) -> Any:
    hidden = cell = x.new_zeros(x.shape[0], 8, *x.shape[-2:])
    for step in range(3):
        i, f, o, g = m.gates(torch.cat([x[:, step], hidden], 1)).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
    return m.head(hidden)


def convolutional_lstm() -> Built:
    return Net(_conv_lstm, gates=nn.Conv2d(11, 32, 3, padding=1), head=head(8)), rows(2, 3, 3, 8, 8)


def _nbeats(m: Any, x: Tensor) -> Any:
    forecast = 0
    for block in m.blocks:
        back, ahead = block(x).split([12, 4], -1)
        x, forecast = x - back, forecast + ahead
    return forecast


def nbeats() -> Built:
    return Net(_nbeats, blocks=nn.ModuleList(mlp(12, 32, 32, 16) for _ in range(3))), rows(3, 12)


def _mamba(m: Any, x: Tensor) -> Any:
    y = m.norm(m.stem(x))
    a, gate = m.wide(y).chunk(2, -1)
    a = F.silu(m.deep(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    decay = F.logsigmoid(m.decay(a)).cumsum(1)
    a = (a * (-decay).exp().clamp(max=1e4)).cumsum(1) * decay.exp()
    return m.out(m.back(a * F.silu(gate)))


def scan_of_states() -> Built:
    parts: dict[str, Any] = {
        "stem": nn.Linear(6, 16),
        "norm": nn.LayerNorm(16),
        "wide": nn.Linear(16, 48),
        "decay": nn.Linear(24, 24),
        "deep": nn.Conv1d(24, 24, 3, padding=2, groups=24),
        "back": nn.Linear(24, 16),
        "out": nn.Linear(16, 3),
    }
    return Net(_mamba, **parts), rows(2, 8, 6)


def _fnet(m: Any, x: Tensor) -> Any:
    x = m.words(x)
    x = m.norm(x + torch.fft.fft(x, dim=1).real)
    return m.out((x + m.mlp(x)).mean(1))


def fourier_mixing() -> Built:
    net = Net(_fnet, words=nn.Embedding(20, 16), norm=nn.LayerNorm(16), mlp=mlp(16, 32, 16), out=nn.Linear(16, 3))
    return net, (torch.randint(0, 20, (2, 8)),)


def _perceiver(m: Any, x: Tensor) -> Any:
    latents = m.latents.expand(x.shape[0], -1, -1)
    k, v = m.kv(m.norm(x)).chunk(2, -1)
    latents = latents + m.o((m.q(latents) @ k.transpose(1, 2) / 4).softmax(-1) @ v)
    return m.out((latents + m.mlp(m.norm2(latents))).mean(1))


def perceiver() -> Built:
    parts: dict[str, Any] = {
        "latents": torch.randn(1, 4, 16),
        "norm": nn.LayerNorm(6),
        "kv": nn.Linear(6, 32),
        "q": nn.Linear(16, 16),
        "o": nn.Linear(16, 16),
        "norm2": nn.LayerNorm(16),
        "mlp": mlp(16, 32, 16),
        "out": nn.Linear(16, 3),
    }
    return Net(_perceiver, **parts), rows(2, 9, 6)


def transformer_of_torch() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)), rows(
        2, 7, 6
    )


def _causal(m: Any, x: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=m.out.weight.dtype)
    return m.out(m.encoder(m.words(x), mask=mask))


def causal_of_torch() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Net(_causal, words=nn.Embedding(20, 16), encoder=encoder, out=nn.Linear(16, 20)), (torch.randint(0, 20, (2, 7)),)


def _both(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.out(m.net(m.words(x), m.words(y)))


def encoder_and_decoder_of_torch() -> Built:
    net = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
    return Net(_both, words=nn.Embedding(20, 16), net=net, out=nn.Linear(16, 20)), (
        torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (2, 5)),
    )  # fmt: skip


# --- graphs, sets, tables, fields ------------------------------------------------------------------------------------


def _edges(n: int) -> Tensor:
    return torch.stack([torch.arange(n), (torch.arange(n) * 3 + 1) % n])


def _graph_net(m: Any, x: Tensor) -> Any:
    edges = m.edges
    for layer in m.layers:
        y = layer(x)
        x = torch.zeros_like(y).index_add(0, edges[1], y[edges[0]]).relu() + y
    return m.out(x)


class Graphs(Net):
    """A network on a graph, whose edges are a buffer."""

    def __init__(self, run: Callable[..., Any], n: int, **parts: Any) -> None:
        super().__init__(run, **parts)
        self.register_buffer("edges", _edges(n))


def graph_convolution() -> Built:
    return Graphs(_graph_net, 8, layers=nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 24)]), out=nn.Linear(24, 3)), rows(8, 6)


def _graph_attention(m: Any, x: Tensor) -> Any:
    (start, end), y = m.edges, m.a(x)
    weight = F.leaky_relu(m.score(torch.cat([y[start], y[end]], -1))).sigmoid()
    place = end[:, None].expand(-1, y.shape[1])
    return m.out(torch.zeros_like(y).scatter_add(0, place, y[start] * weight).relu())


def graph_attention() -> Built:
    return Graphs(_graph_attention, 8, a=nn.Linear(6, 16), score=nn.Linear(32, 1), out=nn.Linear(16, 3)), rows(8, 6)


def _point_net(m: Any, x: Tensor) -> Any:
    y = m.points(x)
    whole = y.amax(2, keepdim=True).expand(-1, -1, x.shape[2])
    return m.out(torch.cat([m.points[0](x), whole], 1))


def point_net() -> Built:
    points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
    return Net(_point_net, points=points, out=nn.Conv1d(48, 4, 1)), rows(2, 3, 20)


def _deep_set(m: Any, x: Tensor) -> Any:
    return m.rho(m.phi(x).sum(1))


def deep_set() -> Built:
    return Net(_deep_set, phi=mlp(4, 32, 24), rho=mlp(24, 16, 3)), rows(2, 9, 4)


def _table(m: Any, numbers: Tensor, words: Tensor) -> Any:
    parts = [table(words[:, i]) for i, table in enumerate(m.tables)]
    x = torch.cat([numbers, *parts], -1)
    return m.deep(x) + m.wide(x)


def table_with_categories() -> Built:
    tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
    return Net(_table, tables=tables, deep=mlp(28, 32, 16, 1), wide=nn.Linear(28, 1)), (
        torch.randn(3, 4),
        torch.randint(0, 10, (3, 3)),
    )


def _factors(m: Any, x: Tensor) -> Any:
    fields = m.words(x)
    both = (fields.sum(1).square() - fields.square().sum(1)) / 2
    return m.out(torch.cat([both, m.deep(fields.flatten(1))], -1))


def factorization_machine() -> Built:
    return Net(_factors, words=nn.Embedding(20, 8), deep=mlp(32, 24, 8), out=nn.Linear(16, 1)), (torch.randint(0, 20, (3, 4)),)


def _towers(m: Any, x: Tensor, y: Tensor) -> Any:
    a, b = F.normalize(m.left(x), dim=-1), F.normalize(m.right(y), dim=-1)
    return a @ b.t() * m.scale.exp()


def two_towers() -> Built:
    return Net(_towers, left=mlp(6, 32, 16), right=mlp(8, 32, 16), scale=torch.ones(())), (torch.randn(3, 6), torch.randn(3, 8))


def _bilinear(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.out(m.both(m.a(x).relu(), m.b(y).relu()).relu())


def bilinear() -> Built:
    net = Net(_bilinear, a=nn.Linear(6, 12), b=nn.Linear(8, 10), both=nn.Bilinear(12, 10, 16), out=nn.Linear(16, 3))
    return net, (torch.randn(3, 6), torch.randn(3, 8))


def _field(m: Any, x: Tensor) -> Any:
    high = torch.cat([x, *[f(x * 2.0**k) for k in range(3) for f in (torch.sin, torch.cos)]], -1)
    y = m.first(high)
    return m.out(m.second(torch.cat([y, high], -1)).relu())


def radiance_field() -> Built:
    return Net(_field, first=nn.Sequential(mlp(21, 32, 32), nn.ReLU()), second=nn.Linear(53, 32), out=nn.Linear(32, 4)), rows(
        9, 3
    )


def _siren(m: Any, x: Tensor) -> Any:
    return m.c(torch.sin(m.b(torch.sin(m.a(x) * 3))))


def siren() -> Built:
    return Net(_siren, a=nn.Linear(2, 24), b=nn.Linear(24, 24), c=nn.Linear(24, 1)), rows(9, 2)


def _flow(m: Any, x: Tensor) -> Any:
    a, b = x.chunk(2, -1)
    total = 0.0
    for net in m.nets:
        scale, shift = net(a).chunk(2, -1)
        a, b = b * scale.tanh().exp() + shift, a
        total = total + scale.sum(-1)
    return torch.cat([a, b], -1), total


def coupling_flow() -> Built:
    return Net(_flow, nets=nn.ModuleList(mlp(6, 24, 12) for _ in range(3))), rows(3, 12)


def _shuffle(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return F.pixel_shuffle(m.c(y + m.b(y)), 2)


def super_resolution() -> Built:
    return Net(
        _shuffle, a=conv(3, 16), b=nn.Sequential(conv(16, 24), nn.Conv2d(24, 16, 3, padding=1)), c=nn.Conv2d(16, 12, 1)
    ), images()


def _siamese(m: Any, x: Tensor, y: Tensor) -> Any:
    a, b = m.body(x), m.body(y)
    return m.out((a - b).abs()), F.cosine_similarity(a, b)


def siamese() -> Built:
    body = nn.Sequential(conv(3, 16), conv(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(_siamese, body=body, out=nn.Linear(24, 1)), (*images(), *images())


def _in_place(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y.clone()
    z[:, :8] += m.b(y)
    return m.head(z)


def slices_in_place() -> Built:
    return Net(_in_place, a=conv(3, 16), b=nn.Conv2d(16, 8, 1), head=head(16)), images()


def _duel(m: Any, x: Tensor) -> Any:
    y = m.body(x)
    value, advantage = m.value(y), m.advantage(y)
    return value + advantage - advantage.mean(-1, keepdim=True)


def dueling() -> Built:
    return Net(_duel, body=mlp(6, 32, 24), value=mlp(24, 16, 1), advantage=mlp(24, 16, 4)), rows(3, 6)


def _spline(m: Any, x: Tensor) -> Any:
    for weight, base in ((m.w1, m.b1), (m.w2, m.b2)):
        bumps = torch.exp(-((x[..., None] - torch.linspace(-1, 1, 5, dtype=x.dtype)) ** 2) * 4)
        x = torch.einsum("bik,oik->bo", bumps, weight) + base(F.silu(x))
    return x


def kolmogorov_arnold() -> Built:
    parts = {"w1": torch.randn(16, 6, 5) * 0.3, "w2": torch.randn(3, 16, 5) * 0.3}
    return Net(_spline, b1=nn.Linear(6, 16), b2=nn.Linear(16, 3), **parts), rows(4, 6)


def _capsules(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    u = y.view(y.shape[0], 4, -1, *y.shape[2:]).flatten(3).mean(-1)
    u = u * (u.norm(dim=-1, keepdim=True) / (1 + u.square().sum(-1, keepdim=True)))
    return m.out(u.flatten(1))


def capsules() -> Built:
    return Net(_capsules, a=conv(3, 16), out=nn.Linear(16, 3)), images()


def _checkpointed(m: Any, x: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    return m.head(checkpoint(m.b, m.a(x), use_reentrant=False))


def recomputed() -> Built:
    return Net(_checkpointed, a=conv(3, 16), b=conv(16, 24), head=head(24)), images()


def _careful(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        y = m.b(m.a(x))
    return m.head(y)


def without_autocast() -> Built:
    return Net(_careful, a=conv(3, 16), b=conv(16, 24), head=head(24)), images()


def _gated_units(m: Any, x: Tensor) -> Any:
    a, b = m.wide(m.norm(x)).chunk(2, -1)
    b = m.space(m.inner(b).transpose(1, 2)).transpose(1, 2)
    return m.out(x + m.back(a * b))


def spatial_gating() -> Built:
    parts = {"norm": nn.LayerNorm(12), "wide": nn.Linear(12, 48), "inner": nn.LayerNorm(24), "space": nn.Linear(7, 7)}
    return Net(_gated_units, back=nn.Linear(24, 12), out=nn.Linear(12, 3), **parts), rows(2, 7, 12)


TABLE: dict[str, Callable[[], Built]] = {
    made.__name__.replace("_", "-"): made
    for made in (
        *(cbam, eca, gct, nafnet, dynamic_convolution, non_local, blended_experts, style_generator, hypernetwork, film),
        *(soft_mixture, autoencoder_variational, autoencoder_tied, masked_linear, weight_normed, spectral_normed, wavenet),
        *(recurrent_with_attention, recurrent_both_ways, cells_by_hand, convolutional_lstm, nbeats, scan_of_states),
        *(fourier_mixing, perceiver, transformer_of_torch, causal_of_torch, encoder_and_decoder_of_torch, graph_convolution),
        *(graph_attention, point_net, deep_set, table_with_categories, factorization_machine, two_towers, bilinear),
        *(radiance_field, siren, coupling_flow, super_resolution, siamese, slices_in_place, dueling, kolmogorov_arnold),
        *(capsules, recomputed, without_autocast, spatial_gating),
    )
}
NAMES = tuple(TABLE)


def build(name: str) -> Built:
    """A network, and its inputs."""
    return TABLE[name]()
