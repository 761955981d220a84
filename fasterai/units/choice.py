"""From unit scores to masks, in one place for the sparsifier, which masks, and the pruners, which remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fasterai.core.contexts import Context, Local, PerTarget
from fasterai.core.criteria import Criterion
from fasterai.core.selection import Scores, TensorScores, count_true, keep_highest
from fasterai.core.types import Limits
from fasterai.units.pool import Pool
from fasterai.units.rules import Moment, Rule, nested

__all__ = ["Goal", "choose", "limits_of"]


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        context: Which units compete.
        sparsity: The share of them that goes, in [0, 1].
    """

    context: Context
    sparsity: float

    def at(self, share: float) -> Goal:
        """Return the goal when a share of it is asked for."""
        return replace(self, sparsity=self.sparsity * share)

    def asked(self, counts: Mapping[str, int]) -> tuple[int, ...]:
        """Return how many units are asked for, of pools with so many units each."""
        return self.context.asked(counts, self.sparsity)

    def total(self, counts: Mapping[str, int]) -> int:
        """Return how many units of all pools together are to go."""
        return self.context.total(counts, self.sparsity)

    @property
    def highest(self) -> float:
        """The highest sparsity that any pool is asked for."""
        shares = self.context.sparsities if isinstance(self.context, PerTarget) else {"": 1.0}
        return self.sparsity * max(shares.values(), default=0.0)

    def left(self, first: Mapping[str, int], now: Mapping[str, int]) -> Goal:
        """Return what is still to go where units have been removed, as shares of those that are there.

        Args:
            first: Pool's name -> its units at first.
            now: Pool's name -> its units now; a pool that is none any more has one unit left.
        """
        if not isinstance(self.context, Local | PerTarget):
            gone = sum(n - now.get(name, 1) for name, n in first.items())
            return Goal(self.context, max(0, self.total(first) - gone) / max(1, sum(now.values())))
        shares = self.context.sparsities if isinstance(self.context, PerTarget) else dict.fromkeys(now, 1.0)
        wanted = {name: round(self.sparsity * shares.get(name, 0.0) * first[name]) for name in now}
        return Goal(PerTarget({name: max(0, wanted[name] - (first[name] - n)) / n for name, n in now.items()}), 1.0)


def limits_of(
    pools: Sequence[Pool],
    *,
    min_keep: int = 1,
    may_fall: bool = True,
    round_to: int | None = None,
    first: Mapping[str, int] | None = None,
) -> Limits:
    """Return what a choice among pools has to respect.

    Args:
        pools: Whose units compete.
        min_keep: Units that stay in each pool, except where a pool is one unit by definition.
        may_fall: Whether pruned units may return.
        round_to: Kept units of each pool are rounded up to a multiple of it; None leaves it to the pool.
        first: Pool's name -> its units before any were removed, where some have been.
    """
    steps = {p.name: p.step(round_to, (first or {}).get(p.name)) for p in pools}
    return Limits(
        min_keep=0 if any(p.is_whole for p in pools) else min_keep,
        may_fall=may_fall,
        round_to=steps if max(steps.values(), default=1) > 1 else None,
        make_up=round_to is None,
    )


def choose(
    pools: Sequence[Pool],
    scores: Sequence[Scores],
    goal: Goal,
    limits: Limits,
    *,
    rule: Rule = nested,
    moment: Moment | None = None,
    grow: Callable[[Criterion], Sequence[Scores]] | None = None,
) -> list[Tensor]:
    """Return which units stay.

    Args:
        pools: Whose units compete.
        scores: Their unit scores, with the decisions so far.
        goal: How many are to go.
        limits: What has to be respected besides.
        rule: How the decisions follow from those so far.
        moment: The moment of the training; None for pruning at once.
        grow: Criterion -> the pools' scores by it, asked for if the rule exchanges units.

    Returns:
        For each pool a bool tensor of the units' shape, True = keep.

    Raises:
        ValueError: The sparsity is out of range, or a score is NaN or infinite.
    """
    limits = replace(limits, nested=not rule.chooses_anew(moment))
    keeps = goal.context(scores, [p.layout for p in pools], goal.sparsity, limits)
    share, criterion = rule.exchanged(moment), rule.growing(moment)
    if not share or criterion is None or grow is None or all(s.keep is None for s in scores):
        return keeps
    grown = grow(criterion)
    return [_exchange(s, keep, g, share) for s, keep, g in zip(scores, keeps, grown, strict=True)]


def _exchange(scores: Scores, keep: Tensor, grow: Scores, share: float) -> Tensor:
    """Drop the lowest units of `keep`, of equals the first, and grow the best of those pruned before, of equals the last."""
    if scores.keep is None:
        return keep
    grounds = ~(scores.keep | keep)
    kept = count_true(keep)
    count = min(round(share * kept), count_true(grounds))
    if not count:
        return keep
    no_floor = Limits(min_keep=0)
    (stays,) = keep_highest([TensorScores(scores.name, scores.tensor(), keep)], scores.count - kept + count, no_floor)
    (grown,) = keep_highest([TensorScores(grow.name, grow.tensor(), grounds)], scores.count - count, no_floor)
    return stays | grown
