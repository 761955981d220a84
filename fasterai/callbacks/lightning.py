"""Lightning: participants in a Trainer's fit, with their figures logged and their states in Lightning's own checkpoints.

Over 300 lines, since one class answers to every event of the trainer, and each method has its class.
Over 300 lines, since one class answers to every event of the Trainer, and each method has its class below it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasterai.callbacks.distillation import DistillMethod
from fasterai.callbacks.elsewhere import Elsewhere
from fasterai.callbacks.from_the_start import (
    ACDCMethod,
    RigLMethod,
    SETMethod,
    SRSTEMethod,
    StaticMethod,
    STEMethod,
    STRMethod,
    TernarizeMethod,
)
from fasterai.callbacks.methods import HoldMethod, Makes, PruneMethod, SparsifyMethod, key_of, made
from fasterai.callbacks.regularization import RegularizeMethod
from fasterai.core.loop import STOPPED, Batch, Fit, Loop
from fasterai.model.cuts import Cut, follow
from fasterai.model.inputs import as_batch

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
except ImportError as error:
    raise ImportError("fasterai.callbacks.lightning needs lightning: pip install '.[lightning]' in a checkout") from error

from fasterai.callbacks.lightning_wraps import CutFirst, StepWraps, stop_waiting

__all__ = [
    "ACDCCallback",
    "HoldCallback",
    "KnowledgeDistillationCallback",
    "ParticipantCallback",
    "PruneCallback",
    "RegularizeCallback",
    "RigLCallback",
    "SETCallback",
    "SRSTECallback",
    "STECallback",
    "STRCallback",
    "SparsifyCallback",
    "StaticCallback",
    "TernarizeCallback",
]


class ParticipantCallback(Elsewhere, pl.Callback):
    """Lets participants take part in Lightning's training.

    A run begins with the first training batch. Steps are the optimizer's own, so that accumulation, clipping, precision
    and several optimizers of manual optimization need nothing. Checkpoints hold the participants' states, and `ckpt_path=`
    resumes them.

    Args:
        *participants: Participants, or functions of the model that make some.
    """

    framework = "lightning"
    is_late = True

    def __init__(self, *participants: Makes) -> None:
        self._given = participants
        self.loop = Loop([])
        self._resumed: Mapping[str, Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self._wraps: StepWraps | None = None
        self._batch = Batch()
        self._trainer: pl.Trainer | None = None
        self._stepping: Any = None
        self._was_cut = False

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint."""
        return key_of(self, self._given)

    def __repr__(self) -> str:
        return f"<{key_of(self, self._given)}>"

    def folder(self) -> Path:
        """Return the trainer's root folder."""
        return Path("." if self._trainer is None else self._trainer.default_root_dir)

    def neighbours(self) -> Sequence[object]:
        """Return the trainer's callbacks."""
        return [] if self._trainer is None else list(self._trainer.callbacks)  # type: ignore[attr-defined]

    def copies(self) -> list[Any]:
        """Return the modules inside Lightning's own moving averages."""
        averages = [c._average_model for c in self.neighbours() if isinstance(c, WeightAveraging)]
        return [average.module for average in averages if average is not None]

    def metrics(self) -> dict[str, float]:
        """Return the figures that are logged at the end of an epoch: name -> value."""
        return self.loop.metrics()

    # --- a run -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the last run, before a checkpoint is loaded."""
        self._trainer = trainer
        if stage == "fit":
            self.loop, self._resumed = Loop([]), None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the run with its first batch."""
        self._batch = as_batch(batch)
        if not self.loop.running:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module if trainer.strategy.model is None else trainer.strategy.model
        self.loop = Loop(made(self._given, model))
        if self.loop.wants("after_loss") and not pl_module.automatic_optimization:
            names = ", ".join(p.name for p in self.loop.participants if p.hears("after_loss"))
            raise ValueError(
                f"automatic_optimization must be True for {names}, which changes the loss, got False: the module's own "
                "training_step runs the backward pass; call what changes the loss there"
            )
        self.loop.setup(pl_module, trainer.optimizers[0] if trainer.optimizers else None)
        self.loop.start(self._fit(trainer, pl_module, model))
        follow(pl_module, self)
        self._was_cut = False
        if self._resumed is not None:
            self.loop.load_state_dict(self._resumed)
            self._resumed = None
        self._wraps = StepWraps(pl_module, self.loop, lambda: self._batch, lambda: self._takes_part(trainer))
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)))

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> Fit:
        example = pl_module.example_input_array
        batch = self._batch
        if example is not None:
            inputs = trainer.strategy.batch_to_device(example)
            keywords = inputs if isinstance(inputs, Mapping) else {}
            own = () if keywords else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            batch = replace(batch, inputs=own, keywords=keywords)
        return Fit(
            total_steps=_total_steps(trainer),
            model=model,
            optimizer=trainer.optimizers[0] if len(trainer.optimizers) == 1 else list(trainer.optimizers),
            batch=batch,
            steps_per_epoch=_steps_per_epoch(trainer),
            is_search=partial(_is_search, weakref.ref(trainer), weakref.ref(self)),
            stepping=partial(_stepping, weakref.ref(self)),
        )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Pass on that the gradients are complete: unscaled, not clipped yet."""
        if self._stepping is not None and self._stepping is not optimizer:
            self.loop.settle()  # another optimizer's step was skipped
        self._stepping = optimizer if len(trainer.optimizers) > 1 else None
        self._count(trainer)
        self.loop.after_backward()
        if not pl_module.automatic_optimization:  # there Lightning clips nothing
            self.loop.before_step()

    def on_train_batch_end(self, *_: Any) -> None:
        """Pass on that a step that was announced has been skipped."""
        self.loop.settle()

    def _takes_part(self, trainer: pl.Trainer) -> bool:
        """Tell if steps are those of the run: searches for a rate or a batch size put the trainer's callbacks aside."""
        return any(callback is self for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def _after_step(self, trainer: pl.Trainer) -> None:
        if not self._takes_part(trainer):
            return
        self._count(trainer)
        self.loop.after_step()
        self._restart_trackers()

    def _count(self, trainer: pl.Trainer) -> None:
        """Take over Lightning's count of steps; it goes on only after an optimizer's hooks."""
        self.loop.step = min(_steps_done(trainer), self.loop.total_steps - 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics."""
        for name, value in self.metrics().items():
            pl_module.log(name, value, prog_bar=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the run."""
        self._end(completed=self.loop.step >= self.loop.total_steps or not trainer.should_stop)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the run that failed or was interrupted."""
        self._end(completed=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        self._trainer = None
        if stage == "fit":
            self.loop.look_back()

    def _end(self, completed: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._wraps is not None:
            self._wraps.remove()
        self._hooks, self._wraps, self._batch, self._stepping = [], None, Batch(), None
        self.loop.end(completed, STOPPED)
        self._restart_trackers()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the participants' states, for Lightning's checkpoint."""
        if self._resumed is not None:
            return dict(self._resumed)
        return self.loop.state_dict() if self.loop.participants else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note a checkpoint's state; the run that begins takes it over, or the one under way."""
        if self.loop.running:  # after a search for a learning rate in its middle
            self.loop.load_state_dict(state_dict)
        else:
            self._resumed = state_dict

    # --- smaller models ----------------------------------------------------------------------------------------------

    def after_cut(self, cut: Cut) -> None:
        """Note that parameters of the module have got smaller."""
        self._was_cut = True

    def _restart_trackers(self) -> None:
        """Start comparisons anew after a cut: the best model so far does not fit any more."""
        if not self._was_cut:
            return
        self._was_cut = False
        for tracker in self.neighbours():
            if isinstance(tracker, EarlyStopping):
                tracker.best_score = _worst(tracker.mode)
            if isinstance(tracker, ModelCheckpoint) and tracker.monitor is not None:
                tracker.best_k_models, tracker.kth_best_model_path, tracker.best_model_path = {}, "", ""
                tracker.kth_value, tracker.best_model_score = _worst(tracker.mode), None


class SparsifyCallback(SparsifyMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class HoldCallback(HoldMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class KnowledgeDistillationCallback(DistillMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class PruneCallback(PruneMethod, ParticipantCallback):  # noqa: D101 - the method's
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the last run, and wait for a checkpoint, which needs the module as small as it was."""
        super().setup(trainer, pl_module, stage)
        CutFirst.wait(self, pl_module)

    def cut_as_in(self, checkpoint: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        """Take out of a module what was taken out when a checkpoint was saved."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            states = state["participants"]
            (pruner,) = made(self._given, pl_module)
            pruner.load_state_dict(states[pruner.name] if isinstance(states, Mapping) else states[0])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop waiting: a checkpoint has been loaded by now, if there is one."""
        for module in (pl_module, *self.copies()):
            stop_waiting(module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the run that failed or was interrupted."""
        stop_waiting(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        stop_waiting(pl_module)
        super().teardown(trainer, pl_module, stage)


def _is_search(trainer: Callable[[], Any], callback: Callable[[], Any]) -> bool:
    """Tell if a trainer fits without its own callback, both weak references: searches put the callbacks aside."""
    trains, own = trainer(), callback()
    return trains is not None and own is not None and trains.training and not any(one is own for one in trains.callbacks)


def _stepping(callback: Callable[[], Any]) -> Any:
    """Return the optimizer of several whose step is under way in the trainer of a callback, given as a weak reference."""
    own = callback()
    return None if own is None else own._stepping


def _counts_steps(trainer: pl.Trainer) -> bool:
    """Tell if a run is measured in steps; in manual optimization nobody knows how many an epoch will take."""
    return trainer.lightning_module.automatic_optimization or trainer.max_steps != -1


def _total_steps(trainer: pl.Trainer) -> int:
    manual = not trainer.lightning_module.automatic_optimization
    steps = trainer.max_steps if manual and trainer.max_steps != -1 else _estimated_steps(trainer)
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            f"max_epochs or max_steps of the Trainer must give the run an end, got max_epochs={trainer.max_epochs} and "
            f"max_steps={trainer.max_steps} with {trainer.num_training_batches} batches an epoch"
        )
    return int(steps)


def _estimated_steps(trainer: pl.Trainer) -> float:
    """Return Lightning's estimate, less the epoch without steps that SWA adds to measure batch norms anew."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ends = [c.swa_end + 1 for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    per_epoch = _steps_per_epoch(trainer)
    return min([trainer.estimated_stepping_batches, *(per_epoch * end for end in ends if per_epoch is not None)])


def _steps_per_epoch(trainer: pl.Trainer) -> int | None:
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None


def _steps_done(trainer: pl.Trainer) -> int:
    """Count the steps, or batches, before the one under way."""
    return trainer.global_step if _counts_steps(trainer) else trainer.fit_loop.total_batch_idx


def _worst(mode: str) -> Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


class SRSTECallback(SRSTEMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class STECallback(STEMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class ACDCCallback(ACDCMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class RigLCallback(RigLMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class SETCallback(SETMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class STRCallback(STRMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class StaticCallback(StaticMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class RegularizeCallback(RegularizeMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class TernarizeCallback(TernarizeMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass
