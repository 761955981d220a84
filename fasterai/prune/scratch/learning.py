"""Learning of gates on frozen random weights: the task's loss, a wanted mean of the gates, Adam and a projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map

from fasterai.core.batch import Batch
from fasterai.display import Brief, counted
from fasterai.model.inputs import as_batch
from fasterai.model.snapshots import put_back_, take_snapshot
from fasterai.prune.scratch.gating import Gating
from fasterai.prune.scratch.progress import TENSORS, Progress, read_progress, write_progress

__all__ = ["Learned", "Recipe", "learn_gates", "on_device", "read_data"]

Loss = Callable[..., Tensor] | None
MOMENTS = TENSORS[2:]
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
    if isinstance(data, str | Tensor | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"data must be batches (x, y), got {type(data).__name__}; pass a DataLoader or a list of batches")
    if hasattr(data, "__next__"):
        raise ValueError(
            f"data must be batches that can be read again, got {type(data).__name__}; pass a DataLoader, or a list of it"
        )
    if next(iter(data), None) is None:
        raise ValueError("data must hold at least one batch, got none")
    return data  # type: ignore[no-any-return]


def learn_gates(
    model: nn.Module,
    gating: Gating,
    data: Iterable[Any],
    recipe: Recipe,
    loss: Loss = None,
    *,
    folder: Path | None = None,
    words: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Learned:
    """Find the gates of a network whose weights are fixed; norms are in training mode.

    Minimised is `loss + gamma (mean(gates) - level)^2` by Adam.
    Processes of a group average their gradients. The gates begin at 1, and are clamped to [0, 1] after a step.

    Args:
        model: The network, whose buffers and mode change.
        gating: The places of its gates.
        data: Batches, read once for each epoch.
        recipe: The settings.
        loss: The loss function `(output, *targets) -> scalar`; if left out, cross-entropy or the loss that the network returns.
        folder: A folder that keeps the progress after each epoch; what it holds is gone on with.
        words: All settings in words; the folder is of a call with equal ones.
        progress: True to show a progress bar, if it takes longer than three seconds.

    Raises:
        ValueError: The data hold no labels, the loss is not finite, or the folder is of another call.
    """
    if folder is not None and _processes() > 1:
        raise ValueError(f"folder must be left out where {_processes()} processes search together, got {folder}")
    start = take_snapshot(model)
    learner = _Learner(model, gating, recipe, loss)
    learner.go_on(read_progress(folder, words or {}, start))
    with _bar(data, recipe, learner.steps, progress) as update:
        while len(learner.means) < recipe.epochs and learner.steps != recipe.steps:
            learner.epoch(data, update)
            if folder is not None:
                write_progress(folder, words or {}, start, learner.progress())
    return learner.learned()


class _Learner:
    """Gates with their optimizer, and what has been learned so far."""

    def __init__(self, model: nn.Module, gating: Gating, recipe: Recipe, loss: Loss) -> None:
        self.model, self.gating, self.recipe, self.loss = model.train().requires_grad_(False), gating, recipe, loss
        self.device = next(model.parameters()).device
        self.gates = torch.ones(sum(gating.counts), device=self.device, requires_grad=True)
        self.sums = torch.zeros_like(self.gates, dtype=torch.float64)
        self.optimizer = torch.optim.Adam([self.gates], recipe.lr)
        self.losses: list[float] = []
        self.means: list[float] = []
        self.steps = 0

    def epoch(self, data: Iterable[Any], update: Callable[[], object]) -> None:
        """Read the data once, or as far as there are steps left."""
        total, before, most = 0.0, self.steps, self.recipe.steps
        for item in islice(data, None if most is None else most - self.steps):
            total += self.step(on_device(as_batch(item), self.device))
            self.steps += 1
            update()
        if self.steps == before:
            raise ValueError(f"data must hold batches in every epoch, got none in epoch {len(self.means) + 1}")
        self.losses.append(total / (self.steps - before))
        self.means.append(float(self.gates.detach().mean()))

    def step(self, batch: Batch) -> float:
        """Take a step, clamp the gates, and return the task's loss."""
        gated = self.gating.tensors(self.gates)
        output = torch.func.functional_call(self.model, gated, batch.inputs, dict(batch.keywords))
        task = _task(self.loss, output, batch)
        value = float(task.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"loss must be finite, got {value} at step {self.steps + 1} on random weights; check the data and their scale"
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(task + self.recipe.gamma * (self.gates.mean() - self.recipe.level) ** 2)
        _average(self.gates.grad)
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
            self.sums += self.gates
        return value

    def progress(self) -> Progress:
        """Return all that the next step depends on."""
        state = self.optimizer.state[self.gates]
        tensors = {"gates": self.gates.detach(), "sums": self.sums, **{name: state[name] for name in MOMENTS}}
        kept = {name: x.cpu().clone() for name, x in tensors.items()}
        return Progress(kept, tuple(self.losses), tuple(self.means), self.steps, take_snapshot(self.model))

    @torch.no_grad()
    def go_on(self, progress: Progress) -> None:
        """Take what another learner had; nothing if nothing was done yet."""
        if not progress.steps:
            return
        tensors = progress.tensors
        self.gates.copy_(tensors["gates"])
        self.sums.copy_(tensors["sums"])
        own = {name: tensors[name].to("cpu" if name == "step" else self.device, copy=True) for name in MOMENTS}
        self.optimizer.state[self.gates] = own
        self.losses, self.means, self.steps = [*progress.losses], [*progress.means], progress.steps
        put_back_(self.model, progress.weights)

    def learned(self) -> Learned:
        """Return the gates as they are."""
        gates, averages = (x.detach().double().cpu() for x in (self.gates, self.sums / max(1, self.steps)))
        return Learned(gates, averages, tuple(self.losses), tuple(self.means), self.steps)


def _processes() -> int:
    is_one = not (distributed.is_available() and distributed.is_initialized())
    return 1 if is_one else distributed.get_world_size()


def _average(gradient: Tensor | None) -> None:
    """Replace a gradient by the mean over all processes, so that their gates stay equal."""
    if gradient is not None and _processes() > 1:
        distributed.all_reduce(gradient)
        gradient /= _processes()


@contextmanager
def _bar(data: Iterable[Any], recipe: Recipe, done: int, progress: bool) -> Iterator[Callable[[], object]]:
    """Show a bar over all steps, and give the function that advances it by one."""
    from tqdm import tqdm

    size = len(data) if isinstance(data, Sized) else None
    ends = [n for n in (recipe.steps, None if size is None else size * recipe.epochs) if n is not None]
    hidden = None if progress else True  # None: where the output is no terminal
    with tqdm(total=min(ends, default=None), initial=done, desc="gates", leave=False, delay=QUIET, disable=hidden) as bar:
        yield bar.update


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
        got = counted(len(batch.inputs) + len(batch.keywords), "input")
        raise ValueError(f"data must hold labels, as batches (x, y), got {got} alone; or pass loss=, a function of the output")
    if not isinstance(output, Tensor):
        raise ValueError(f"loss must be given for a network that returns no tensor, got None and a {type(output).__name__}")
    return F.cross_entropy(output, *batch.targets)
