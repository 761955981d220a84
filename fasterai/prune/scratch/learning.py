"""Learning of gates on frozen random weights: the task's loss, a wanted mean of the gates, Adam and a projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.core.loop import Batch
from fasterai.display import Brief
from fasterai.model.inputs import as_batch
from fasterai.prune.scratch.gating import Gating

__all__ = ["Learned", "Recipe", "learn_gates", "on_device", "read_data"]

Loss = Callable[..., Tensor] | None
QUIET = 3.0  # seconds of work without a progress bar


@dataclass(frozen=True, repr=False)
class Recipe(Brief):
    """Settings of the learning of gates.

    Attributes:
        epochs: Passes over the data.
        steps: The number of steps at most, over all epochs; None for all.
        gamma: The weight of the regulariser.
        level: The mean of all gates that is wanted, in [0, 1].
        lr: Adam's learning rate.
    """

    epochs: int
    steps: int | None
    gamma: float
    level: float
    lr: float


@dataclass(frozen=True, repr=False)
class Learned(Brief):
    """Gates at the end of their learning.

    Attributes:
        gates: The gates in [0, 1], `(N,)`, float64 on the CPU.
        averages: Their means over all steps: they order gates that are equal at the end.
        losses: The mean loss of the task in each epoch.
        means: The mean of the gates after each epoch.
        steps: The number of steps taken.
    """

    gates: Tensor
    averages: Tensor
    losses: tuple[float, ...]
    means: tuple[float, ...]
    steps: int


def read_data(data: Any) -> Iterable[Any]:
    """Return the batches of `data`, which can be read several times.

    Raises:
        TypeError: It is no iterable of batches.
        ValueError: It can be read once only, or holds nothing.
    """
    if hasattr(data, "loaders") and hasattr(data, "train"):  # fastai's DataLoaders
        data = data.train
    if isinstance(data, str | Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"data must be batches (x, y), got {type(data).__name__}; pass a DataLoader or a list of batches")
    if hasattr(data, "__next__"):
        raise ValueError(
            f"data must be batches that can be read again, got {type(data).__name__}; pass a DataLoader, or a list of it"
        )
    if next(iter(data), None) is None:
        raise ValueError("data must hold at least one batch, got none")
    return data  # type: ignore[no-any-return]


def learn_gates(
    model: nn.Module, gating: Gating, data: Iterable[Any], recipe: Recipe, loss: Loss = None, *, progress: bool = True
) -> Learned:
    """Learn the gates of a network whose weights are fixed; norms are in training mode.

    Minimised is `loss + gamma (mean(gates) - level)^2` by Adam; the gates begin at 1, and are clamped to [0, 1] after each step.

    Args:
        model: The network, whose buffers and mode change.
        gating: The places of its gates.
        data: Batches, as often as there are epochs.
        recipe: The settings.
        loss: The loss function `(output, *targets) -> scalar`; cross-entropy, or the loss that the network returns, if left out.
        progress: True to show a progress bar, if it takes longer than three seconds.

    Raises:
        ValueError: The data hold no labels, or the loss is not finite.
    """
    device = next(model.parameters()).device
    gates = torch.ones(sum(gating.counts), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], recipe.lr)
    averages = torch.zeros_like(gates, dtype=torch.float64)
    losses: list[float] = []
    means: list[float] = []
    model.train().requires_grad_(False)
    done = 0
    for batches in _epochs(data, recipe, progress):
        total, before = 0.0, done
        for item in batches:
            batch = on_device(as_batch(item), device)
            output = torch.func.functional_call(model, gating.tensors(gates), batch.inputs, dict(batch.keywords))
            value = _task(loss, output, batch)
            optimizer.zero_grad()
            torch.autograd.backward(value + recipe.gamma * (gates.mean() - recipe.level) ** 2)
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
                averages += gates
            total, done = total + _finite(float(value), done), done + 1
        if done > before:
            losses.append(total / (done - before))
            means.append(float(gates.detach().mean()))
    averages /= max(1, done)
    return Learned(gates.detach().double().cpu(), averages.cpu(), tuple(losses), tuple(means), done)


def _epochs(data: Iterable[Any], recipe: Recipe, progress: bool) -> Iterator[Iterable[Any]]:
    """Yield the batches of each epoch, with a bar over all of them, until there were as many as there are steps."""
    from tqdm import tqdm

    size = len(data) if hasattr(data, "__len__") else None
    whole = None if size is None else recipe.epochs * size
    left = recipe.steps if recipe.steps is not None else whole
    with tqdm(total=left if whole is None else min(whole, left or whole), desc="gates", leave=False, delay=QUIET,
              disable=None if progress else True) as bar:  # fmt: skip
        taken = 0

        def counted() -> Iterator[Any]:
            nonlocal taken
            for item in islice(data, None if recipe.steps is None else recipe.steps - taken):
                yield item
                taken += 1
                bar.update()

        for _ in range(recipe.epochs):
            if recipe.steps is None or taken < recipe.steps:
                yield counted()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with all of its tensors on a device."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    inputs, targets, keywords = (tree_map(moved, part) for part in (batch.inputs, batch.targets, dict(batch.keywords)))
    return Batch(inputs, targets, keywords=keywords)


def _task(loss: Loss, output: Any, batch: Batch) -> Tensor:
    """Return the task's loss of a batch: the user's, the one that the model returns, or cross-entropy."""
    if loss is not None:
        return loss(output, *batch.targets)
    own = None if isinstance(output, Tensor) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if not batch.targets:
        raise ValueError("data must hold labels, as batches (x, y), got inputs alone; or pass loss=, a function of the output")
    if not isinstance(output, Tensor):
        raise ValueError(f"loss must be given for a network that returns no tensor, got None and a {type(output).__name__}")
    return F.cross_entropy(output, *batch.targets)


def _finite(value: float, step: int) -> float:
    if value - value != 0:
        raise ValueError(
            f"loss must be finite, got {value} at step {step + 1} of the search on random weights; check the data, or scale them"
        )
    return value
