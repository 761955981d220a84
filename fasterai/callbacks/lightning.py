"""L5. Lightning: a participant's callback, with the sparsity logged and everything in Lightning's own checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fasterai.callbacks.settings import SparsifySettings
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Schedule
from fasterai.sparse.evidence import as_batch
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError("fasterai.callbacks.lightning needs lightning: pip install 'fasterai[lightning]'") from error

__all__ = ["HoldCallback", "ParticipantCallback", "SparsifyCallback"]


class ParticipantCallback(pl.Callback):
    """Lets participants take part in Lightning's training.

    A run begins with the first training batch. Steps are batches at whose end Lightning has stepped an optimizer, so that
    accumulation, clipping and several optimizers of manual optimization need nothing. Checkpoints hold the participants'
    states, and `ckpt_path=` resumes them.

    Args:
        *participants: Whatever takes part.
    """

    def __init__(self, *participants: Participant) -> None:
        self._participants = list(participants)
        self.loop = Loop([])
        self._resumed: Mapping[str, Any] | None = None
        self._global_step = 0
        self._batch = Batch(())

    def participants(self, module: pl.LightningModule, model: nn.Module) -> Sequence[Participant]:
        """Who takes part in the run that begins.

        Args:
            module: The LightningModule.
            model: The same as the strategy has wrapped it.
        """
        return self._participants

    def metrics(self) -> dict[str, float]:
        """What is logged at the end of an epoch: name -> value."""
        return {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready for a run."""
        model = trainer.strategy.model or pl_module
        self.loop = Loop(self.participants(pl_module, model))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the run with its first batch."""
        self._batch = as_batch(batch)
        if self.loop.running:
            return
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise ValueError(f"max_epochs or max_steps of the Trainer must give the run an end, got {steps} steps")
        example = pl_module.example_input_array
        inputs = self._batch.inputs if example is None else example
        epochs = trainer.max_epochs or -1
        fit = Fit(
            total_steps=int(steps),
            model=trainer.strategy.model or pl_module,
            optimizer=trainer.optimizers[0] if trainer.optimizers else None,
            batch=Batch(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), self._batch.targets),
            steps_per_epoch=int(steps) // epochs if epochs > 0 else None,
        )
        self.loop.start(fit)
        self._global_step = trainer.global_step
        if self._resumed is not None:
            self.loop.load_state_dict(self._resumed)
            self._resumed = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Show the batch to the participants; Lightning lets no callback change the loss."""
        if self.loop.after_loss(loss, self._batch) is not loss:
            raise RuntimeError("Lightning's callbacks cannot change the loss: add it in training_step")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """The optimizer is about to step."""
        self.loop.before_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer may have stepped."""
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            self.loop.after_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics."""
        for name, value in self.metrics().items():
            pl_module.log(name, value, prog_bar=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the run."""
        if self.loop.running:
            self.loop.end(completed=self.loop.step >= self.loop.total_steps)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the run that failed or was interrupted."""
        self.loop.end(completed=False)

    def state_dict(self) -> dict[str, Any]:
        """The step and the participants' states, for Lightning's checkpoint."""
        return self.loop.state_dict() if self.loop.participants else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note a checkpoint's state; the run that begins takes it over."""
        self._resumed = state_dict


class SparsifyCallback(ParticipantCallback):
    """Sparsifies the module while Lightning trains it.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: Which weights share one decision, or its name.
        context: Which units compete, or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        schedule: How much is pruned at which position: a schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move (lottery tickets).
        rewind_epoch: The epoch whose beginning `lth` goes back to.
        reset_end: With `lth`, go back once more at the end.
        save_tickets: With `lth`, a folder to save each ticket in.
        model: The part of the module to sparsify; all of it if left out.
        **options: Of the `Sparsifier`: `round_to`, `nm`, `layer_type`, `targets`, `data`, `loss`, `example_inputs`,
            `min_keep`, `max_updates`.
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
        save_tickets: str | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        ticket = {"rewind_epoch": rewind_epoch, "reset_end": reset_end, "save_tickets": save_tickets} if lth else None
        self.sparsity, self.part = sparsity, model
        self.settings = SparsifySettings(sparsity, granularity, context, criteria, schedule, ticket, options)

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The sparsifier of the last run, None before the first."""
        return self.settings.sparsifier

    @property
    def current_sparsity(self) -> float:
        """The share of units that the masks prune now, in [0, 1]."""
        return self.sparsifier.sparsity.overall if self.sparsifier else 0.0

    def participants(self, module: pl.LightningModule, model: nn.Module) -> Sequence[Participant]:
        """The sparsifier, and the lottery ticket if there is one."""
        return self.settings.participants(self.part if self.part is not None else model)

    def metrics(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.current_sparsity}


class HoldCallback(ParticipantCallback):
    """Keeps a sparsifier's masks while Lightning trains on."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        super().__init__(sparsifier.hold())
        self.sparsifier = sparsifier

    def metrics(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.sparsifier.sparsity.overall}
