"""Random networks with inputs to run on, small enough to train some steps in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import Residual, perceptron

NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm


@dataclass(frozen=True)
class Net:
    """A kind of network, who makes one, who makes its inputs, and the number of its outputs."""

    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    classes: int

    def model(self, seed: int = 0) -> nn.Module:
        """The network, the same each time; its norms are not those that it starts with."""
        torch.manual_seed(seed)
        model = self.make()
        for module in model.modules():
            if isinstance(module, NORMS) and module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    def batch(self, step: int, size: int = 6) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        torch.manual_seed(1000 + step)
        return self.inputs(size), torch.randint(0, self.classes, (size,))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of a step's batch."""
        x, y = self.batch(step)
        return F.cross_entropy(model(x), y)


class Recurrent(nn.Module):
    """Numbers of words, an LSTM and a head."""

    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(x))[0][:, -1])


class Attending(nn.Module):
    """An encoder's layer of torch, and a head."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def convolutions(draw: random.Random, classes: int) -> nn.Sequential:
    """Convolutions, some depthwise, with norms or without."""
    layers: list[nn.Module] = []
    width = 3
    for _ in range(draw.randint(1, 3)):
        out = draw.choice((4, 5, 6, 8))
        layers.append(nn.Conv2d(width, out, draw.choice((1, 3)), padding=1, bias=draw.random() < 0.5))
        if draw.random() < 0.7:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU())
        if draw.random() < 0.3:
            layers += [nn.Conv2d(out, out, 3, padding=1, groups=out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def random_net(draw: random.Random, *kinds: str) -> Net:
    """A network by chance, of one of these kinds, or of any."""
    kind = draw.choice(kinds or ("perceptron", "convolutions", "residual", "recurrent", "attending"))
    classes, width, seed = draw.randint(2, 6), 4 * draw.randint(1, 3), draw.randrange(1 << 30)
    images = lambda size: torch.randn(size, 3, 6, 6)  # noqa: E731 - one of five
    widths = (draw.randint(3, 9), *(draw.randint(4, 16) for _ in range(draw.randint(1, 3))), classes)
    found: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
        "perceptron": (lambda: perceptron(*widths), lambda size: torch.randn(size, widths[0]), classes),
        "convolutions": (lambda: convolutions(random.Random(seed), classes), images, classes),
        "residual": (lambda: Residual(width, width + 2), images, 5),
        "recurrent": (lambda: Recurrent(11, width, classes), lambda size: torch.randint(0, 11, (size, 4)), classes),
        "attending": (lambda: Attending(width, 2, classes), lambda size: torch.randn(size, 3, width), classes),
    }
    return Net(kind, *found[kind])
