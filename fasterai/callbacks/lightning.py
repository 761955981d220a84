"""Lightning: a participant's callback, with the sparsity logged and everything in Lightning's own checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasterai.callbacks.settings import PruneSettings, SparsifySettings
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Schedule
from fasterai.model.inputs import as_batch
from fasterai.model.targets import LayerTypes
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
except ImportError as error:
    raise ImportError("fasterai.callbacks.lightning needs lightning: pip install 'fasterai[lightning]'") from error

if TYPE_CHECKING:
    from fasterai.prune.gradual import GradualPruner
    from fasterai.prune.surgery.model_copies import Copies

__all__ = ["HoldCallback", "ParticipantCallback", "PruneCallback", "SparsifyCallback"]


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

    def _refuse_learner(self, learner: Any) -> None:
        kind = type(self).__name__
        raise TypeError(f"cbs must be fastai's, got Lightning's {kind}; from fasterai.callbacks.fastai import {kind}")

    learn = property(fset=_refuse_learner)  # what a fastai learner sets first

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
            optimizer=trainer.optimizers[0] if len(trainer.optimizers) == 1 else list(trainer.optimizers),
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
    steps = trainer.max_steps if manual and trainer.max_steps != -1 else _estimated_steps(trainer)
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            f"max_epochs or max_steps of the Trainer must give the run an end, got max_epochs={trainer.max_epochs} and "
            f"max_steps={trainer.max_steps} with {trainer.num_training_batches} batches an epoch"
        )
    return int(steps)


def _estimated_steps(trainer: pl.Trainer) -> float:
    """Lightning's estimate, less the epoch without steps that SWA adds to measure batch norms anew."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ends = [c.swa_end + 1 for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    per_epoch = _steps_per_epoch(trainer)
    return min([trainer.estimated_stepping_batches, *(per_epoch * end for end in ends if per_epoch is not None)])


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


class PruneCallback(ParticipantCallback):
    """Takes channels out of the module while Lightning trains it; the optimizers go on.

    Note the order of the arguments, in which the schedule is the second. A checkpoint of a run is resumed with a module built
    as at first: what was taken out is taken out of it before the weights are loaded.

    Args:
        pruning_ratio: The share of the channels that go, in [0, 1), or a dict of names of layers to shares (context `local`).
        schedule: Which share of the ratio is gone at which position: a schedule that never falls, its name, or a function of
            the position.
        context: `local` ranks inside each group of coupled channels, `global` all together; or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        ignored_layers: Modules, or their names, whose outputs stay, besides all that has to stay anyway.
        example_inputs: A tensor or tuple that the model runs on; `example_input_array` or a few samples of the first batch
            if left out.
        model: The part of the module that channels go from; all of it if left out.
        max_updates: How often channels go in a run, at most.
        copies: Modules of the same structure, or a function that gives them; those of Lightning's `WeightAveraging` are found.
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
        self._trainer: pl.Trainer | None = None
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

    def participants(self, model: nn.Module) -> Sequence[Participant]:
        """The `GradualPruner`."""
        return [self.settings.participant(model if self.part is None else self.part, self._copies)]

    def metrics(self) -> dict[str, float]:
        """The share of the channels that are gone: `sparsity`, or `removed` where masks log something of that name."""
        masked = any(isinstance(callback, SparsifyCallback | HoldCallback) for callback in self._callbacks())
        return {"removed" if masked else "sparsity": self.current_sparsity}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the last run, and wait for a checkpoint."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        self._wait_for_checkpoint(pl_module)

    def _wait_for_checkpoint(self, pl_module: pl.LightningModule) -> None:
        """Lightning loads the weights before it shows a callback its state; the module's own hook comes before both."""
        _stop_waiting(pl_module)
        own = vars(pl_module).get("on_load_checkpoint")
        pl_module.on_load_checkpoint = _CutFirst(self, pl_module, own)  # type: ignore[method-assign]

    def cut_as_in(self, checkpoint: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        """Take out of a module what was taken out when a checkpoint was saved."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            self.participants(pl_module)[0].load_state_dict(state["participants"][0])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A checkpoint has been loaded by now, if there is one."""
        for module in (pl_module, *self._averages()):
            _stop_waiting(module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the run that failed or was interrupted."""
        _stop_waiting(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        _stop_waiting(pl_module)
        self._trainer = None

    def _callbacks(self) -> list[pl.Callback]:
        return list(self._trainer.callbacks) if self._trainer is not None else []  # type: ignore[attr-defined]

    def _averages(self) -> list[nn.Module]:
        """The modules inside Lightning's own moving averages."""
        averages = [c._average_model for c in self._callbacks() if isinstance(c, WeightAveraging)]
        return [average.module for average in averages if average is not None]

    def _copies(self) -> list[Any]:
        return [self.settings.copies, *self._averages()]

    def _after_step(self, trainer: pl.Trainer) -> None:
        removals = self._removals
        super()._after_step(trainer)
        if self._removals > removals:
            self._restart_trackers()

    def _end(self, completed: bool) -> None:
        removals = self._removals
        super()._end(completed)
        if self._removals > removals:
            self._restart_trackers()

    @property
    def _removals(self) -> int:
        return len(self.pruner.plans) if self.pruner else 0

    def _restart_trackers(self) -> None:
        """The best model so far does not fit any more: the next one is the best."""
        for tracker in self._callbacks():
            if isinstance(tracker, EarlyStopping):
                tracker.best_score = _worst(tracker.mode)
            if isinstance(tracker, ModelCheckpoint) and tracker.monitor is not None:
                tracker.best_k_models, tracker.kth_best_model_path, tracker.best_model_path = {}, "", ""
                tracker.kth_value, tracker.best_model_score = _worst(tracker.mode), None


class _CutFirst:
    """Stands on a module until a checkpoint is loaded into it, or a run begins without one."""

    def __init__(self, callback: PruneCallback, module: pl.LightningModule, own: Any) -> None:
        self.callback, self.module, self.own = callback, module, own

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        _stop_waiting(self.module)
        self.callback.cut_as_in(checkpoint, self.module)
        self.module.on_load_checkpoint(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CutFirst:
        return self  # a moving average copies the module while it waits


def _stop_waiting(module: nn.Module) -> None:
    waiting = vars(module).get("on_load_checkpoint")
    if isinstance(waiting, _CutFirst):
        del module.on_load_checkpoint
        if waiting.own is not None:
            module.on_load_checkpoint = waiting.own


def _worst(mode: str) -> Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)
