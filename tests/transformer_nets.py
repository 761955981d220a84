"""Transformers by hand, of any design that is asked for: functional code and torch.nn alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Design", "OwnRMSNorm", "Transformer"]

VOCABULARY, FEATURES, CLASSES, LONGEST = 19, 7, 5, 16


@dataclass(frozen=True)
class Design:
    """What a transformer is made of.

    Attributes:
        depth: Blocks.
        heads: Heads of queries.
        shared: Heads of queries that share one of keys and values.
        norm: `layer`, `rms` (torch's) or `own rms` (written out).
        pre: True for norms in front of attention and MLP, False for norms of the sums.
        positions: `learned`, `rotary`, `waves` (a buffer that is added: no mask makes it zero) or `none`.
        reads: `tokens`, or `patches`: vectors through a linear layer.
        token: True for a class token in front, which alone is read at the end.
        tied: True for a head that is the embedding; of tokens only.
        gated: True for a gated MLP.
        fused: True for one layer of queries, keys and values.
        bias: True for linear layers with a bias.
        causal: True for attention to what came before.
    """

    depth: int = 1
    heads: int = 2
    shared: int = 1
    norm: str = "layer"
    pre: bool = True
    positions: str = "learned"
    reads: str = "tokens"
    token: bool = False
    tied: bool = False
    gated: bool = False
    fused: bool = False
    bias: bool = True
    causal: bool = False
    stream: int = 12
    width: int = 4
    hidden: int = 10


class OwnRMSNorm(nn.Module):
    """RMS norm as language models write it out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean of squares, then scale."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def _norm(design: Design) -> nn.Module:
    if design.norm == "own rms":
        return OwnRMSNorm(design.stream)
    return (nn.LayerNorm if design.norm == "layer" else nn.RMSNorm)(design.stream, eps=1e-3)


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        inner, pairs, bias = design.heads * design.width, design.heads // design.shared * design.width, design.bias
        self.design = design
        self.sizes = [inner, pairs, pairs]
        self.norm1, self.norm2 = _norm(design), _norm(design)
        sizes = [sum(self.sizes)] if design.fused else self.sizes
        self.into = nn.ModuleList([nn.Linear(design.stream, size, bias=bias) for size in sizes])
        self.out = nn.Linear(inner, design.stream, bias=bias)
        self.up, self.down = nn.Linear(design.stream, design.hidden, bias=bias), nn.Linear(design.hidden, design.stream)
        self.gate = nn.Linear(design.stream, design.hidden, bias=bias) if design.gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.design.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.think(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.think(x))

    def attend(self, x: Tensor) -> Tensor:
        d, (n, length, _) = self.design, x.shape
        if d.fused and d.shared == 1:
            q, k, v = self.into[0](x).reshape(n, length, 3, -1, d.width).permute(2, 0, 3, 1, 4)
        elif d.fused:
            per = d.shared + 2  # of each head of keys: its queries, the key, the value
            parts = self.into[0](x).reshape(n, length, -1, per, d.width)
            q = parts[..., : d.shared, :].reshape(n, length, -1, d.width).transpose(1, 2)
            k, v = (parts[..., i, :].transpose(1, 2) for i in (d.shared, d.shared + 1))
        else:
            q, k, v = (layer(x).reshape(n, length, -1, d.width).transpose(1, 2) for layer in self.into)
        if d.positions == "rotary":
            q, k = _turned(q), _turned(k)
        if d.shared > 1:
            k, v = (t[:, :, None].expand(-1, -1, d.shared, -1, -1).reshape(n, -1, length, d.width) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(d.width)
        if d.causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))

    def think(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions, of halves of a head."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Transformer(nn.Module):
    """Transformer of a design, in float64, with norms unlike new ones."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        tokens = design.reads == "tokens"
        self.read = nn.Embedding(VOCABULARY, design.stream) if tokens else nn.Linear(FEATURES, design.stream)
        self.token = nn.Parameter(torch.randn(1, 1, design.stream)) if design.token else None
        self.places = nn.Parameter(torch.randn(1, LONGEST, design.stream)) if design.positions == "learned" else None
        waves = torch.arange(LONGEST)[None, :, None] * 0.7 ** torch.arange(design.stream)
        self.register_buffer("waves", waves.sin() if design.positions == "waves" else None)
        self.blocks = nn.ModuleList([Block(design) for _ in range(design.depth)])
        self.norm = _norm(design)
        classes = VOCABULARY if tokens else CLASSES
        self.head = nn.Linear(design.stream, classes, bias=not design.tied)
        if design.tied:
            self.head.weight = self.read.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        if self.places is not None:
            x = x + self.places[:, : x.shape[1]]
        if self.waves is not None:
            x = x + self.waves[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.token is not None else x)

    def inputs(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Inputs that it reads."""
        dice = torch.Generator().manual_seed(seed)
        if self.design.reads == "tokens":
            return torch.randint(VOCABULARY, (batch, length), generator=dice)
        return torch.randn(batch, length, FEATURES, generator=dice, dtype=torch.float64)
