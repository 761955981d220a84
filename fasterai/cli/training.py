"""Training loop of one network, dense or sparse, epoch by epoch, with a state to resume from."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fasterai.callbacks.plain import attach
from fasterai.cli.data import Data, Part
from fasterai.cli.errors import UsageError
from fasterai.sparse.sparsifier import Sparsifier

__all__ = ["Recipe", "Training", "augment", "check_epochs", "evaluate", "learning_rate", "shuffled"]

TRACE_POINTS = 200


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Images in a step, at most; at least 2.
        lr: The highest learning rate.
        seed: Of the order and the augmentation.
        device: Where the network is.
        crop: Shift training images by up to an eighth of their side.
        flip: Mirror every other training image.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: torch.device
    crop: bool = True
    flip: bool = True


class Training:
    """Network in training, with its optimizer, its sparsifier and its history.

    Attributes:
        history: One dict an epoch: training loss, accuracy, validation loss, sparsity.
        trace: `(epochs, sparsity)` over the steps, counted from the masks.
        seconds: Time spent so far, evaluation included.
    """

    def __init__(self, network: nn.Module, data: Data, recipe: Recipe, sparsifier: Sparsifier | None, name: str) -> None:
        self.network, self.data, self.recipe, self.sparsifier, self.name = network, data, recipe, sparsifier, name
        self.steps_per_epoch = len(shuffled(len(data.train), recipe.batch_size, torch.Generator()))
        self.total_steps = recipe.epochs * self.steps_per_epoch
        fused = recipe.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=0.01, fused=fused)
        self.handle = None if sparsifier is None else attach(self.optimizer, sparsifier, total_steps=self.total_steps)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)  # dropout
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.trace: list[tuple[float, float]] = [(0.0, self.sparsity)]

    @property
    def sparsity(self) -> float:
        """Share of units that the masks prune now, in [0, 1]."""
        return 0.0 if self.sparsifier is None else self.sparsifier.sparsity.overall

    @property
    def is_done(self) -> bool:
        """True if all epochs were trained."""
        return len(self.history) >= self.recipe.epochs

    def run_epoch(self) -> dict[str, float]:
        """Train and evaluate one epoch.

        Raises:
            UsageError: The loss is no longer finite.
        """
        start = time.perf_counter()
        loss = self._train_epoch()
        accuracy, valid_loss = evaluate(self.network, self.data, self.data.valid, self.recipe)
        self.seconds += time.perf_counter() - start
        epoch: dict[str, float] = {"epoch": len(self.history) + 1, "loss": loss, "accuracy": accuracy}
        epoch |= {"validation_loss": valid_loss, "sparsity": self.sparsity}
        self.history.append(epoch)
        return epoch

    def _train_epoch(self) -> float:
        """Train one pass over the training part, and return the mean loss per image."""
        self.network.train()
        total = 0.0
        batches = shuffled(len(self.data.train), self.recipe.batch_size, self.generator)
        title = f"{self.name} {len(self.history) + 1}/{self.recipe.epochs}"
        steps = tqdm(batches, desc=title, unit="step", file=sys.stderr, disable=None, leave=False)
        for images, labels in self.data.batches(self.data.train, steps, self.recipe.device):
            total += self._train_step(images, labels) * len(labels)
        return total / len(self.data.train)

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        images = augment(images, self.generator, crop=self.recipe.crop, flip=self.recipe.flip)
        output = self.network(images)
        loss = F.cross_entropy(output, labels)
        if not math.isfinite(loss.item()):
            raise UsageError(f"the loss became {loss.item()} in epoch {len(self.history) + 1}; pass a lower --lr")
        if self.handle is not None:  # criteria that need data read the batch
            loss = self.handle.loss(loss, images, labels, output)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.lr, self.step / self.total_steps)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        if self.sparsifier is not None and (self.step % max(1, self.total_steps // TRACE_POINTS) == 0):
            self.trace.append((self.step / self.steps_per_epoch, self.sparsity))
        return loss.item()

    def _check_numbers(self, state: Mapping[str, Any]) -> None:
        epochs = state["history"]
        check_epochs(epochs, state["trace"], state["seconds"])
        if self.handle is not None and state["handle"]["step"] != state["step"]:
            raise ValueError(f"the sparsifier's step must be {state['step']!r}, got {state['handle']['step']!r}")
        if state["step"] != len(epochs) * self.steps_per_epoch or len(epochs) > self.recipe.epochs:
            raise ValueError(f"step must be that of whole epochs of {self.steps_per_epoch} steps, got {state['step']!r}")

    def finish(self) -> None:
        """End the run of the sparsifier."""
        if self.handle is not None:
            self.handle.remove()
            self.trace.append((float(self.recipe.epochs), self.sparsity))

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        """End the sparsifier's run where the training was broken off: a checkpoint goes on, so that nothing is lacking."""
        if self.handle is not None:
            self.handle.remove(completed=False)

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming bit for bit on the same device needs, for `torch.load(weights_only=True)`."""
        cuda = torch.cuda.get_rng_state_all() if self.recipe.device.type == "cuda" else []
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "handle": {} if self.handle is None else self.handle.state_dict(),
            "random": {"order": self.generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda},
            "step": self.step,
            "seconds": self.seconds,
            "history": [dict(epoch) for epoch in self.history],
            "trace": [list(point) for point in self.trace],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            ValueError: Its numbers are not those of this training.
        """
        self._check_numbers(state)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.handle is not None:
            self.handle.load_state_dict(state["handle"])
        self.generator.set_state(state["random"]["order"])
        torch.set_rng_state(state["random"]["torch"])
        if state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = [dict(epoch) for epoch in state["history"]]
        self.trace = [(x, y) for x, y in state["trace"]]


def check_epochs(history: Sequence[Mapping[str, Any]], trace: Sequence[Any], seconds: Any) -> None:
    """Refuse a history that is not of numbers.

    Raises:
        ValueError: It is not.
    """
    numbers = [seconds, *(epoch[name] for epoch in history for name in EPOCH), *(x for point in trace for x in point)]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or any(len(point) != 2 for point in trace):
        raise ValueError("history, trace and seconds must be finite numbers")


#: Numbers of an epoch in the history.
EPOCH = ("epoch", "loss", "accuracy", "validation_loss", "sparsity")


def learning_rate(peak: float, position: float) -> float:
    """Return the learning rate of one cycle: a cosine up over the first quarter, then a cosine down.

    It starts at `peak / 25`, reaches `peak`, and ends at `peak / 1e5`.

    Args:
        peak: The highest rate.
        position: The share of the steps already taken, in [0, 1].
    """
    warm = 0.25
    if position < warm:
        return _cosine(peak / 25, peak, position / warm)
    return _cosine(peak, peak / 1e5, (position - warm) / (1 - warm))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the numbers 0 to `count - 1` in random order, in batches of nearly the same size.

    No batch holds a single number (as long as there are two), which batch norm could not train on; where one would be left
    over, a batch holds one more than `batch_size`.
    """
    batches = math.ceil(count / batch_size)
    if count // batches < 2:
        batches = max(1, count // 2)
    return torch.randperm(count, generator=generator).tensor_split(batches)


def augment(images: Tensor, generator: torch.Generator, *, crop: bool, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its side, filling with zeros, and mirror each with probability one half.

    Args:
        images: Normalised, square, `(B, C, N, N)`; not changed.
        generator: Of the shifts and flips, on the CPU.
        crop: True to shift.
        flip: True to mirror.
    """
    count, _, side, _ = images.shape
    pad = max(1, side // 8) if crop else 0
    offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows, columns = offsets + torch.arange(side)
    if flip:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, [pad] * 4)
    picks = torch.arange(count, device=images.device)[:, None, None]
    return padded[picks, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(network: nn.Module, data: Data, part: Part, recipe: Recipe) -> tuple[float, float]:
    """Return the accuracy in [0, 1] and the mean loss per image."""
    network.eval()
    correct, loss = 0, 0.0
    for images, labels in data.batches(part, torch.split(torch.arange(len(part)), recipe.batch_size), recipe.device):
        output = network(images)
        correct += int((output.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(output, labels, reduction="sum"))
    return correct / len(part), loss / len(part)
