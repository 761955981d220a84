"""Fastai: a participant's callback, with the sparsity as a column of the epoch table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fasterai.callbacks.settings import PruneSettings, SparsifySettings
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Schedule
from fasterai.model.targets import LayerTypes
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

try:
    from fastai.callback.core import Callback
    from fastai.callback.tracker import SaveModelCallback, TrackerCallback
except ImportError as error:
    raise ImportError("fasterai.callbacks.fastai needs fastai: pip install 'fasterai[fastai]'") from error

if TYPE_CHECKING:
    from fasterai.prune.gradual import GradualPruner
    from fasterai.prune.surgery.model_copies import Copies

__all__ = ["HoldCallback", "ParticipantCallback", "PruneCallback", "SparsifyCallback"]

NOT_TRAINING = {"lr_finder", "gather_preds"}  # fastai's names of the callbacks of `lr_find` and of predictions
LIGHTNING_ASKS_FOR = {"setup", "on_exception"}  # the first thing of a callback in a Trainer's fit, and the last if it fails


class ParticipantCallback(Callback):  # type: ignore[misc]
    """Lets participants take part in fastai's training.

    A run lasts from the first training batch to the last; `validate`, `get_preds` and `lr_find` are none. The position
    counts batches, as fastai's own schedules do.

    Args:
        *participants: Whatever takes part.
    """

    order = 55  # after the Recorder (50) has named its columns, before the progress bar (60) prints them
    run_valid = False

    def __init__(self, *participants: Participant) -> None:
        self._participants = list(participants)
        self.loop = Loop([])
        self._is_stepping = False

    @property
    def learn(self) -> Any:
        """The learner; None once fastai has removed the callback, which it does after an exception too: then the run ends."""
        return self.__dict__.get("_learner")

    @learn.setter
    def learn(self, learner: Any) -> None:
        if learner is None:
            self.loop.end(completed=False)
        self.__dict__["_learner"] = learner

    def __getattr__(self, name: str) -> Any:
        if name in LIGHTNING_ASKS_FOR and self.learn is None:
            kind = type(self).__name__
            raise TypeError(
                f"callbacks must be Lightning's, got fastai's {kind}; from fasterai.callbacks.lightning import {kind}"
            )
        return super().__getattr__(name)

    @property
    def run(self) -> bool:
        """Whether events count: not in `lr_find` and predictions, nor when switched off until the end of a fit."""
        switched_on: bool = self.__dict__.get("_run", True)
        return switched_on and (self.learn is None or not NOT_TRAINING & vars(self.learn).keys())

    @run.setter
    def run(self, value: bool) -> None:
        self.__dict__["_run"] = value

    def participants(self) -> Sequence[Participant]:
        """Who takes part in the run that begins."""
        return self._participants

    def columns(self) -> dict[str, float]:
        """What goes into the epoch table: name -> value."""
        return {}

    def before_fit(self) -> None:
        """Name the columns; end what a failed fit has left."""
        self.loop.end(completed=False)
        self.loop = Loop([])
        if hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - 1 if self.learn.recorder.add_time else len(names)
            self.learn.recorder.metric_names = names[:at] + list(self.columns()) + names[at:]

    def before_batch(self) -> None:
        """Begin the run with its first batch."""
        if self.loop.running:
            return
        learn = self.learn
        fit = Fit(
            total_steps=learn.n_epoch * learn.n_iter,
            model=learn.model,
            optimizer=learn.opt,
            loss=learn.loss_func,
            batch=self._batch(),
            steps_per_epoch=learn.n_iter,
        )
        self.loop = Loop(self.participants())
        self.loop.start(fit)

    def _batch(self) -> Batch:
        return Batch(tuple(self.learn.xb), tuple(self.learn.yb))

    def after_loss(self) -> None:
        """Pass the loss on; what is logged as the loss stays fastai's."""
        self.learn.loss_grad = self.loop.after_loss(self.learn.loss_grad, self._batch())

    def before_step(self) -> None:
        """The optimizer is about to step; batches without a step (accumulation, overflow) have moved the position too."""
        done = round(self.learn.pct_train * self.loop.total_steps)
        self.loop.step = min(done, self.loop.total_steps - 1)
        self.loop.before_step()
        self._is_stepping = True

    def after_cancel_step(self) -> None:
        """The optimizer does not step."""
        self._is_stepping = False

    def after_step(self) -> None:
        """The optimizer has stepped, unless the step was cancelled: fastai calls this all the same."""
        if self._is_stepping:
            self.loop.after_step()
        self._is_stepping = False

    def after_train(self) -> None:
        """End the run with its last epoch, so that what is validated and saved then is what remains."""
        if self.learn.epoch == self.learn.n_epoch - 1:
            self.loop.end(completed=True)

    def after_validate(self) -> None:
        """Put the columns into the epoch table, but not into what `validate` returns."""
        if self.loop.participants and hasattr(self.learn, "recorder"):
            self.learn.recorder.log += list(self.columns().values())

    def after_cancel_fit(self) -> None:
        """End the run that was stopped."""
        self.loop.end(completed=False)

    def after_fit(self) -> None:
        """End the run, if its last epoch was cut short."""
        self.loop.end(completed=True)


class SparsifyCallback(ParticipantCallback):
    """Sparsifies the model while fastai trains it.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: Which weights share one decision, or its name.
        context: Which units compete, or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        schedule: How much is pruned at which position: a schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move (lottery tickets).
        rewind_epoch: The epoch whose beginning is gone back to.
        reset_end: Go back at the end of the run, with `lth` or without.
        save_tickets: With `lth`, save each ticket into the learner's model folder.
        model: The part of the learner's model to sparsify; all of it if left out.
        round_to: Kept units of each target are rounded up to a multiple of it.
        nm: Prune two of every four neighbouring inputs.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        **options: Of the `Sparsifier`: `targets`, `data`, `loss`, `example_inputs`, `min_keep`, `max_updates`.

    Attributes:
        sparsifier: The sparsifier of the last run, None before the first.

    Raises:
        ValueError: An argument is out of range or unknown.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    def __init__(
        self,
        sparsity: Sparsity | None,
        granularity: Granularity | str,
        context: Context | Mapping[str, float] | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str,
        lth: bool = False,
        rewind_epoch: int = 0,
        reset_end: bool = False,
        save_tickets: bool = False,
        model: nn.Module | None = None,
        round_to: int | None = None,
        nm: bool = False,
        layer_type: LayerTypes | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.sparsity, self.part, self.save_tickets = sparsity, model, save_tickets
        self.settings = SparsifySettings(
            sparsity,
            granularity,
            context,
            criteria,
            schedule,
            lth=lth,
            rewind_epoch=rewind_epoch,
            reset_end=reset_end,
            save_tickets=save_tickets,
            options={"round_to": round_to, "nm": nm, "layer_type": layer_type, **options},
        )

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The sparsifier of the last run."""
        return self.settings.sparsifier

    @property
    def current_sparsity(self) -> float:
        """The share of units that the masks prune now, in [0, 1]."""
        return self.sparsifier.sparsity.overall if self.sparsifier else 0.0

    def participants(self) -> Sequence[Participant]:
        """The sparsifier, and the lottery ticket if there is one."""
        tickets = Path(self.learn.path) / self.learn.model_dir if self.save_tickets else None
        return self.settings.participants(self.learn.model if self.part is None else self.part, tickets)

    def columns(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.current_sparsity}


class HoldCallback(ParticipantCallback):
    """Keeps a sparsifier's masks while fastai trains on."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        if not isinstance(sparsifier, Sparsifier):
            got = type(sparsifier).__name__
            raise TypeError(f"sparsifier must be a Sparsifier, got {got}; after a fit pass its callback's `.sparsifier`")
        super().__init__(sparsifier.hold())
        self.sparsifier = sparsifier

    def columns(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.sparsifier.sparsity.overall}


class PruneCallback(ParticipantCallback):
    """Takes channels out of the model while fastai trains it; the optimizer goes on.

    Note the order of the arguments, in which the schedule is the second.

    Args:
        pruning_ratio: The share of the channels that go, in [0, 1), or a dict of names of layers to shares (context `local`).
        schedule: Which share of the ratio is gone at which position: a schedule that never falls, its name, or a function of
            the position.
        context: `local` ranks inside each group of coupled channels, `global` all together; or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        ignored_layers: Modules, or their names, whose outputs stay, besides all that has to stay anyway.
        example_inputs: A tensor or tuple that the model runs on; a few samples of the first batch if left out.
        model: The part of the learner's model that channels go from; all of it if left out.
        max_updates: How often channels go in a run, at most.
        copies: Modules of the same structure, such as moving averages of the weights, or a function that gives them.
        **options: Of the `Pruner`: `round_to`, `over_places` and others.

    Attributes:
        pruner: The `GradualPruner` of the last run, None before the first.

    Raises:
        ValueError: An argument is out of range or unknown, or the schedule falls.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    def __init__(
        self,
        pruning_ratio: Any,
        schedule: Schedule | Callable[[float], float] | str,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        ignored_layers: Iterable[nn.Module | str] | None = None,
        example_inputs: Any = None,
        *,
        model: nn.Module | None = None,
        max_updates: int = 10,
        copies: Copies = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.pruning_ratio, self.part = pruning_ratio, model
        self.settings = PruneSettings(
            pruning_ratio,
            schedule,
            context,
            criteria,
            ignored_layers=ignored_layers,
            example_inputs=example_inputs,
            max_updates=max_updates,
            copies=copies,
            options=options,
        )

    @property
    def pruner(self) -> GradualPruner | None:
        """The `GradualPruner` of the last run."""
        return self.settings.pruner

    @property
    def current_sparsity(self) -> float:
        """The share of the channels that are gone, in [0, 1]."""
        return self.pruner.sparsity if self.pruner else 0.0

    def participants(self) -> Sequence[Participant]:
        """The `GradualPruner`."""
        return [self.settings.participant(self.learn.model if self.part is None else self.part)]

    def columns(self) -> dict[str, float]:
        """The share of the channels that are gone: `sparsity`, or `removed` where masks have a column of that name."""
        masked = any(isinstance(callback, SparsifyCallback | HoldCallback) for callback in self.learn.cbs)
        return {"removed" if masked else "sparsity": self.current_sparsity}

    def after_step(self) -> None:
        """The optimizer has stepped; what compares with models of before a removal starts anew."""
        removals = self._removals
        super().after_step()
        if self._removals > removals:
            self._restart_trackers()

    def after_train(self) -> None:
        """End the run with its last epoch."""
        removals = self._removals
        super().after_train()
        if self._removals > removals:
            self._restart_trackers()

    @property
    def _removals(self) -> int:
        return len(self.pruner.plans) if self.pruner else 0

    def _restart_trackers(self) -> None:
        """The best model so far does not fit any more: the next one is the best, and what is put back meanwhile fits."""
        for tracker in self.learn.cbs:
            if isinstance(tracker, TrackerCallback):
                tracker.best = float("inf") if tracker.comp is np.less else -float("inf")
            if isinstance(tracker, SaveModelCallback) and not tracker.every_epoch and not tracker.at_end:
                self.learn.save(tracker.fname, with_opt=tracker.with_opt)
