"""L3. When the masks of a training move: a schedule, and how far a run has come on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasterai.core.checks import check_fraction
from fasterai.core.schedules import Schedule

__all__ = ["Pace"]


class Pace:
    """Follows a schedule, at most `max_updates` times a run.

    Attributes:
        share: The share of the asked sparsity that the masks were moved to last, in [0, 1].
        asked: The counts that were asked for last; as long as they are the same, the masks stay.
    """

    def __init__(self, schedule: Schedule, max_updates: int) -> None:
        self.schedule = schedule
        self.max_updates = max_updates
        self.share = 0.0
        self.asked: tuple[Any, ...] = ()
        self._tick = 0
        self._steps = 1

    @property
    def finished(self) -> bool:
        """Whether the run has been to its end."""
        return self._tick >= self.max_updates

    def start(self, total_steps: int) -> None:
        """Begin a run."""
        self.share, self.asked, self._tick, self._steps = 0.0, (), 0, total_steps

    def finish(self) -> None:
        """End a run."""
        self._tick = self.max_updates

    def put_off(self) -> None:
        """Let a move that was due wait for the next step."""
        self._tick -= 1

    def at(self, position: float) -> float:
        """The schedule's share at a position of the training, both in [0, 1]."""
        return check_fraction("what the schedule returns", self.schedule(position))

    def is_due(self, position: float) -> bool:
        """Whether the masks may move at a position; each position is asked for once, unless the move is put off.

        In a run of up to `max_updates` steps they may at every step, in a longer one where both the run and the schedule
        have gone on by that share since the last move, and always at the end.
        """
        tick = int(position * self.max_updates + 1e-9)
        passed, self._tick = tick > self._tick, max(tick, self._tick)
        if position >= 1:
            return True
        if not passed or self._steps <= self.max_updates:
            return passed
        # Less a rounding error: (12 - 8) / 20 comes out below 1 / 5.
        return abs(self.at(position) - self.share) >= 1 / self.max_updates - 1e-9

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come: numbers only."""
        return {"share": self.share, "asked": list(self.asked), "tick": self._tick}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.share, self.asked, self._tick = state["share"], tuple(state["asked"]), state["tick"]
