"""The catalogue of contexts: the units that compete with each other, and the number that is removed of each target.

A context is a frozen value. From unit scores and a sparsity it makes a decision per unit: keep or remove. Of the n units that
compete exactly `round(s * n)` are removed (Python's `round`: halves go to the even number). Among equal scores the position
decides. At least `min_keep` units of every target are kept.
Over 300 lines, since a catalogue is one file: five small classes, and the rounding that one of them needs.
To add one: a frozen class, its ready-made value, its name in `__all__`, a row in `tests/core/test_contexts.py` and a line in
`docs/contexts.md`.
"""

from __future__ import annotations

import heapq
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fasterai.core.checks import check_count, check_fraction
from fasterai.core.lamp import lamp_scores, sorted_lamp
from fasterai.core.scores import Scores, TensorScores, count_true
from fasterai.core.selection import keep_highest, round_kept, warn_of_min_keep
from fasterai.core.types import Layout, Limits
from fasterai.display import Brief

# `global` is a Python keyword, so the value is `global_`; its name, as text, is "global".
__all__ = ["erk", "global_", "lamp", "local", "two_four"]


class Context(ABC):
    """The base of all contexts: a choice of the units to keep, among those that compete.

    Attributes:
        looks_at_pruned: True if the scores of units that are pruned already change the choice among the others.
        joins_targets: True if all targets together reach the sparsity; False if each of them reaches it.
    """

    looks_at_pruned: ClassVar[bool] = False
    joins_targets: ClassVar[bool] = True

    def __call__(
        self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits | None = None
    ) -> list[Tensor]:
        """Choose the units to keep.

        Args:
            scores: Unit scores of each target.
            layouts: The layout of each target's parameter, in the same order.
            sparsity: The share of the units to remove, in [0, 1].
            limits: The fewest kept units of a target, the rounding of kept counts, and the return of pruned units.

        Returns:
            For each target a bool tensor of the units' shape, True = keep.

        Raises:
            ValueError: The sparsity is out of range, or a score is NaN or infinite.
        """
        limits = limits or Limits()
        check_fraction("sparsity", sparsity)
        if limits.make_up and limits.round_to is not None and self.joins_targets:
            sparsity = self._made_up(scores, layouts, sparsity, limits)
        return round_kept(scores, self.select(scores, layouts, sparsity, limits), limits)

    def _made_up(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> float:
        """Find the highest sparsity that still removes no more units than asked for, once kept counts are rounded up.

        For two targets of 10 units at sparsity 0.5, with counts rounded up to a multiple of 4: to remove 10 units, 5 of each
        are kept; rounded these are 8 of each, so that only 4 are removed. To remove 11, 4 and 5 are kept, rounded 4 and 8, so
        that 8 are removed. To remove 12, 4 of each are kept and 12 removed, more than the 10 asked for. The result is 11 / 20.
        """
        count = sum(s.count for s in scores)
        asked, low, high = round(sparsity * count), round(sparsity * count), count
        while low + 1 < high:
            middle = (low + high) // 2
            with warnings.catch_warnings(action="ignore"):  # of trials; the choice itself warns
                keeps = round_kept(scores, self.select(scores, layouts, middle / count, limits), limits)
            gone = count - sum(count_true(keep) for keep in keeps)
            low, high = (middle, high) if gone <= asked else (low, middle)
        return max(sparsity, low / max(1, count)) if low > asked else sparsity

    def total(self, counts: Mapping[str, int], sparsity: float) -> int:
        """Return the number of units to remove of all targets together, before kept counts are rounded."""
        return round(sparsity * sum(counts.values()))

    @abstractmethod
    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        """Choose the units to keep, before kept counts are rounded; the arguments have been checked."""

    def asked(self, counts: Mapping[str, int], sparsity: float) -> tuple[int, ...]:
        """Return the numbers of units asked for; while these are equal, the masks need not move.

        For targets of 10 and 20 units at sparsity 0.5: `(15, 5, 10)`, of all together and of each.

        Args:
            counts: Target name -> number of its units.
            sparsity: The share of the units to remove, in [0, 1].
        """
        return (round(sparsity * sum(counts.values())), *(round(sparsity * n) for n in counts.values()))

    def check(self, sparsity: float) -> None:
        """Refuse a sparsity that the context can never reach.

        Raises:
            ValueError: The sparsity is out of reach.
        """

    def fits(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return the reason for which a target with units of this shape cannot take part; None if it can."""
        return None


@dataclass(frozen=True)
class Local(Context):
    """Choice in each target by itself: `round(s * n)` of its n units are removed."""

    joins_targets: ClassVar[bool] = False

    def total(self, counts: Mapping[str, int], sparsity: float) -> int:
        return sum(round(sparsity * n) for n in counts.values())

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        return [keep_highest([s], round(sparsity * s.count), limits)[0] for s in scores]


@dataclass(frozen=True)
class Global(Context):
    """Choice among all units of all targets together."""

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        return keep_highest(scores, round(sparsity * sum(s.count for s in scores)), limits)


@dataclass(frozen=True, repr=False)
class PerTarget(Brief, Context):
    """Choice in each target by itself, with a sparsity of its own.

    The sparsity of the call scales them: 0.5 at the call and 0.8 for a target prune 0.4 of it.

    Attributes:
        sparsities: Target name -> sparsity in [0, 1]; a target without one is unchanged.
    """

    joins_targets: ClassVar[bool] = False
    sparsities: Mapping[str, float] = field(default_factory=dict)

    def total(self, counts: Mapping[str, int], sparsity: float) -> int:
        return sum(self.asked(counts, sparsity))

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        keeps = []
        for s in scores:
            if s.name in self.sparsities:
                keeps += keep_highest([s], round(sparsity * self.sparsities[s.name] * s.count), limits)
            else:
                keeps.append(_as_it_is(s))
        return keeps

    def asked(self, counts: Mapping[str, int], sparsity: float) -> tuple[int, ...]:
        return tuple(round(sparsity * self.sparsities.get(name, 0.0) * n) for name, n in counts.items())


def _as_it_is(s: Scores) -> Tensor:
    return torch.ones(s.shape, dtype=torch.bool, device=s.device) if s.keep is None else s.keep.clone()


@dataclass(frozen=True)
class ERK(Context):
    """Erdős-Rényi-Kernel: a layer's density follows (n_in + n_out + kernel sizes) / (their product).

    All layers together keep exactly the asked number of units. A layer whose density would pass 1 stays dense, and the others
    keep fewer for it (Evci et al. 2020, RigL, arXiv 1911.11134). Kept counts grow and shrink together, so that no unit comes
    back while the sparsity rises.
    """

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        counts = [s.count for s in scores]
        kept = sum(counts) - round(sparsity * sum(counts))
        floors = [min(limits.min_keep, n) for n in counts]
        if kept < sum(floors):
            warn_of_min_keep(sum(counts) - kept, sum(counts), sum(counts) - sum(floors), limits)
        shares = [_erdos_renyi(layout) * n for layout, n in zip(layouts, counts, strict=True)]
        kept_counts = apportion(kept, shares, floors, counts)
        return [keep_highest([s], s.count - k, limits)[0] for s, k in zip(scores, kept_counts, strict=True)]


def _erdos_renyi(layout: Layout) -> float:
    """Divide the sum of the axes' sizes by their product; a grouped convolution's inputs are those that one filter reads."""
    sizes = [layout.size("out")]
    sizes += [n for n, names in zip(layout.shape, layout.axes, strict=True) if "out" not in names]
    product = 1
    for n in sizes:
        product *= n
    return sum(sizes) / max(1, product)


def apportion(total: int, shares: Sequence[float], floors: Sequence[int], ceilings: Sequence[int]) -> list[int]:
    """Divide a whole number in proportion to shares, each part between a floor and a ceiling (method of Sainte-Laguë).

    The parts are whole numbers that add up to `total`. If `total` grows by one, no part shrinks; rounding by largest
    remainders does not promise that.

    In proportion 1 to 3 the parts of 10 would be 2.5 and 7.5. With at most 6 for the second, the first takes the rest:

    >>> apportion(10, [1.0, 3.0], [0, 0], [10, 6])
    [4, 6]
    >>> apportion(10, [1.0, 3.0], [0, 0], [10, 10])
    [3, 7]
    """
    total = min(max(total, sum(floors)), sum(ceilings))
    low, high = 0.0, 1.0
    parts = _at_scale(high, shares, floors, ceilings)
    while sum(parts) < total:
        low, high = high, 2 * high
        parts = _at_scale(high, shares, floors, ceilings)
    while sum(parts) != total and low < (middle := (low + high) / 2) < high:
        parts = _at_scale(middle, shares, floors, ceilings)
        low, high = (middle, high) if sum(parts) < total else (low, middle)
    # What is left stands at one scale, up to rounding: give it out in turn, the first by position first.
    parts = _at_scale(low, shares, floors, ceilings)
    queue = [((parts[i] + 0.5) / shares[i], i) for i in range(len(parts)) if parts[i] < ceilings[i]]
    heapq.heapify(queue)
    for _ in range(total - sum(parts)):
        _, i = heapq.heappop(queue)
        parts[i] += 1
        if parts[i] < ceilings[i]:
            heapq.heappush(queue, ((parts[i] + 0.5) / shares[i], i))
    return parts


def _at_scale(scale: float, shares: Sequence[float], floors: Sequence[int], ceilings: Sequence[int]) -> list[int]:
    rounded = [int(min(scale * share, top) + 0.5) for share, top in zip(shares, ceilings, strict=True)]
    return [min(max(part, low), top) for part, low, top in zip(rounded, floors, ceilings, strict=True)]


@dataclass(frozen=True)
class LAMP(Context):
    """Choice among all units by layer-adaptive score: `s_u^2 / sum of s_v^2 over all v of the target that score at least s_u`.

    For scores 1, 2, 3 of a target: 1/14, 4/13 and 9/9. Lee et al. 2021 (arXiv 2010.07611), equation 2, where the scores are
    magnitudes. Here the formula is applied to the scores of any criterion. If some are negative, a target's scores are first
    shifted to start at zero; that step is not in the paper.
    """

    looks_at_pruned: ClassVar[bool] = True

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        prune = round(sparsity * sum(s.count for s in scores))
        ranked = [found for s in scores if (found := sorted_lamp(s)) is not None]
        if len(ranked) == len(scores):
            gone = [s.count - count_true(keep) for s, keep in zip(scores, keep_highest(ranked, prune, limits), strict=True)]
            more = [n - s.pruned for n, s in zip(gone, scores, strict=True)]
            if min(more, default=0) >= 0 or max(more) <= 0:
                with warnings.catch_warnings(action="ignore"):  # of ties in one target: the choice over all has warned
                    return [keep_highest([s], n, limits)[0] for s, n in zip(scores, gone, strict=True)]
        adapted = [TensorScores(s.name, lamp_scores(s.tensor()), s.keep) for s in scores]
        return keep_highest(adapted, prune, limits)


@dataclass(frozen=True)
class NM(Context):
    """N:M sparsity: of every M neighbouring inputs at least N are kept; at sparsity 1 - N/M exactly N are.

    Groups of M run along the input axis, for each output and kernel position, as the hardware reads them (Zhou et al. 2021,
    arXiv 2102.04010). The N highest of each group are never removed. At a sparsity below 1 - N/M the lowest of all others are
    removed, target by target.

    Attributes:
        n: The number of kept weights in a group.
        m: The number of weights in a group.
    """

    looks_at_pruned: ClassVar[bool] = True
    joins_targets: ClassVar[bool] = False
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m)
        if self.n > self.m:
            raise ValueError(f"n must be at most m, got n={self.n}, m={self.m}")

    def check(self, sparsity: float) -> None:
        if sparsity > 1 - self.n / self.m:
            raise ValueError(f"sparsity must be at most {1 - self.n / self.m:g} for {self.n}:{self.m}, got {sparsity!r}")

    def fits(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        if shape != layout.shape:
            return f"{self.n}:{self.m} needs granularity 'weight'"
        length = layout.shape[_input_dim(layout)]
        if length % self.m:
            return f"its {length} inputs are not a multiple of {self.m}"
        return None

    def select(self, scores: Sequence[Scores], layouts: Sequence[Layout], sparsity: float, limits: Limits) -> list[Tensor]:
        self.check(sparsity)
        keeps = []
        for s, layout in zip(scores, layouts, strict=True):
            reason = self.fits(s.shape, layout)
            if reason:
                raise ValueError(f"{s.name} cannot be {self.n}:{self.m} sparse: {reason}")
            winners = self._winners(s, _input_dim(layout), limits.nested)
            values = torch.where(winners, s.tensor().double().abs().max() + 1 + s.tensor().abs(), s.tensor())
            keeps += keep_highest([TensorScores(s.name, values, s.keep)], round(sparsity * s.count), limits)
        return keeps

    def _winners(self, s: Scores, dim: int, nested: bool) -> Tensor:
        """Return a mask of the N highest of every group; among equal scores the last win.

        If nested, a weight that is pruned already cannot win against one that is kept.
        """
        values = s.tensor() if s.keep is None or not nested else s.tensor().masked_fill(~s.keep, -torch.inf)
        groups = values.movedim(dim, -1)
        groups = groups.reshape(*groups.shape[:-1], -1, self.m)
        order = torch.sort(groups, dim=-1, stable=True).indices[..., -self.n :]
        winners = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        return winners.flatten(-2).movedim(-1, dim)


def _input_dim(layout: Layout) -> int:
    """Return the dimension of the view that runs over the inputs of one output."""
    return max(i for i, names in enumerate(layout.axes) if "in" in names)


local = Local()
global_ = Global()
erk = ERK()
lamp = LAMP()
two_four = NM(2, 4)
