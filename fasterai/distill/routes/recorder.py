"""Recorder of a teacher's route: checkpoints of the network while it trains."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn

from fasterai.core.batch import Fit
from fasterai.core.checks import check_count, check_number
from fasterai.core.files import write_saved
from fasterai.core.participant import Participant
from fasterai.core.saved import check_parts, whole
from fasterai.display import Shown, Table, settings
from fasterai.model.names import plain_name, unwrap

__all__ = ["RouteRecorder"]

ANCHOR_FORMAT = "fasterai-anchor-1"
#: Names that sort by their step.
NAME, PATTERN = "step_{:08}.pt", "step_*.pt"


class RouteRecorder(Shown, Participant):
    """Writes a checkpoint of the network that trains every k epochs or steps, and at the end: the anchors of a route.

    The files, `step_00000120.pt` and so on, hold the parameters and buffers of the state dict, and are written whole or not at
    all. A training that is resumed goes on writing; a run that a framework only searches with writes nothing. A further fit of
    the same network with the same recorder, after one that was completed, goes on too: steps and epochs count on.

    Args:
        folder: Where to write; it is made if it is not there.
        every: Epochs from one anchor to the next.
        steps: Optimizer steps from one to the next, instead of epochs.

    Raises:
        ValueError: A number is below 1.
        TypeError: An argument is of the wrong type.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 1, *, steps: int | None = None) -> None:
        self.folder = Path(folder)
        self.every = check_count("every", every)
        self.steps = None if steps is None else check_count("steps", steps)
        self._fit: Fit | None = None
        self._interval, self._is_checked = 1, False
        self._model: weakref.ref[nn.Module] | None = None  # that of the last completed run
        self._before, self._loaded = _Before(), False
        self._done = 0  # steps of the run under way

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file has: a copy is in no run, and of no network."""
        return {**vars(self), "_fit": None, "_model": None}

    def _line(self) -> str:
        return f"<RouteRecorder: every {self._words()}, {len(self.files)} anchors in {self.folder.name}/>"

    def _parts(self) -> list[Table]:
        return [settings({"folder": str(self.folder), "every": self._words(), "anchors": len(self.files)})]

    def _words(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{self.every} epochs"

    @property
    def files(self) -> list[Path]:
        """The anchors in the folder, in the order of their steps."""
        return sorted(self.folder.glob(PATTERN))

    # --- a run -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Work out when to write.

        Raises:
            ValueError: The loop names no model, or no epochs where they are asked for.
        """
        if fit.model is None:
            raise ValueError("model must be given to a loop whose route is recorded, got none; pass attach(..., model=model)")
        if self.steps is None and not fit.steps_per_epoch:
            raise ValueError(
                f"every={self.every} needs a loop that says its epochs, got one that does not; pass steps= to the recorder, or "
                "attach(..., epochs=epochs, steps_per_epoch=len(loader))"
            )
        self._interval = self.steps or self.every * int(fit.steps_per_epoch or 1)
        if not self._loaded and (self._model is None or self._model() is not unwrap(fit.model)):
            self._before = _Before()
        self._fit, self._is_checked, self._loaded, self._done = fit, False, False, 0

    def before_step(self, position: float) -> None:
        """Look at the folder before the first step: a new training needs one without anchors, and one resumed its own.

        Raises:
            ValueError: A training begins, and the folder holds anchors of another one.
        """
        if self._is_checked or self._fit is None or self._fit.is_search():
            return
        self._is_checked, step = True, self._step(position)
        later = [path for path in self.files if path.name >= NAME.format(self._before.steps + step)]
        if step == 1 and later:
            raise ValueError(
                f"folder must hold no anchors when a training begins, got {len(later)} in {self.folder}; pass another folder, "
                "delete them, or resume the training that has written them"
            )
        for path in later if _is_first() else ():  # of what comes again
            path.unlink(missing_ok=True)

    def after_step(self, position: float) -> None:
        """Write an anchor, if this is the step."""
        assert self._fit is not None
        step = self._done = self._step(position)
        if step % self._interval == 0 or step >= self._fit.total_steps:
            self._write(step)

    def _step(self, position: float) -> int:
        assert self._fit is not None
        return round(position * self._fit.total_steps)

    def _write(self, step: int) -> None:
        assert self._fit is not None
        assert self._fit.model is not None
        if self._fit.is_search() or not _is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        now, whole_run = self._before.after(self._fit, step), self._before.steps + self._fit.total_steps
        words = {"format": ANCHOR_FORMAT, "step": now.steps, "epochs": now.epochs, "total_steps": whole_run}
        write_saved(self.folder / NAME.format(now.steps), {**words, "state_dict": tensors_of(self._fit.model)})

    def on_fit_end(self, completed: bool) -> None:
        """End the run, whose last step has been written already; a further one goes on from here if it was completed."""
        fit, self._fit = self._fit, None
        if fit is None or not completed or fit.is_search():
            return
        assert fit.model is not None
        self._before, self._model = self._before.after(fit, self._done), weakref.ref(unwrap(fit.model))

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and epochs of the runs before the one under way."""
        return {"steps": self._before.steps, "epochs": self._before.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; those of earlier versions are empty.

        Raises:
            ValueError: A part is out of range.
            TypeError: A part is of the wrong type.
        """
        check_parts(state, "RouteRecorder", {}, {"steps": whole, "epochs": _epochs})
        self._before = _Before(state.get("steps", 0), state.get("epochs", 0.0))
        self._loaded = self._fit is None


@dataclass(frozen=True)
class _Before:
    """Steps before a run, and epochs, None where a loop has said none."""

    steps: int = 0
    epochs: float | None = 0.0

    def after(self, fit: Fit, step: int) -> _Before:
        """Return what has been trained after a step of a run."""
        is_known = self.epochs is not None and fit.steps_per_epoch
        epochs = self.epochs + step / fit.steps_per_epoch if is_known else None  # type: ignore[operator]
        return _Before(self.steps + step, epochs)


def _epochs(what: str, value: Any) -> None:
    if value is not None:
        check_number(what, value, at_least=0)


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the parameters and buffers of a network's state dict, without what wrappers put before their names."""
    state: dict[str, Any] = unwrap(model).state_dict()
    return {plain_name(name): x.detach() for name, x in state.items() if isinstance(x, Tensor)}


def _is_first() -> bool:
    """Tell if this is the process that writes."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0)
