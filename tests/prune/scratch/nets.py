"""Networks of the tests of pruning from scratch, in which channels are coupled in different ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import Heads, residual


class Functional(nn.Module):
    """Two convolutions written by hand, with a norm between them: no module makes or reads a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.second = nn.Parameter(torch.randn(4, 8, 1, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(F.conv2d(x, self.first), None, None, self.scale, self.shift, training=True)
        return F.conv2d(F.relu(h), self.second).mean((2, 3))

    def reset_parameters(self) -> None:
        for weight in (self.first, self.second):
            nn.init.kaiming_normal_(weight)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)


def depthwise() -> nn.Module:
    """A pointwise and a depthwise convolution, each with its norm, and a linear layer that reads them."""
    layers = [nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    layers += [nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def grouped() -> nn.Module:
    """A convolution in two groups, before a linear layer that reads each of its channels at four places."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12 * 4, 4)),
    )


class Attention(nn.Module):
    """Torch's attention of four heads beside a shortcut, then a mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Read(nn.Module):
    """`Heads` with a mean over the sequence, so that there is one answer for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Heads(heads=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(1)


#: Name -> (maker, shape of a sample).
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (residual, (3, 6, 6)),
    "depthwise": (depthwise, (3, 6, 6)),
    "grouped": (grouped, (3, 6, 6)),
    "attention": (Attention, (5, 6)),
    "heads": (Read, (5, 6)),
    "functional": (Functional, (3, 6, 6)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """Make a network in float64, and a batch of four samples for it."""
    torch.manual_seed(0)
    maker, shape = NETS[name]
    return maker().double(), torch.randn(4, *shape, dtype=torch.float64)
