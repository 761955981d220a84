"""Plan of a training's updates: the few steps at which the masks change, spread evenly over the surviving units.

Pruning from 98 % to 99 % takes as large a share of what is left as pruning from 0 to 50 %. So updates are spent by the
logarithm of the density, `-log(1 - sparsity * share)`, not by the share itself:

    OneCycle(beta=5) to 99 %, 4,000 steps, 50 updates   largest update, in survivors   the last step's
    even in the share                                   65 %                           65 %
    even in the survivors                               12 %                            0 %
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fasterai.core.checks import check_fraction

__all__ = ["Updates", "plan_updates"]

POSITIONS = 100_000  # at which a schedule is looked at, at most
LEAST_SPARSITY = 1e-9  # below it no unit goes, and logarithms lose their digits


@dataclass(frozen=True)
class Updates:
    """Updates of a training run.

    Attributes:
        positions: Where each update happens, in (0, 1], rising.
        shares: The share of the asked sparsity that each one goes to, in [0, 1].
    """

    positions: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    def share(self, position: float) -> float:
        """Return the share that the latest update up to `position` goes to; 0 before the first.

        >>> Updates((0.5, 1.0), (0.4, 1.0)).share(0.75)
        0.4
        """
        done = bisect.bisect_right(self.positions, position + 1e-9)
        return self.shares[done - 1] if done else 0.0


def plan_updates(schedule: Callable[[float], float], sparsity: float, total_steps: int, max_updates: int) -> Updates:
    """Plan at most `max_updates` updates that follow a schedule.

    If the schedule moves at no more than `max_updates` steps, there is one at each of them. If it moves at more, the way of
    the survivors, `|log density|` summed over all rises and falls of the schedule, is divided into even shares. An update
    happens where the schedule has gone on by one of them since the last, and goes to the schedule's own share there. The end
    of the schedule, and each turning point, is gone to as soon as it is within half an even share, so that training goes on
    afterwards. No update takes more than one and a half even shares, beyond what the schedule itself jumps in a step.

    Args:
        schedule: Position of the training in [0, 1] -> share of the sparsity in [0, 1].
        sparsity: The asked sparsity, in [0, 1).
        total_steps: Steps of the run, at least 1.
        max_updates: Updates at most, at least 1.

    Raises:
        ValueError: The schedule returns a share outside of [0, 1].
    """
    if sparsity < LEAST_SPARSITY:
        return Updates()
    count = min(total_steps, POSITIONS)
    positions = [i / count for i in range(1, count + 1)]
    shares = [check_fraction("what the schedule returns", schedule(p)) for p in positions]
    moving = [(p, s) for p, s, before in zip(positions, shares, [0.0, *shares], strict=False) if s != before]
    if len(moving) <= max_updates:
        return _updates(moving)
    way = [0.0, *(-math.log1p(-sparsity * share) for share in shares)]
    turns, even = _divide(way, max_updates)
    chosen, last, done = [], 0.0, 0
    for turn in turns:
        near = min(even, abs(way[turn] - last)) / 2
        for i in range(done + 1, turn + 1):
            if abs(way[turn] - way[i]) <= near:
                if way[turn] != last:
                    chosen.append((positions[i - 1], shares[turn - 1]))
                last, done = way[turn], i
                break
            # Less a rounding error: (12 - 8) / 20 comes out below 1 / 5.
            if abs(way[i] - last) >= even * (1 - 1e-9):
                chosen.append((positions[i - 1], shares[i - 1]))
                last = way[i]
    return _updates(chosen)


def _updates(chosen: Sequence[tuple[float, float]]) -> Updates:
    return Updates(tuple(p for p, _ in chosen), tuple(s for _, s in chosen))


def _divide(way: Sequence[float], max_updates: int) -> tuple[list[int], float]:
    """Find the turning points of a way (its end is the last one), and the length of an even share.

    Between two turns an update may take half an even share, so that each turn costs half an update.
    """
    length = sum(abs(b - a) for a, b in itertools.pairwise(way))
    turns = _turns(way, length / max_updates)
    return turns, length / (max_updates - (len(turns) / 2 if len(turns) > 1 else 0))


def _turns(way: Sequence[float], least: float) -> list[int]:
    """Find the indices where a way turns back by at least `least`, and the index of its end.

    >>> _turns([0.0, 1.0, 3.0, 2.9, 3.1, 1.0, 0.0], 0.5)
    [4, 6]
    """
    turns: list[int] = []
    extreme, direction = 0, 0  # the farthest place since the last turn, and which way it lies
    for i, value in enumerate(way):
        gone = value - way[extreme]
        if direction == 0 or gone * direction > 0:
            direction = direction or (gone > 0) - (gone < 0)
            extreme = i if gone else extreme
        elif abs(gone) >= max(least, 1e-12):
            turns.append(extreme)
            extreme, direction = i, -direction
    return [*turns, len(way) - 1]
