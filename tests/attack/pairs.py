"""Random pairs of a student and a teacher, with batches for both: of images, features, words; with one input or two."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attack.networks import Attending, convolutions
from tests.networks import Residual, perceptron


class Words(nn.Module):
    """Numbers of words, an encoder's layer, and scores for each word."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x)))


class Wrapped(nn.Module):
    """A network with a second input, which is a factor, and outputs of one's choice."""

    def __init__(self, body: nn.Module, form: str) -> None:
        super().__init__()
        self.body, self.form = body, form

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Any:
        out = self.body(x)
        out = out if factor is None else out * factor
        return {"tensor": out, "tuple": (out, x), "dict": {"logits": out}}[self.form]


def logits_of(outputs: Any) -> Tensor:
    """The scores in outputs of any form."""
    found = outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class Pair:
    """Who makes the student and the teacher, and their batches."""

    kind: str
    student: Callable[[], nn.Module]
    teacher: Callable[[int], nn.Module]
    batch: Callable[[int], tuple[tuple[Any, ...], Tensor]]

    def task(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of the task, in float32."""
        scores = logits_of(outputs).float()
        return F.cross_entropy(scores.flatten(0, -2), labels.flatten(), ignore_index=-100)


def body(draw: random.Random, kind: str, classes: int, inputs: int) -> nn.Module:
    """A network by chance, of a kind."""
    width = 4 * draw.randint(1, 3)
    if kind == "perceptron":
        return perceptron(inputs, *(draw.randint(4, 12) for _ in range(draw.randint(1, 3))), classes)
    if kind == "convolutions":
        return convolutions(draw, classes)
    if kind == "residual":
        return Residual(width, draw.choice((4, 6, 8)))
    return Words(classes, width) if kind == "words" else Attending(inputs, 2, classes)


def random_pair(draw: random.Random) -> Pair:
    """A pair by chance; both networks read and return the same."""
    kind = draw.choice(("perceptron", "convolutions", "residual", "residual", "attending", "words"))
    classes = 5 if kind == "residual" else draw.randint(2, 6)
    inputs = 4 * draw.randint(1, 3)
    other = draw.choice(("convolutions", "residual")) if kind == "residual" else kind
    forms = [draw.choice(("plain", "plain", "tensor", "tuple", "dict")) for _ in range(2)]
    two = draw.random() < 0.4 and "plain" not in forms
    seeds = [draw.randrange(1 << 30) for _ in range(2)]

    def made(which: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        found = body(random.Random(seeds[which]), (kind, other)[which], classes, inputs)
        return found if forms[which] == "plain" else Wrapped(found, forms[which])

    shapes = {"perceptron": (6, inputs), "attending": (6, 3, inputs), "words": (6, 4)}
    shape = shapes.get(kind, (6, 3, 6, 6))

    def batch(i: int) -> tuple[tuple[Any, ...], Tensor]:
        torch.manual_seed(1000 + i)
        x = torch.randint(0, classes, shape) if kind == "words" else torch.randn(shape)
        y = torch.randint(0, classes, shape[:2] if kind == "words" else shape[:1])
        if kind == "words":
            y[:, 0] = -100
        return ((x, torch.full((), 0.5 + 0.1 * i)) if two else (x,)), y

    return Pair(kind, lambda: made(0, 1), lambda seed: made(1, seed), batch)
