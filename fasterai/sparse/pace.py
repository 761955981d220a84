"""The steps of a training at which the masks change, and the share of the schedule that is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasterai.core.schedules import Schedule
from fasterai.core.updates import Updates, plan_updates
from fasterai.units.rules import Moment

__all__ = ["Pace"]


class Pace:
    """The progress of a run along a schedule, in at most `max_updates` changes of the masks.

    Attributes:
        share: The share of the asked sparsity at the last change of the masks, in [0, 1].
        asked: The counts of units that were asked for last; while they are the same, the masks stay.
        finished: True if the run has reached its end.
        total_steps: The steps of the run.
    """

    total_steps = 0  # pickles of earlier versions have none

    def __init__(self, schedule: Schedule, max_updates: int) -> None:
        self.schedule = schedule
        self.max_updates = max_updates
        self.share = 0.0
        self.asked: tuple[Any, ...] = ()
        self.finished = False
        self._updates = Updates()

    def start(self, total_steps: int, sparsity: float) -> None:
        """Begin a run of so many steps to a sparsity in [0, 1)."""
        self.share, self.asked, self.finished = 0.0, (), False
        self.total_steps = total_steps
        self._updates = plan_updates(self.schedule, sparsity, total_steps, self.max_updates)

    def finish(self) -> None:
        """End a run."""
        self.finished = True

    def at(self, position: float) -> float:
        """Return the share of the asked sparsity that is due at a position of the training; both in [0, 1]."""
        return self.schedule(1.0) if position >= 1 else self._updates.share(position)

    def is_due(self, position: float) -> bool:
        """Tell if the masks may change at a position: if a share is due that is not reached, and always at the end."""
        return position >= 1 or self.at(position) != self.share

    def moment(self, position: float) -> Moment:
        """Return the moment of the run at a position."""
        return Moment(round(position * self.total_steps), position)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress of the run: numbers only."""
        return {"share": self.share, "asked": list(self.asked), "finished": self.finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, which `check_state` has let in."""
        self.share, self.asked = state["share"], tuple(state["asked"])
        self.finished = bool(state.get("finished", False))  # states of earlier versions have none
