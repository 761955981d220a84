"""A training loop's events, and what takes part in them.

Callbacks translate the events of their framework into calls of a `Loop`; the loop passes them on to its participants.
Callbacks know no method and methods know no framework, so the two add up instead of multiplying.

    start -> ( after_loss -> before_step -> after_step )* -> end

To add a kind of method: a `Participant`. To add a framework: a file in `fasterai/callbacks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fasterai.core.checks import check_count

__all__ = ["Batch", "Fit", "Loop", "Participant"]


@dataclass(frozen=True)
class Batch:
    """One batch, as the loop has it.

    Attributes:
        inputs: The positional arguments of the model.
        targets: What the loss compares with, if there is such a thing.
    """

    inputs: tuple[Any, ...]
    targets: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What a run of training is.

    Attributes:
        total_steps: Optimizer steps from the beginning to the end of the schedule, at least 1.
        model: The model that is trained, wrapped or not.
        optimizer: The loop's optimizer, torch's or another; a list of several.
        loss: The loss function `(output, *targets) -> scalar`, if the loop has one.
        batch: The first batch, if the loop can say.
        steps_per_epoch: Optimizer steps in an epoch, if the loop has epochs.
    """

    total_steps: int
    model: nn.Module | None = None
    optimizer: Any = None
    loss: Callable[..., Tensor] | None = None
    batch: Batch | None = None
    steps_per_epoch: int | None = None

    @property
    def optimizers(self) -> list[Any]:
        """The loop's optimizers: none, one or several."""
        if isinstance(self.optimizer, list | tuple):
            return list(self.optimizer)
        return [] if self.optimizer is None else [self.optimizer]


class Participant:
    """Anything that takes part in training; every event has a default that does nothing."""

    def on_fit_start(self, fit: Fit) -> None:
        """Before the first step of a run."""

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Between the loss and the backward pass; returns the loss to go on with."""
        return loss

    def before_step(self, position: float) -> None:
        """Before the optimizer's step; `position` in (0, 1] is the one after it."""

    def after_step(self, position: float) -> None:
        """After the optimizer's step; `position` in (0, 1] is the one after it, 1 after the last."""

    def on_fit_end(self, completed: bool) -> None:
        """After the run; `completed` is False if it was stopped or failed."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later: tensors, numbers and text only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the caller's dict is not changed."""


class Loop:
    """Counts the steps of a run and passes its events on.

    Attributes:
        participants: Who takes part.
        step: Steps done. A callback whose framework counts for itself sets it before each step.
        total_steps: Steps of the run under way, 0 if there is none.
    """

    def __init__(self, participants: Sequence[Participant]) -> None:
        self.participants = list(participants)
        self.step = 0
        self.total_steps = 0

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self.total_steps > 0

    def start(self, fit: Fit) -> None:
        """Begin a run; whoever had begun it already ends it if another participant refuses.

        Raises:
            ValueError: `fit.total_steps` is not at least 1.
        """
        total_steps = check_count("total_steps", fit.total_steps)
        with ExitStack() as begun:
            for participant in self.participants:
                participant.on_fit_start(fit)
                begun.callback(participant.on_fit_end, False)
            begun.pop_all()
        self.step, self.total_steps = 0, total_steps

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss after every participant has had it."""
        for participant in self.participants:
            loss = participant.after_loss(loss, batch)
        return loss

    def before_step(self) -> None:
        """The optimizer is about to step.

        Raises:
            ValueError: The run has had its `total_steps` already.
        """
        if self.step >= self.total_steps:
            raise ValueError(
                f"total_steps must be at least the number of steps taken, got {self.total_steps} and a further step; end "
                "the run first (handle.remove()), then train on, with the masks held if they should stay"
            )
        for participant in self.participants:
            participant.before_step((self.step + 1) / self.total_steps)

    def after_step(self) -> None:
        """The optimizer has stepped."""
        self.step += 1
        for participant in self.participants:
            participant.after_step(self.step / self.total_steps)

    def end(self, completed: bool) -> None:
        """End the run for every participant, also if one of them fails; further calls do nothing."""
        if not self.running:
            return
        self.total_steps = 0
        with ExitStack() as ends:
            for participant in reversed(self.participants):
                ends.callback(participant.on_fit_end, completed)

    def state_dict(self) -> dict[str, Any]:
        """The step, and the participants' states."""
        return {"step": self.step, "participants": [p.state_dict() for p in self.participants]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; if one participant refuses it, all stay as they were.

        Raises:
            ValueError: It is no loop's state, of other participants, or of a longer run.
        """
        if not isinstance(state, Mapping) or not {"step", "participants"} <= set(state):
            raise ValueError(f"state must be what state_dict() returned, got {_summary(state)}")
        states = state["participants"]
        if len(states) != len(self.participants):
            raise ValueError(f"state must hold {len(self.participants)} participants, got {len(states)}")
        if self.running and state["step"] > self.total_steps:
            raise ValueError(f"total_steps must be at least the {state['step']} steps of the state, got {self.total_steps}")
        before = [p.state_dict() for p in self.participants]
        try:
            _load(self.participants, states)
        except Exception:
            _load(self.participants, before)
            raise
        self.step = state["step"]


def _load(participants: Sequence[Participant], states: Sequence[Mapping[str, Any]]) -> None:
    for participant, state in zip(participants, states, strict=True):
        participant.load_state_dict(state)


def _summary(state: object) -> str:
    return f"one with {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, Mapping) else repr(state)
