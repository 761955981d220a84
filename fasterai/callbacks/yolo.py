"""Ultralytics' trainer: participants in the training of a `YOLO`, of its moving average and of the files that it saves.

The library itself is asked for nothing but its callbacks, so that it is not imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fasterai.callbacks.methods import HoldMethod, Makes, PruneMethod, SparsifyMethod, key_of, made
from fasterai.callbacks.plain import IN_LOSS, Handle
from fasterai.core.checks import warn
from fasterai.core.joined import innermost
from fasterai.core.loop import Batch, Fit, Loop
from fasterai.model.names import unwrap
from fasterai.sparse.masked import Masked

__all__ = ["HoldCallback", "ParticipantCallback", "PruneCallback", "SparsifyCallback"]

EVENTS = ("on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "teardown")


class ParticipantCallback:
    """Lets participants take part in the training of a YOLO, on one device.

    The run counts the optimizer's own steps. The moving average of the weights, which is what the trainer validates and saves,
    is masked and cut with the model. As long as the schedules have not come to their end, each epoch's weights count as the
    best so far, so that `best.pt` holds the end and not an epoch with more weights.

    Args:
        *participants: Participants, or functions of the model that make some; none that reads batches or changes the loss.

    Attributes:
        loop: The run's loop, with its `step` and `total_steps`.
    """

    def __init__(self, *participants: Makes) -> None:
        self._given = participants
        self._handle: Handle | None = None
        self._trainer: Any = None
        self.loop = Loop([])

    def __repr__(self) -> str:
        return f"<{key_of(self, self._given)}>"

    def add_to(self, yolo: Any) -> Any:
        """Take part in the next trainings of a YOLO, or of a trainer, and return it.

        Raises:
            TypeError: It takes no callbacks.
        """
        if not callable(getattr(yolo, "add_callback", None)):
            raise TypeError(f"yolo must be a YOLO or a trainer of ultralytics, got {yolo!r} ({type(yolo).__name__})")
        for event in EVENTS:
            yolo.add_callback(event, getattr(self, event))
        return yolo

    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path("." if self._trainer is None else self._trainer.save_dir)

    def neighbours(self) -> Sequence[object]:
        """Return the callbacks that are known: the trainer shows a callback no others."""
        return [self]

    def copies(self) -> list[Any]:
        """Return the trainer's moving average of the model."""
        average = getattr(self._trainer, "ema", None)
        return [] if average is None else [average.ema]

    # --- the trainer's events ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any) -> None:
        """Begin a run: the model, its average and the optimizer are there.

        Raises:
            ValueError: A participant wants to see batches or the loss, or the length of the training is not known.
        """
        self._end(completed=False)
        self._trainer, model, size = trainer, unwrap(trainer.model), trainer.args.imgsz
        if getattr(trainer, "start_epoch", 0):
            warn(f"the training resumes at epoch {trainer.start_epoch}, and the participants begin afresh")
        weight = next(model.parameters())
        image = torch.rand(1, _channels(trainer), size, size, device=weight.device, dtype=weight.dtype)
        self.loop = Loop(made(self._given, model))
        if self.loop.wants(*IN_LOSS):
            names = ", ".join(p.name for p in self.loop.participants if any(p.hears(event) for event in IN_LOSS))
            raise ValueError(f"participants must do without batches and the loss, which the trainer does not show, got {names}")
        optimizer = innermost(trainer.optimizer)
        self.loop.setup(model, optimizer)
        fit = Fit(steps_of(trainer), model=model, optimizer=optimizer, batch=Batch((image,)), steps_per_epoch=None)
        self.loop.start(fit)
        self._handle = Handle(optimizer, self.loop)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Mask the moving average, and let it look at the parameters anew, of which some may have been cut."""
        average = getattr(trainer, "ema", None)
        if self._handle is None or average is None:
            return
        average._pairs = None  # pairs of tensors that it keeps from its first step on
        for one in self.loop.participants:
            if isinstance(one, Masked) and one.moves:
                one.apply_masks(average.ema)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Let the coming epoch count as the best so far."""
        if self._handle is not None:
            trainer.best_fitness = None

    def on_train_epoch_end(self, trainer: Any) -> None:
        """End the run with the last step, before the trainer validates and saves."""
        if self._handle is not None and self.loop.step >= self.loop.total_steps:
            self._end(completed=True)

    def on_train_end(self, trainer: Any) -> None:
        """End the run where the training was stopped before its last step."""
        self._end(completed=False)

    teardown = on_train_end

    def _end(self, completed: bool) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove(completed)


def _channels(trainer: Any) -> int:
    data = getattr(trainer, "data", None)
    return int(data.get("channels", 3)) if isinstance(data, dict) else 3


def steps_of(trainer: Any) -> int:
    """Count the steps that the optimizer will take: in the warm-up, fewer and fewer batches make one.

    Raises:
        ValueError: The training is to end after a time.
    """
    if getattr(trainer.args, "time", None):
        raise ValueError(f"time must be left out, as schedules need the number of steps, got {trainer.args.time}; give epochs")
    batches, most, last, steps = len(trainer.train_loader), trainer.accumulate, -1, 0
    epochs = min(trainer.args.warmup_epochs, max(trainer.epochs - 1, 0))
    warm = round(epochs * batches) if epochs > 0 else 0
    for n in range(trainer.start_epoch * batches, trainer.epochs * batches):
        accumulate = max(1, round(1 + (most - 1) * n / warm)) if warm and n <= warm else most
        if n - last >= accumulate:
            steps, last = steps + 1, n
    return max(1, steps)


class SparsifyCallback(SparsifyMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class HoldCallback(HoldMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class PruneCallback(PruneMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass
