"""Removal where sizes are written into code: modules run a traced copy of it, with the sizes put right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import Removal, mask_channels_, remove
from fasterai.prune.surgery.rewriting import plain_class

# --- modules with sizes written into their code ---------------------------------------------------------------------------


class Attention(nn.Module):
    """As in many networks: the width of the input is taken for that of the heads."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.count, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.count, C // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        mixed = F.dropout(scores.softmax(-1), 0.0, self.training) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Batched(Attention):
    """Batch and heads are one dimension, whose size differs with the batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.count, C // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (y.reshape(B * self.count, N, C // self.count) for y in (q, k, v))
        mixed = (torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(B, self.count, N, C // self.count)
        return self.proj(mixed.permute(0, 2, 1, 3).reshape(B, N, C))


class Frozen(Attention):
    """The batch of two is written into the code as well."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, -1, 3, self.count, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj((F.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).reshape(2, -1, 12))


class Branching(Attention):
    """Control flow by values, which a trace cannot follow."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] % 2:
            return super().forward(F.pad(x, (0, 0, 0, 1)))[:, : x.shape[1]]
        return super().forward(x)


class Parts(nn.Module):
    """Parts of unequal sizes go different ways, by a split and by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 15), nn.Linear(5, 12), nn.Linear(10, 12)
        self.d = nn.Linear(15, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        few, many = y.split((5, 10), dim=-1)
        z = torch.cat([y[..., :4] * 2, y[..., 4:]], -1)
        return self.b(few) + self.c(many) + self.d(z)


class Spread(nn.Module):
    """A vector is spread over the places of each channel by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean(1)).sigmoid().view(-1, 1, 10).expand(x.shape[0], x.shape[1], 10)
        return self.b(self.a(x) * gate)


class Net(nn.Module):
    """One such module beside a residual path, once or several times."""

    def __init__(self, make: Any, times: int = 1) -> None:
        super().__init__()
        self.first, self.part, self.last, self.times = nn.Linear(6, 12), make(), nn.Linear(12, 3), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(self.times):
            x = x + self.part(x)
        return self.last(x)


def built(make: Any, times: int = 1) -> Net:
    torch.manual_seed(0)
    return Net(make, times).double().eval()


X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OTHERS = [X, torch.randn(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))]


def masked(net: nn.Module, dice: int = 0, x: Tensor = X) -> tuple[Any, list[np.ndarray]]:
    """Half of the channels of each group are silent."""
    graph, order = channel_graph(net, (x,)), np.random.default_rng(dice)
    kept = [order.permutation(g.channels) >= g.channels // 2 for g in graph.groups]
    mask_channels_(net, graph, kept)
    return graph, kept


def halved(net: nn.Module, **options: Any) -> tuple[Removal, list[Tensor]]:
    masked(net)
    wanted = [net(x) for x in OTHERS]
    return remove(net, X, measure=False, **options), wanted


def agrees(net: nn.Module, wanted: list[Tensor]) -> bool:
    return all(torch.allclose(net(x), y, rtol=0, atol=1e-12) for x, y in zip(OTHERS, wanted, strict=True))


CASES = {
    "attention": (Attention, "part.qkv.weight", (12, 6)),
    "batch and heads": (Batched, "part.qkv.weight", (12, 6)),
    "parts": (Parts, "part.a.weight", None),
    "spread": (Spread, "part.a.weight", (5, 6)),
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_what_has_its_sizes_in_its_code_goes_as_well(name: str, times: int) -> None:
    make, weight, _ = CASES[name]
    net = built(make, times)
    parameters = dict(net.named_parameters())
    removal, wanted = halved(net)
    assert removal.refused == {} and list(removal.plan.rewrites) == ["part"]
    assert "part: its code had sizes written into it; it runs a traced copy now" in str(removal)
    assert agrees(net, wanted)
    assert all(p is parameters[n] for n, p in net.named_parameters()) and list(net.state_dict()) == list(parameters)
    shape = parameters[weight].shape
    assert shape[0] < 0.8 * make().get_parameter(weight.removeprefix("part.")).shape[0] and shape[1] == 6
    assert isinstance(net.part, make) and plain_class(net.part) is make and type(net.part).__name__ == f"Traced{make.__name__}"


def test_without_rewriting_it_stays_as_before() -> None:
    net = built(Attention)
    removal, wanted = halved(net, rewrite=False)
    assert [*removal.refused] == ["part.qkv.weight"] or "part.qkv.weight" in removal.refused
    assert "the model fails without them" in removal.refused["part.qkv.weight"]
    assert removal.plan.rewrites == {} and type(net.part) is Attention and agrees(net, wanted)
    parts = channel_graph(built(Parts), (X,), rewrite=False)
    assert "cuts it at fixed positions" in parts.pinned["part.a.weight", 0]


class Noting(Attention):
    """What it saw last is noted on the module, in each forward pass."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = x.shape[1]
        return super().forward(x)


class Told(Attention):
    """It goes by a batch size that another module has told it."""

    batch = 2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) * self.batch


class Telling(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.part.batch = x.shape[0]
        return super().forward(x)


class Training(Attention):
    """In training it does something else."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) * 2 if self.training else super().forward(x)


class NoGradient(Attention):
    """A context that a trace does not see."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("make", [Branching, Noting, Told, Training, NoGradient])
def test_what_a_trace_would_freeze_keeps_its_own_code(make: Any) -> None:
    torch.manual_seed(0)
    net = (Telling if make is Told else Net)(make).double().eval()
    removal, wanted = halved(net)
    assert "part.qkv.weight" in removal.refused and removal.plan.rewrites == {}
    assert type(net.part) is make and agrees(net, wanted)
