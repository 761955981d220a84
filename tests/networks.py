"""Small networks that several test files use; what one file alone needs stands there."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with a ReLU between: `perceptron(6, 10, 4)` reads 6 features, and has 10 hidden ones and 4 outputs."""
    torch.manual_seed(seed)
    layers = [layer for width in itertools.pairwise(widths) for layer in (nn.Linear(*width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Crossed(nn.Module):
    """Registered as conv1, conv2, norm1, norm2; conv1 is read by norm2, and conv2 by norm1."""

    def __init__(self, inputs: int = 4, width: int = 8, affine: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, 8, 3), nn.Conv2d(8, width, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(width, affine=affine), nn.BatchNorm2d(8, affine=affine)
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.norm1(self.conv2(F.silu(self.norm2(self.conv1(x)))))))


class Residual(nn.Module):
    """`stem` and `branch.3` make the same channels, as they are added; `branch.0` makes channels of its own."""

    def __init__(self, width: int = 6, inner: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(width, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.stem(x))
        return self.head((x + self.branch(x)).mean((2, 3)))


def residual(width: int = 6, inner: int = 4) -> Residual:
    """A `Residual` for pictures of three channels, whose norm is not the one that it starts with."""
    torch.manual_seed(0)
    model = Residual(width, inner)
    with torch.no_grad():
        model.branch[1].weight.uniform_(0.5, 1.5)
        model.branch[1].bias.uniform_(-0.5, 0.5)
    return model


class Branching(nn.Module):
    """Its code asks for a value of its input, which torch.export cannot follow."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


class Sloping(nn.Module):
    """Its code asks for values and for a gradient: neither an export nor a record of a run can follow it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.body(x).sum(), x)
        return self.body(slope) if slope.sum() > 0 else self.body(-slope)


class Counting(nn.Module):
    """Multiplies by the number of its calls, so that no two answer the same; whoever restores attributes does not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.numbers)


class Failing(nn.Module):
    """Does not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


class Heads(nn.Module):
    """An attention of two heads between linear layers, written as Hugging Face's BERT writes it."""

    def __init__(self, heads: int = 2, width: int = 8, features: int = 4) -> None:
        super().__init__()
        self.features = features
        self.embed = nn.Linear(6, width)
        self.query, self.key, self.value = (nn.Linear(width, heads * features) for _ in range(3))
        self.out = nn.Linear(heads * features, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        layers = self.query, self.key, self.value
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.features).transpose(1, 2) for layer in layers)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class TwoNames(nn.Module):
    """A layer that is registered twice, and one that shares its weight: Linear(4, 4) `stem` and `layers.0`, `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.stem])
        self.last = nn.Linear(4, 4)
        self.last.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers[0](x).relu())


def short_mobilenet() -> nn.Module:
    """MobileNetV2 with five of its seventeen blocks: with and without expansion, with strides and shortcuts."""
    from torchvision.models import MobileNetV2

    return MobileNetV2(num_classes=10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]])
