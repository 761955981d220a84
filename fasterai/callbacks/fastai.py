"""L5. fastai: a participant's callback, with the sparsity as a column of the epoch table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Schedule
from fasterai.callbacks.settings import SparsifySettings
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

try:
    from fastai.callback.core import Callback
except ImportError as error:
    raise ImportError("fasterai.callbacks.fastai needs fastai: pip install 'fasterai[fastai]'") from error

__all__ = ["HoldCallback", "ParticipantCallback", "SparsifyCallback"]


class ParticipantCallback(Callback):  # type: ignore[misc]
    """Lets participants take part in fastai's training.

    A run begins with the first training batch, so that `validate` and `get_preds` are none; `lr_find` is left alone. The
    position counts training batches, as fastai's own schedules do.

    Args:
        *participants: Whatever takes part.
    """

    order = 55  # after the Recorder (50) has named its columns, before the progress bar (60) prints them
    run_valid = False

    def __init__(self, *participants: Participant) -> None:
        self._participants = list(participants)
        self.loop = Loop([])
        self._learner: Any = None
        self._stopped = False

    @property
    def learn(self) -> Any:
        """The learner; fastai sets it to None when the callback is removed, after an exception too: then the run ends."""
        return self.__dict__.get("_learner")

    @learn.setter
    def learn(self, learner: Any) -> None:
        if learner is None and self.loop.running:
            self.loop.end(completed=False)
        self.__dict__["_learner"] = learner

    def participants(self) -> Sequence[Participant]:
        """Who takes part in the run that begins."""
        return self._participants

    def columns(self) -> dict[str, float]:
        """What goes into the epoch table: name -> value."""
        return {}

    def before_fit(self) -> None:
        """Stand aside in `lr_find` and predictions; name the columns."""
        self.run = not (hasattr(self.learn, "lr_finder") or hasattr(self.learn, "gather_preds"))
        if self.run and hasattr(self.learn, "recorder"):
            names = self.learn.recorder.metric_names
            at = len(names) - 1 if self.learn.recorder.add_time else len(names)
            self.learn.recorder.metric_names = names[:at] + list(self.columns()) + names[at:]

    def before_train(self) -> None:
        """Get ready for a run."""
        if not self.loop.running:
            self.loop = Loop(self.participants())
            self._stopped = False

    def before_batch(self) -> None:
        """Begin the run with its first batch."""
        if not self.loop.running:
            learn = self.learn
            fit = Fit(
                total_steps=learn.n_epoch * learn.n_iter,
                model=learn.model,
                optimizer=learn.opt,
                loss=learn.loss_func,
                batch=Batch(tuple(learn.xb), tuple(learn.yb)),
                steps_per_epoch=learn.n_iter,
            )
            self.loop.start(fit, self._step())

    def _step(self) -> int:
        return round(self.learn.pct_train * self.learn.n_epoch * self.learn.n_iter)

    def after_loss(self) -> None:
        """Pass the loss on; what is logged as the loss stays fastai's."""
        before = self.learn.loss_grad
        self.learn.loss_grad = self.loop.after_loss(before, Batch(tuple(self.learn.xb), tuple(self.learn.yb)))

    def before_step(self) -> None:
        """The optimizer is about to step."""
        self.loop.step = self._step()  # batches without a step (accumulation, overflow) count as well
        self.loop.before_step()

    def after_step(self) -> None:
        """The optimizer has stepped."""
        self.loop.after_step()

    def after_validate(self) -> None:
        """Put the columns into the epoch table."""
        if self.loop.running and hasattr(self.learn, "recorder"):
            self.learn.recorder.log += list(self.columns().values())

    def after_cancel_fit(self) -> None:
        """The fit was stopped before its end."""
        self._stopped = True

    def after_fit(self) -> None:
        """End the run."""
        self.loop.end(completed=not self._stopped)


class SparsifyCallback(ParticipantCallback):
    """Sparsifies the model while fastai trains it.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: Which weights share one decision, or its name.
        context: Which units compete, or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        schedule: How much is pruned at which position: a schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move (lottery tickets).
        rewind_epoch: The epoch whose beginning `lth` goes back to.
        reset_end: With `lth`, go back once more at the end.
        save_tickets: With `lth`, save each ticket into the learner's model folder.
        model: The part of the learner's model to sparsify; all of it if left out.
        **options: Of the `Sparsifier`: `round_to`, `nm`, `layer_type`, `targets`, `data`, `loss`, `example_inputs`,
            `min_keep`, `max_updates`.

    Attributes:
        sparsifier: The sparsifier of the last run, None before the first.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        granularity: Granularity | str,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str,
        lth: bool = False,
        rewind_epoch: int = 0,
        reset_end: bool = False,
        save_tickets: bool = False,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        ticket = {"rewind_epoch": rewind_epoch, "reset_end": reset_end} if lth else None
        self.sparsity, self.part, self.saves_tickets = sparsity, model, save_tickets
        self.settings = SparsifySettings(sparsity, granularity, context, criteria, schedule, ticket, options)

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
        if self.settings.ticket is not None and self.saves_tickets:
            self.settings.ticket["save_tickets"] = Path(self.learn.path) / self.learn.model_dir
        return self.settings.participants(self.part if self.part is not None else self.learn.model)

    def columns(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.current_sparsity}


class HoldCallback(ParticipantCallback):
    """Keeps a sparsifier's masks while fastai trains on."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        super().__init__(sparsifier.hold())
        self.sparsifier = sparsifier

    def columns(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.sparsifier.sparsity.overall}
