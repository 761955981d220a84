"""The one choice from unit scores to masks, for the sparsifier (which masks) and the pruners (which remove)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasterai.core.contexts import Context, Local, PerTarget
from fasterai.core.criteria import Criterion
from fasterai.core.scores import NotFiniteError
from fasterai.core.selection import Scores, TensorScores, count_true, keep_highest
from fasterai.core.types import Limits
from fasterai.units.pool import Pool
from fasterai.units.rules import Moment, Rule, nested

__all__ = ["Goal", "choose", "limits_of"]


@dataclass(frozen=True)
class Goal:
    """A context and the sparsity asked of it.

    Attributes:
        context: The context that chooses among units.
        sparsity: The share of the units to remove, in [0, 1].
    """

    context: Context
    sparsity: float

    def at(self, share: float) -> Goal:
        """Return a share of the goal: half of a sparsity of 0.8 is one of 0.4."""
        return replace(self, sparsity=self.sparsity * share)

    def asked(self, counts: Mapping[str, int]) -> tuple[int, ...]:
        """Return the numbers of units to remove, given the units of each pool; while they are equal, so are the masks."""
        return self.context.asked(counts, self.sparsity)

    def total(self, counts: Mapping[str, int]) -> int:
        """Return the number of units to remove of all pools together, given the units of each pool."""
        return self.context.total(counts, self.sparsity)

    @property
    def highest(self) -> float:
        """The highest sparsity asked for of any pool."""
        shares = self.context.sparsities if isinstance(self.context, PerTarget) else {"": 1.0}
        return self.sparsity * max(shares.values(), default=0.0)

    def left(self, first: Mapping[str, int], now: Mapping[str, int]) -> Goal:
        """Return the goal for the units that are left, where some have been removed already.

        A sparsity of 0.5 of 16 channels asks to remove 8. If 12 are left, 4 are removed already and 4 are still to go: a third
        of those that are left. A pool that has more removed than it asks for loses none.

        >>> from fasterai.core.contexts import local
        >>> goal = Goal(local, 0.5).left({"conv1": 16, "conv2": 8}, {"conv1": 12, "conv2": 2})
        >>> {name: round(share, 3) for name, share in goal.context.sparsities.items()}
        {'conv1': 0.333, 'conv2': 0.0}

        Args:
            first: Pool's name -> number of its units at first.
            now: Pool's name -> number of its units now; a pool that is not there any more has one unit left.
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
    """Return the limits of a choice among pools.

    Args:
        pools: The pools whose units compete.
        min_keep: The number of units of each pool that are kept at least; 0 is used where a pool is one unit by definition.
        may_fall: True if pruned units may return.
        round_to: A multiple that the kept units of each pool are rounded up to; None for the pool's own.
        first: Pool's name -> number of its units before any were removed, where some have been.
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
    by: Criterion | None = None,
) -> list[Tensor]:
    """Choose the units to keep.

    Args:
        pools: The pools whose units compete.
        scores: Their unit scores, with the decisions so far.
        goal: The context and the sparsity.
        limits: The limits of the choice.
        rule: The rule by which new decisions follow from those so far.
        moment: The moment of the training; None for pruning at once.
        grow: Criterion -> the pools' scores by it; called only if the rule exchanges units.
        by: The criterion of the scores, for messages.

    Returns:
        For each pool a bool tensor of the units' shape, True = keep.

    Raises:
        ValueError: The sparsity is out of range, or a score is NaN or infinite.
    """
    limits = replace(limits, nested=not rule.chooses_anew(moment))
    with _blamed(by, pools):
        keeps = goal.context(scores, [p.layout for p in pools], goal.sparsity, limits)
    share, criterion = rule.exchanged(moment), rule.growing(moment)
    if not share or criterion is None or grow is None or all(s.keep is None for s in scores):
        return keeps
    grown = grow(criterion)
    with _blamed(criterion, pools):
        return [_exchange(s, keep, g, share) for s, keep, g in zip(scores, keeps, grown, strict=True)]


@contextmanager
def _blamed(by: Criterion | None, pools: Sequence[Pool]) -> Iterator[None]:
    """Name the criterion in the error of scores that are not finite, where the weights themselves are."""
    try:
        yield
    except NotFiniteError as error:
        weights = [t.parameter for pool in pools if pool.name == error.name for t in pool.targets]
        if by is None or not all(bool(torch.isfinite(w).all()) for w in weights):
            raise
        read = ", ".join([*by.evidence_names, *by.gatherers])
        raise ValueError(
            f"criteria must return finite scores, got NaN or infinity from {by.title} for {error.name}, whose weights are "
            f"finite{f'; it reads {read}' if read else ''}"
        ) from error


def _exchange(scores: Scores, keep: Tensor, grow: Scores, share: float) -> Tensor:
    """Drop a share of the kept units, the lowest, and keep as many instead that were pruned before, the highest by `grow`.

    Among equal scores the first are dropped, and the last take their place. At share 0.5, where `keep` is as before,
    `[1, 1, 0, 0]`, with the scores `[5, 1, 0, 0]` and the scores to grow by `[0, 0, 2, 7]`, the result is `[1, 0, 0, 1]`.
    """
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
