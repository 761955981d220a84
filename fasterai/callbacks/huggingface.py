"""Hugging Face's `Trainer`: participants in its training, their figures in its logs, their states in its checkpoints.

Over 300 lines, since one class answers to every event of the trainer, and keeps its file beside the checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from fasterai.core.batch import note_task, task_loss
from fasterai.core.checks import warn
from fasterai.core.files import write_saved
from fasterai.core.joined import innermost
from fasterai.core.loop import STOPPED, Batch, Fit, Loop, numbered
from fasterai.core.saved import check_loop_state

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("fasterai.callbacks.huggingface needs transformers: pip install '.[huggingface]'") from error

from fasterai.callbacks.huggingface_trainer import batches_of_step, checkpoint_folder, is_training, returned_loss, unscale

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

#: What the Trainer adds to the batch itself.
COUNT = "num_items_in_batch"
#: Where arguments keep the limit of the clipping that is left to a callback, until it gives it back.
KEPT = "_max_grad_norm_of_a_callback"


class ParticipantCallback(Elsewhere, TrainerCallback):  # type: ignore[misc]
    """Lets participants take part in a Trainer's training.

    A run begins with the first training batch, and counts the Trainer's own steps. Each checkpoint gets a file with the
    participants' states, and `trainer.train(resume_from_checkpoint=...)` goes on from it.

    The loss that participants see and change is the one that the model returns, as it does where a batch has labels. While a
    run lasts, hooks on the model show its batches and results, if a participant wants to see them.

    Args:
        *participants: Participants, or functions of the model that make some.

    Attributes:
        resume_from: The folder of the checkpoint that the Trainer resumes, to be set if it is not in its `output_dir`.
    """

    framework = "huggingface"
    is_late = True

    def __init__(self, *participants: Makes) -> None:
        self._given = participants
        self.resume_from: str | os.PathLike[str] | None = None
        self.loop = Loop([])
        self._hooks: list[Any] = []
        self._batch = Batch()
        self._args: Any = None
        self._state: Any = None
        self._optimizer: Any = None
        self._batches = 0
        self._clips_at = 0.0
        self._shares = 1
        self._is_trained_on: bool | None = None  # None without a changed loss

    def __repr__(self) -> str:
        return f"<{key_of(self, self._given)}>"

    def folder(self) -> Path:
        """Return the Trainer's output folder."""
        return Path("." if self._args is None else self._args.output_dir)

    def neighbours(self) -> Sequence[object]:
        """Return the callbacks that are known: the Trainer shows a callback no others."""
        return [self]

    def copies(self) -> list[Any]:
        """Return copies of the model that the Trainer keeps itself: none."""
        return []

    def metrics(self) -> dict[str, float]:
        """Return the figures that join the Trainer's logs: name -> value."""
        return self.loop.metrics()

    # --- a run -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **given: Any
    ) -> None:
        """Wait for the first batch, which begins the run.

        Raises:
            ValueError: Another callback of this class takes part in this training.
        """
        self._end(completed=False)
        self._end_earlier_runs(model, state)
        args.max_grad_norm = vars(args).pop(KEPT, args.max_grad_norm)
        self._batches = len(given["train_dataloader"]) if hasattr(given.get("train_dataloader"), "__len__") else 0
        self._args, self._state, self._optimizer, self.loop = args, state, given.get("optimizer"), Loop([])
        self._hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))

    def _end_earlier_runs(self, model: nn.Module, state: TrainerState) -> None:
        for hook in [*model._forward_pre_hooks.values()]:
            other = getattr(hook, "__self__", None)
            if not isinstance(other, ParticipantCallback):
                continue
            if other._state is not state:
                other._end_forgotten()
            elif other._file == self._file:
                kind = key_of(self, self._given)
                raise ValueError(f"callbacks must hold one {kind}, as its file has that name, got two; give one of them all")

    def _end_forgotten(self) -> None:
        kind, lacking = type(self).__name__, self.loop.shortfall()
        reached = f", with {lacking}" if lacking else ""
        warn(f"an earlier training was interrupted with its {kind} on the model{reached}: its run ends here")
        self._end(completed=False, why="")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Note the batch, and begin the run with the first one that trains."""
        self.loop.settle()
        if not (model.training and torch.is_grad_enabled()):
            return
        if not is_training(self):
            self._end_forgotten()
            return
        self._batch = Batch(tuple(args), (), {name: value for name, value in keywords.items() if name != COUNT})
        # Losses that are divided by the items of all accumulated batches are shares of a mean.
        self._shares = batches_of_step(self._args, self._state, self._batches) if keywords.get(COUNT) is not None else 1
        if not self.loop.running:
            self._begin(model)

    def _begin(self, model: nn.Module) -> None:
        args, state = self._args, self._state
        self.loop = Loop(made(self._given, model))
        self.loop.setup(model, self._optimizer)
        fit = Fit(
            total_steps=state.max_steps,
            model=model,
            optimizer=innermost(self._optimizer),
            loss=returned_loss,
            batch=self._batch,
            steps_per_epoch=max(1, round(state.max_steps / max(1e-9, float(state.num_train_epochs)))),
        )
        self.loop.start(fit)
        if state.global_step:
            self._resume(state.global_step, model)
        if self.loop.wants("after_forward", "after_loss"):
            self._hooks.append(model.register_forward_hook(self._after_forward))
        if self.loop.wants("after_backward"):  # the Trainer clips before it calls a callback, so it is left to this one
            self._clips_at, args.max_grad_norm = args.max_grad_norm, 0.0
            setattr(args, KEPT, self._clips_at)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Show the outputs, and return them with the loss that the participants give back."""
        if not (self.loop.running and model.training and torch.is_grad_enabled()):
            return output
        batch = replace(self._batch, outputs=output)
        self.loop.after_forward(batch)
        if not self.loop.wants("after_loss"):
            return output
        given = returned_loss(output)
        task = task_loss(given)
        whole = given * self._shares
        changed = self.loop.after_loss(whole if task is given else note_task(whole, task * self._shares), batch)
        loss = note_task(changed / self._shares, task)
        self._is_trained_on = bool(self._is_trained_on)
        if loss.requires_grad:
            loss.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
        if not isinstance(output, Mapping):
            return (loss, *output[1:])
        output["loss"] = loss  # type: ignore[index]
        return output

    def _note_backward(self, _: Tensor) -> None:
        self._is_trained_on = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **given: Any
    ) -> None:
        """Pass on that the gradients are complete, clip them if that was left to it, and that the optimizer steps."""
        if not self.loop.running:
            return
        is_trained_on, self._is_trained_on = self._is_trained_on, None
        if is_trained_on is False:
            names = ", ".join(p.name for p in self.loop.participants if p.hears("after_loss"))
            raise ValueError(
                f"the Trainer must train on the loss that the model returns, which {names} changes, got one of its own "
                "compute_loss; work it out in the model's forward"
            )
        self.loop.step = min(state.global_step, self.loop.total_steps - 1)
        unscale(self._optimizer)
        if self.loop.wants("after_backward"):
            self.loop.after_backward()
            if self._clips_at:
                torch.nn.utils.clip_grad_norm_(model.parameters(), self._clips_at)
        self.loop.before_step()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Pass on that the optimizer has stepped, unless the step was skipped for an overflow."""
        if not self.loop.running:
            return
        if getattr(self._optimizer, "step_was_skipped", False):
            self.loop.skip_step()  # the Trainer clears those of the model alone
        else:
            self.loop.after_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **given: Any
    ) -> None:
        """Put the figures into the Trainer's log."""
        if self.loop.participants and logs is not None:
            figures = {numbered(name, "_", logs): value for name, value in self.metrics().items()}
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """End the run."""
        self._end(completed=state.global_step >= state.max_steps)

    def _end(self, completed: bool, why: str = STOPPED) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._batch, self._is_trained_on = [], Batch(), None
        if self._clips_at:
            self._args.max_grad_norm, self._clips_at = vars(self._args).pop(KEPT, self._args.max_grad_norm), 0.0
        self.loop.end(completed, why)

    # --- saving and going on -----------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save the participants' states beside the checkpoint that was just written."""
        folder = checkpoint_folder(args.output_dir, state.global_step)
        if state.is_world_process_zero and self.loop.participants and folder.is_dir():
            write_saved(folder / self._file, {**self.loop.state_dict(), "weights": _sums(given["model"])})

    @property
    def _file(self) -> str:
        return f"{key_of(self, self._given)}.pt"

    def _resume(self, step: int, model: nn.Module) -> None:
        place = checkpoint_folder(self._args.output_dir, step)
        state = self._saved(place)
        if state is None:
            warn(
                f"the Trainer resumes at step {step}, and no {self._file} is in {place}: "
                "the participants begin afresh; set the callback's resume_from to the checkpoint's folder"
            )
            return
        check_loop_state(state)
        if state["step"] not in (step, step - 1):  # one less if that step was skipped for an overflow
            steps = f"at step {step}, got one of step {state['step']}"
            raise ValueError(f"resume_from must be the folder that the Trainer resumes, {steps}")
        if not _are_alike(state.get("weights"), _sums(model)):
            raise ValueError(
                f"resume_from must be the folder that the Trainer resumes, got {self.resume_from!r}, and the {self._file} that "
                "was found is that of another run: set the callback's resume_from"
            )
        self.loop.load_state_dict(state)

    def _saved(self, *places: Path) -> dict[str, Any] | None:
        """Return the state in the first of the folders that has one: the given one, the arguments' own, and others."""
        named = (self.resume_from, self._args.resume_from_checkpoint)
        folders = [Path(place) for place in named if isinstance(place, str | os.PathLike)] + list(places)
        found = next((file for folder in folders if (file := folder / self._file).is_file()), None)
        return None if found is None else torch.load(found, weights_only=True, map_location="cpu")


def _sums(model: nn.Module) -> list[float]:
    """Return a few sums of the weights, by which two states of a training are told apart."""
    parameters = [p.detach() for p in model.parameters()]
    return [float(p.double().abs().sum()) for p in (*parameters[:2], *parameters[-2:])]


def _are_alike(saved: Sequence[float] | None, now: Sequence[float]) -> bool:
    """Tell if sums are those of the same weights, on another device too; files of before have none."""
    return saved is None or all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(saved, now, strict=False))


class SparsifyCallback(SparsifyMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class HoldCallback(HoldMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class KnowledgeDistillationCallback(DistillMethod, ParticipantCallback):  # noqa: D101 - the method's
    pass


class PruneCallback(PruneMethod, ParticipantCallback):  # noqa: D101 - the method's
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **given: Any
    ) -> None:
        """Take out of the model what was taken out in the checkpoint of `TrainingArguments(resume_from_checkpoint=...)`."""
        self._args = args
        saved = self._saved()
        if saved is not None:
            (pruner,) = made(self._given, model)
            pruner.load_state_dict(saved["participants"][pruner.name])


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
