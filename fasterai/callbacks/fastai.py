"""fastai: participants in a learner's training, with their figures as columns of the epoch table.

Over 300 lines, since one class answers to every event of the learner, and each method has its class below it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fasterai.callbacks.distillation import DistillMethod
from fasterai.callbacks.elsewhere import ASKED_BY, refuse_elsewhere
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
from fasterai.core.loop import STOPPED, Fit, Loop, numbered
from fasterai.display import counted
from fasterai.model.cuts import Cut, follow

try:
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.tracker import SaveModelCallback, TrackerCallback
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.learner import Learner
except ImportError as error:
    raise ImportError("fasterai.callbacks.fastai needs fastai: pip install '.[fastai]' in a checkout of fasterai") from error

from fasterai.callbacks.fastai_batches import batch_of, plain
from fasterai.callbacks.fastai_files import begin_saving, end_saving, find_state, skipped_epochs

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

NOT_TRAINING = {"lr_finder", "gather_preds"}  # fastai's names of the callbacks of `lr_find` and of predictions
LIGHTNING_ASKS_FOR = {"state_key", "setup", "on_exception"}  # what a Trainer wants first, at its making and in a fit


class ParticipantCallback(Callback):  # type: ignore[misc]
    """Lets participants take part in fastai's training.

    A run lasts from the first training batch to the last; `validate`, `get_preds` and `lr_find` are none. The position
    counts batches, as fastai's own schedules do.

    During a fit `learn.save`, so `SaveModelCallback` too, writes the participants' states beside the checkpoint:
    `model_3.fasterai.pt` for `model_3.pth`. A fit with `start_epoch=` finds those of the weights that were loaded.

    Args:
        *participants: Participants, or functions of the model that make some.

    Attributes:
        resume_from: The checkpoint whose states the next fit goes on from, as for `learn.load`; None for that of the weights
            in the learner, where a fit skips epochs.
    """

    order = 55  # after the Recorder (50) has named its columns, before the progress bar (60) prints them
    run_valid = False
    is_late = False

    def __init__(self, *participants: Makes) -> None:
        self._given = participants
        self.loop = Loop([])
        self._has_begun = self._is_stepping = self._was_cut = False
        self._relays: list[Callback] = []
        self._resumed: Mapping[str, Any] | None = None
        self.resume_from: str | Path | None = None

    @property
    def learn(self) -> Any:
        """The learner; None once fastai has removed the callback, which it does after an exception too: then the run ends."""
        return self.__dict__.get("_learner")

    @learn.setter
    def learn(self, learner: Any) -> None:
        if learner is None:
            self._end(completed=False)
            if self._has_begun:
                self.loop.look_back()
        self.__dict__["_learner"] = learner

    def __getattr__(self, name: str) -> Any:
        if name in ASKED_BY["huggingface"] and self.learn is None:
            refuse_elsewhere(self, "fastai", "huggingface")
        if name in LIGHTNING_ASKS_FOR and self.learn is None:
            kind = type(self).__name__
            raise TypeError(
                f"callbacks must be Lightning's, got fastai's {kind}; from fasterai.callbacks.lightning import {kind} "
                "below any `from fasterai... import *`, which brings fastai's by the same name"
            )
        return super().__getattr__(name)

    @property
    def run(self) -> bool:
        """True if events count: not in `lr_find` and predictions, nor when switched off until the end of a fit."""
        switched_on: bool = self.__dict__.get("_run", True)
        return switched_on and (self.learn is None or not NOT_TRAINING & vars(self.learn).keys())

    @run.setter
    def run(self, value: bool) -> None:
        self.__dict__["_run"] = value

    @property
    def key(self) -> str:
        """Name of the callback's state in a file."""
        return key_of(self, self._given)

    def folder(self) -> Path:
        """Return the learner's model folder."""
        return Path(self.learn.path, self.learn.model_dir)

    def neighbours(self) -> Sequence[object]:
        """Return the learner's callbacks; none outside of a fit."""
        return [] if self.learn is None else list(self.learn.cbs)

    def copies(self) -> list[Any]:
        """Return copies of the model that fastai keeps itself: none."""
        return []

    def metrics(self) -> dict[str, float]:
        """Return the columns of the epoch table: name -> value."""
        return self.loop.metrics()

    # --- a run -------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Name the columns; end what a failed fit has left. fastai's `validate` comes here, too."""
        self._end(completed=False)
        self._has_begun = False
        self._find_state()
        begin_saving(self.learn, self)
        self.loop = Loop([] if self.is_late else made(self._given, self.learn.model))
        if hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - 1 if self.learn.recorder.add_time else len(names)
            own: list[str] = []
            for name in self.metrics():
                own.append(numbered(name, "_", [*names, *own]))
            self.learn.recorder.metric_names = names[:at] + own + names[at:]

    def _find_state(self) -> None:
        if self._resumed is None and (self.resume_from is not None or skipped_epochs(self.learn)):
            ours = [one for one in self.learn.cbs if isinstance(one, ParticipantCallback)]
            self._resumed = find_state(self.learn, self, ours, self.resume_from)
            self.resume_from = None

    def before_batch(self) -> None:
        """Begin the run with its first batch."""
        learn = self.learn
        if self.loop.running:
            self.loop.move(learn.opt)  # `learn.export` makes a new one
            return
        if self.is_late:
            self.loop = Loop(made(self._given, learn.model))
        self.loop.setup(learn.model, learn.opt)
        fit = Fit(
            total_steps=learn.n_epoch * learn.n_iter,
            model=learn.model,
            optimizer=learn.opt,
            loss=learn.loss_func,
            batch=batch_of(learn),
            steps_per_epoch=learn.n_iter,
            is_search=partial(_is_search, weakref.ref(learn)),
        )
        self.loop.start(fit)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self.loop.load_state_dict(resumed)
        self._relay()
        follow(learn.model, self)
        self._has_begun, self._was_cut = True, False

    def _relay(self) -> None:
        """Listen at places among fastai's callbacks that this one does not have, as far as participants hear of it."""
        if self.loop.wants("after_loss"):
            self._relays.append(_relay(self, GradientAccumulation.order - 1, after_loss=self._change_loss))
        if self.loop.wants("after_backward"):
            between = (MixedPrecision.order + GradientClip.order) / 2
            self._relays.append(_relay(self, between, before_step=self.loop.after_backward))
        self.learn.add_cbs(self._relays)

    def after_pred(self) -> None:
        """Show the batch with its outputs."""
        if self.loop.running:
            self.loop.after_forward(batch_of(self.learn, with_outputs=True))

    def after_loss(self) -> None:
        """Refuse batches without targets: fastai takes no step with them, and says nothing."""
        self._check_targets()

    def _check_targets(self) -> None:
        learn = self.learn
        if self.loop.running and not len(learn.yb) and type(learn)._do_one_batch is Learner._do_one_batch:
            raise ValueError(
                f"dls must give batches of inputs and targets, got {counted(len(learn.xb), 'input')} alone, with which fastai "
                "takes no step; give the data set labels, or any targets if the loss reads none: (x, x)"
            )

    def _change_loss(self) -> None:
        """Pass the loss on before it is divided for accumulation; what is logged as the loss stays fastai's."""
        self._check_targets()
        if self.loop.running:
            loss = plain(self.learn.loss_grad)
            self.learn.loss_grad = self.loop.after_loss(loss, batch_of(self.learn, with_outputs=True))

    def before_step(self) -> None:
        """Pass on that the optimizer is about to step; batches without a step have moved the position too."""
        done = round(self.learn.pct_train * self.loop.total_steps)
        self.loop.step = min(done, self.loop.total_steps - 1)
        self.loop.before_step()
        self._is_stepping = True

    def after_cancel_step(self) -> None:
        """Pass on that the optimizer does not step."""
        self._is_stepping = False
        self.loop.settle()

    def after_cancel_batch(self) -> None:
        """Pass on that the optimizer does not step, if it was about to."""
        self.after_cancel_step()

    def after_cancel_epoch(self) -> None:
        """Pass on that the optimizer does not step, if it was about to."""
        self.after_cancel_step()

    def after_step(self) -> None:
        """Pass on that the optimizer has stepped, unless the step was cancelled: fastai calls this all the same."""
        if self._is_stepping:
            self.loop.after_step()
        self._is_stepping = False
        self._restart_trackers()

    def after_train(self) -> None:
        """End the run with its last epoch, so that what is validated and saved then is what remains."""
        self.after_cancel_step()
        if self.learn.epoch == self.learn.n_epoch - 1:
            self.loop.end(completed=True)
            self._restart_trackers()

    def after_validate(self) -> None:
        """Put the columns into the epoch table, but not into what `validate` returns."""
        if self._has_begun and hasattr(self.learn, "recorder"):
            self.learn.recorder.log += list(self.metrics().values())

    def after_cancel_fit(self) -> None:
        """End the run that was stopped."""
        self._end(completed=False)

    def after_fit(self) -> None:
        """End the run, if its last epoch was cut short."""
        self._end(completed=True)

    def _end(self, completed: bool) -> None:
        relays, self._relays = self._relays, []
        if self.learn is not None:
            self.learn.remove_cbs([one for one in relays if one in self.learn.cbs])
            end_saving(self.learn, self)
        self.loop.end(completed, STOPPED)

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the participants' states, as `learn.save` writes them beside a checkpoint during a fit."""
        return dict(self._resumed) if self._resumed is not None else self.loop.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Note a saved state, which the next fit takes over: `learn.load(...)`, `learn.fit(n, start_epoch=k, cbs=callback)`."""
        self._resumed = state

    # --- smaller models ----------------------------------------------------------------------------------------------

    def after_cut(self, cut: Cut) -> None:
        """Note that parameters of the model have got smaller."""
        self._was_cut = True

    def _restart_trackers(self) -> None:
        """Start comparisons anew after a cut: the best model so far does not fit, and what is put back meanwhile has to."""
        if not self._was_cut:
            return
        self._was_cut = False
        for tracker in self.learn.cbs:
            if isinstance(tracker, TrackerCallback):
                tracker.best = float("inf") if tracker.comp is np.less else -float("inf")
            if isinstance(tracker, SaveModelCallback) and not tracker.every_epoch and not tracker.at_end:
                self.learn.save(tracker.fname, with_opt=tracker.with_opt)


def _is_search(learner: Callable[[], Any]) -> bool:
    """Tell if a learner, given as a weak reference, is in an `lr_find`, which puts the weights back."""
    return not NOT_TRAINING.isdisjoint(vars(learner() or object) or ())


class _Relay(Callback):  # type: ignore[misc]
    """Passes one event on at a place among fastai's own callbacks that the callback itself does not have."""

    run_valid = False
    name = "relay"  # the learner's attribute

    def __init__(self, order: float, **events: Callable[[], None]) -> None:
        self.order = order
        self.__dict__.update(events)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Relay, (self.order,), vars(self)


def _relay(callback: ParticipantCallback, order: float, **events: Callable[[], None]) -> Callback:
    """Make a relay of a callback, of whose name it is, since fastai names the class in which an error arose."""
    return type(type(callback).__name__, (_Relay,), {})(order, **events)


class SparsifyCallback(SparsifyMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class HoldCallback(HoldMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class KnowledgeDistillationCallback(DistillMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class PruneCallback(PruneMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


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
