"""Workbench of the studies: two small networks, one training loop and the accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.participant import Participant
from fasterai.study.data import Data

__all__ = ["Residual", "accuracy", "draw_batches", "make_mlp", "make_residual", "take_steps", "train"]


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is one of kernel 1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways, without what is negative."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.short(x))


def make_residual(data: Data, width: int = 16) -> nn.Sequential:
    """Make a residual network of three blocks for images; with a width of 16 it has 77 thousand weights."""
    stem = [nn.Conv2d(data.channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, len(data.classes))]
    network = nn.Sequential(*stem, *blocks, *head).to(data.train[0].device)
    return network.to(memory_format=torch.channels_last)  # a third faster on a CPU


def make_mlp(data: Data, hidden: Sequence[int] = (256, 128)) -> nn.Sequential:
    """Make a network of linear layers for flattened images."""
    sizes = [data.channels * data.side**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], len(data.classes))).to(data.train[0].device)


def train(
    network: nn.Module,
    data: Data,
    participants: Sequence[Participant] = (),
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
) -> None:
    """Train a network with SGD under a one-cycle learning rate; the order and the flips follow from the seed.

    Args:
        network: The network, which is changed.
        data: The images.
        participants: Those who take part in the training, such as a Sparsifier.
        epochs: Passes over the training images.
        lr: The highest learning rate.
        seed: Of the order and the flips.
        batch_size: Images in a step; what is left over of an epoch is dropped, unless that were all.
    """
    per_epoch, batches = draw_batches(data, epochs, seed, batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    take_steps(network, optimizer, batches, F.cross_entropy, participants, lr=lr, steps=epochs * per_epoch)


def draw_batches(data: Data, epochs: int, seed: int, batch_size: int) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """Return the number of batches in an epoch, and those of all epochs; order and flips follow from the seed."""
    images, labels = data.train
    per_epoch = max(1, len(images) // batch_size)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            order = torch.split(torch.randperm(len(images), generator=generator), batch_size)[:per_epoch]
            for batch in (rows.to(images.device) for rows in order):
                x = images[batch]
                if data.flip:
                    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                    x = torch.where(mirrored.to(x.device), x.flip(3), x)
                yield x, labels[batch]

    return per_epoch, batches()


def take_steps(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    participants: Sequence[Participant] = (),
    *,
    lr: float,
    steps: int,
) -> None:
    """Take a step for each batch, in training mode, under a one-cycle learning rate.

    Args:
        network: The network, which is changed.
        optimizer: The optimizer of its parameters.
        batches: Inputs and what is wanted of them, as many as there are steps; each is asked for before its step.
        loss: `(outputs, wanted) -> loss`.
        participants: Those who take part in the training.
        lr: The highest learning rate.
        steps: The number of batches.
    """
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))
    network.train()
    with attach(optimizer, *participants, total_steps=steps, model=network) if participants else nullcontext() as handle:
        for x, y in batches:
            outputs = network(x)
            value = loss(outputs, y)
            if handle is not None:
                value = handle.loss(value, x, y, outputs)
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            rate.step()


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    """Return the share of the test images that a network names rightly, in eval mode, which it is left in."""
    network.eval()
    images, labels = data.test
    pairs = zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
    return sum(int((network(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)
