"""L5. Lightning: a participant's callback, with the sparsity logged and everything in Lightning's own checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasterai.callbacks.settings import SparsifySettings
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Schedule
from fasterai.core.targets import LayerTypes
from fasterai.sparse.evidence import as_batch
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError("fasterai.callbacks.lightning needs lightning: pip install 'fasterai[lightning]'") from error

__all__ = ["HoldCallback", "ParticipantCallback", "SparsifyCallback"]


class ParticipantCallback(pl.Callback):
    """Lets participants take part in Lightning's training.

    A run begins with the first training batch. Steps are the optimizer's own, so that accumulation, clipping, precision
    and several optimizers of manual optimization need nothing. Checkpoints hold the participants' states, and `ckpt_path=`
    resumes them.

    Args:
        *participants: Whatever takes part.
    """

    def __init__(self, *participants: Participant) -> None:
        self._participants = list(participants)
        self.loop = Loop([])
        self._resumed: Mapping[str, Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self._batch = Batch(())

    def participants(self, model: nn.Module) -> Sequence[Participant]:
        """Who takes part in the run that begins.

        Args:
            model: The LightningModule as the strategy has wrapped it.
        """
        return self._participants

    def metrics(self) -> dict[str, float]:
        """What is logged at the end of an epoch: name -> value."""
        return {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the last run, before a checkpoint is loaded."""
        if stage == "fit":
            self.loop, self._resumed = Loop([]), None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the run with its first batch."""
        self._batch = as_batch(batch)
        if self.loop.running:
            return
        model = trainer.strategy.model
        self.loop = Loop(self.participants(pl_module if model is None else model))
        self.loop.start(self._fit(trainer, pl_module))
        if self._resumed is not None:
            self.loop.load_state_dict(self._resumed)
            self._resumed = None
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)))

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Fit:
        example = pl_module.example_input_array
        inputs = self._batch.inputs if example is None else trainer.strategy.batch_to_device(example)
        return Fit(
            total_steps=_total_steps(trainer),
            model=pl_module if trainer.strategy.model is None else trainer.strategy.model,
            optimizer=trainer.optimizers[0] if len(trainer.optimizers) == 1 else None,
            batch=Batch(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), self._batch.targets),
            steps_per_epoch=_steps_per_epoch(trainer),
        )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Show the batch to the participants; Lightning lets no callback change the loss."""
        if self.loop.after_loss(loss, self._batch) is not loss:
            raise RuntimeError("Lightning's callbacks cannot change the loss: add it in training_step")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """An optimizer is about to step."""
        self._count(trainer)
        self.loop.before_step()

    def _after_step(self, trainer: pl.Trainer) -> None:
        self._count(trainer)
        self.loop.after_step()

    def _count(self, trainer: pl.Trainer) -> None:
        """Lightning's count of steps; it goes on only after an optimizer's hooks."""
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

    def _end(self, completed: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._batch = [], Batch(())
        self.loop.end(completed)

    def state_dict(self) -> dict[str, Any]:
        """The step and the participants' states, for Lightning's checkpoint."""
        if self._resumed is not None:
            return dict(self._resumed)
        return self.loop.state_dict() if self.loop.participants else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note a checkpoint's state; the run that begins takes it over."""
        self._resumed = state_dict


def _counts_steps(trainer: pl.Trainer) -> bool:
    """Whether a run is measured in steps; in manual optimization nobody knows how many an epoch will take."""
    return trainer.lightning_module.automatic_optimization or trainer.max_steps != -1


def _total_steps(trainer: pl.Trainer) -> int:
    manual = not trainer.lightning_module.automatic_optimization
    steps = trainer.max_steps if manual and trainer.max_steps != -1 else trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            f"max_epochs or max_steps of the Trainer must give the run an end, got max_epochs={trainer.max_epochs} and "
            f"max_steps={trainer.max_steps} with {trainer.num_training_batches} batches an epoch"
        )
    return int(steps)


def _steps_per_epoch(trainer: pl.Trainer) -> int | None:
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None


def _steps_done(trainer: pl.Trainer) -> int:
    """Steps, or batches, before the one under way."""
    return trainer.global_step if _counts_steps(trainer) else trainer.fit_loop.total_batch_idx


class SparsifyCallback(ParticipantCallback):
    """Sparsifies the module while Lightning trains it.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: Which weights share one decision, or its name.
        context: Which units compete, or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        schedule: How much is pruned at which position: a schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move (lottery tickets).
        rewind_epoch: The epoch whose beginning is gone back to.
        reset_end: Go back at the end of the run, with `lth` or without.
        save_tickets: With `lth`, a folder to save each ticket in.
        model: The part of the module to sparsify; all of it if left out.
        round_to: Kept units of each target are rounded up to a multiple of it.
        nm: Prune two of every four neighbouring inputs.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        **options: Of the `Sparsifier`: `targets`, `data`, `loss`, `example_inputs`, `min_keep`, `max_updates`.

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
        save_tickets: str | None = None,
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
            save_tickets=save_tickets is not None,
            options={"round_to": round_to, "nm": nm, "layer_type": layer_type, **options},
        )

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The sparsifier of the last run, None before the first."""
        return self.settings.sparsifier

    @property
    def current_sparsity(self) -> float:
        """The share of units that the masks prune now, in [0, 1]."""
        return self.sparsifier.sparsity.overall if self.sparsifier else 0.0

    def participants(self, model: nn.Module) -> Sequence[Participant]:
        """The sparsifier, and the lottery ticket if there is one."""
        return self.settings.participants(model if self.part is None else self.part, self.save_tickets)

    def metrics(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.current_sparsity}


class HoldCallback(ParticipantCallback):
    """Keeps a sparsifier's masks while Lightning trains on."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        if not isinstance(sparsifier, Sparsifier):
            got = type(sparsifier).__name__
            raise TypeError(f"sparsifier must be a Sparsifier, got {got}; after a fit pass its callback's `.sparsifier`")
        super().__init__(sparsifier.hold())
        self.sparsifier = sparsifier

    def metrics(self) -> dict[str, float]:
        """The sparsity, counted from the masks."""
        return {"sparsity": self.sparsifier.sparsity.overall}
