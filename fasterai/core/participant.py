"""Anything that takes part in a training loop: the events that it can answer to. `core/loop.py` passes them on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fasterai.core.batch import Batch, Fit
from fasterai.core.types import Move
from fasterai.model.cuts import Cut

__all__ = ["EVENTS", "Participant", "own_parameters", "tell"]

#: The events of a participant, in the order in which a run has them.
EVENTS = (
    *("on_setup", "on_fit_start", "after_forward", "on_first_batch", "after_loss", "after_backward", "before_step"),
    *("after_step", "after_skip", "after_move", "after_cut", "metrics", "on_fit_end"),
)


class Participant:
    """Anything that takes part in training; every event has a default that does nothing."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    @property
    def name(self) -> str:
        """Its name in saved states and messages; participants of one name in a loop are numbered."""
        return type(self).__name__

    def hears(self, event: str) -> bool:
        """Tell if it answers to an event; loops tell it of no other, and refuse what they cannot give."""
        return getattr(type(self), event) is not getattr(Participant, event)

    def relies_on(self) -> Iterable[Participant]:
        """Return the participants without which it has nothing to do; each has to be in this run, or in another one."""
        return ()

    def check_beside(self, other: Participant) -> None:
        """Refuse a participant that takes part at the same time, in this run or in another one, where both cannot be."""

    def on_setup(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return parameters of its own that the optimizer is to train; called once, before the run."""
        return ()

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run, before its first step."""

    def after_forward(self, batch: Batch) -> None:
        """Look at a batch with the model's outputs, before the backward pass."""

    def on_first_batch(self, batch: Batch) -> Iterable[nn.Parameter]:
        """Return parameters of its own that only a batch's outputs tell; called once, after the first `after_forward`."""
        return ()

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return the loss to go on with; `loss` is that of the batch, before any scaling for accumulation or precision."""
        return loss

    def after_backward(self) -> None:
        """Look at or change the gradients of a step: all accumulated, unscaled, not clipped yet."""

    def before_step(self, position: float) -> None:
        """Prepare for the optimizer's step, after clipping; `position` in (0, 1] is the one after it."""

    def close_step(self) -> None:
        """Take away what stands in the model for the time of the optimizer's step alone, before anybody hears `after_step`."""

    def after_step(self, position: float) -> None:
        """Go on after the optimizer's step; `position` in (0, 1] is the one after it, 1 after the last."""

    def after_skip(self) -> None:
        """Go on without the step that `before_step` has announced: it was skipped for an overflow, cancelled, or has failed."""

    def after_move(self, move: Move) -> None:
        """Answer to masks of the model that have moved; the weights under them may not be zero yet."""

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""

    def metrics(self) -> dict[str, float]:
        """Return figures for the loop's own table or logger: name -> value."""
        return {}

    def shortfall(self) -> str:
        """Return in words how far the present or last run went, if that is less than was asked for; empty if it is not."""
        return ""

    def look_back(self) -> None:
        """Look at the model once more, when the framework has done all that it does after a run."""

    def on_fit_end(self, completed: bool) -> None:
        """End the run; `completed` is False if it was stopped or failed."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later: tensors, numbers and text only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the caller's dict is not changed."""


def tell(participant: Participant, event: str, *arguments: Any) -> Any:
    """Pass an event on; an error of the participant gets a note that names it."""
    try:
        return getattr(participant, event)(*arguments)
    except Exception as error:
        note = f"raised in {event} of the participant {participant.name}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def own_parameters(participant: Participant, event: str, shown: nn.Module | Batch) -> list[nn.Parameter]:
    """Return the parameters that a participant wants to train, by its answer to `on_setup` or `on_first_batch`.

    Raises:
        TypeError: What it returns is no list of parameters; one parameter alone would be taken for its rows.
    """
    found = tell(participant, event, shown)
    own = list(found) if isinstance(found, Iterable) and not isinstance(found, Tensor) else [None]
    if not all(isinstance(p, Tensor) and p.is_leaf for p in own):
        raise TypeError(f"{participant.name}.{event} must return a list of parameters, [] for none, got {_kind(found)}")
    return [p for p in own if p is not None]


def _kind(found: object) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
