"""The exact choice: which units of a pool stay when a given number goes.

One function, `keep_highest`, behind which everything that makes it fast is hidden. On a CPU it reads the scores in pieces
that fit into the cache, brackets the threshold from a sample, counts what lies below and partitions only what lies
inside: no copy of the pooled scores is made. On other devices it uses torch's own selection.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import warn
from fasterai.core.types import Evidence, Limits

if TYPE_CHECKING:
    from fasterai.core.criteria import Criterion

__all__ = ["EvidenceScores", "Scores", "TensorScores", "keep_highest", "round_kept", "warn_of_min_keep"]

PIECE = 1 << 18  # 1 MiB of float32: two of them live in a second-level cache
SAMPLE = 1 << 15  # the bracket then holds about 1.5 % of the scores
Array = np.ndarray[Any, np.dtype[Any]]


class Mark(Enum):
    """What the masks so far mean for the next choice."""

    NONE = 0
    PRUNED_FIRST = 1  # rising: what is pruned stays pruned
    KEPT_LAST = 2  # falling: what is kept stays kept


class Scores(ABC):
    """The unit scores of one target.

    Attributes:
        name: The target's name.
        shape: The shape of the units.
        keep: The decision so far, bool of that shape; None before the first.
    """

    name: str
    shape: tuple[int, ...]
    keep: Tensor | None

    @property
    def count(self) -> int:
        """How many units there are."""
        return math.prod(self.shape)

    @cached_property
    def pruned(self) -> int:
        """How many units are pruned so far."""
        return 0 if self.keep is None else self.count - count_true(self.keep)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the scores are."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """All scores, of shape `shape`."""

    @abstractmethod
    def part(self, where: slice, scratch: Array) -> Array:
        """The scores of some units in their flat order; perhaps in `scratch`, so valid until the next part."""

    @property
    def nonnegative(self) -> bool:
        """Whether no score is below 0."""
        return False

    def marked(self, where: slice, mark: Mark, scratch: Array, check: bool = False) -> tuple[Array, Array | None]:
        """The scores of some units, and which of them can go: those that are kept so far, while the number rises.

        While it falls, kept units score infinity, and all can go.

        Raises:
            ValueError: `check` is asked for and a score is NaN or infinite.
        """
        part = self.part(where, scratch)
        # A maximum is one pass over the cache and carries NaN; isfinite would write a second array.
        if check and part.size and not (math.isfinite(part.max()) and (self.nonnegative or math.isfinite(part.min()))):
            raise _not_finite(self.name)
        if self.keep is None or mark is Mark.NONE:
            return part, None
        keep = self.keep.reshape(-1).numpy()[where]
        return (part, keep) if mark is Mark.PRUNED_FIRST else (np.where(keep, part.dtype.type(np.inf), part), None)


def count_true(mask: Tensor) -> int:
    """How many entries of a bool tensor are True."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _not_finite(name: str) -> ValueError:
    return ValueError(f"scores must be finite, got NaN or infinity for {name}; look for NaN or infinite weights there")


@dataclass(frozen=True)
class TensorScores(Scores):
    """Scores held in a tensor."""

    name: str
    values: Tensor
    keep: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensor(self) -> Tensor:
        return self.values

    def part(self, where: slice, scratch: Array) -> Array:
        part: Array = self.values.reshape(-1).numpy()[where]
        return part


@dataclass(frozen=True)
class EvidenceScores(Scores):
    """Scores of single weights, worked out part by part and held nowhere; for elementwise criteria on a CPU.

    Attributes:
        evidence: What is known of the target; its tensors contiguous.
        criterion: An elementwise criterion without normaliser.
    """

    name: str
    evidence: Evidence
    criterion: Criterion
    keep: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.evidence.weight.shape)

    @property
    def device(self) -> torch.device:
        return self.evidence.weight.device

    def tensor(self) -> Tensor:
        return self.criterion(self.evidence)

    @property
    def nonnegative(self) -> bool:
        return self.criterion.nonnegative

    def part(self, where: slice, scratch: Array) -> Array:
        weight, ufunc = self.evidence.weight, self.criterion.ufunc
        part: Array
        if ufunc is not None and weight.dtype is torch.float32:
            weights = weight.view(-1).numpy()[where]
            part = ufunc(weights, out=scratch[: weights.size])
        else:
            part = self.criterion(self.evidence.map(lambda x: x.view(-1)[where])).numpy()
        return part


def keep_highest(pool: Sequence[Scores], prune: int, limits: Limits) -> list[Tensor]:
    """Which units stay when the `prune` lowest of a pool go.

    Ties are settled by position: in the order of the pool, and of each target's units, the first go first. While the number
    rises no pruned unit comes back, whatever it scores; while it falls, no kept unit goes; unless `limits.nested` is False.

    Args:
        pool: The scores of the targets that compete.
        prune: How many units of the pool go. Fewer go, with a warning, if `limits.min_keep` would be broken.
        limits: How many stay in each target, and whether the number may fall below what is pruned already.

    Returns:
        For each target a new bool tensor of the units' shape, True = keep.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    floors = [min(limits.min_keep, s.count) for s in pool]
    most = sum(s.count - floor for s, floor in zip(pool, floors, strict=True))
    if prune > most:
        warn_of_min_keep(prune, sum(s.count for s in pool), most, limits)
        prune = most
    pruned = sum(s.pruned for s in pool)
    if not limits.may_fall:
        prune = max(prune, pruned)
    if limits.nested and prune == pruned and pruned and all(s.keep is not None for s in pool):
        return [s.keep.clone() for s in pool if s.keep is not None]
    mark = Mark.NONE if not pruned or not limits.nested else Mark.PRUNED_FIRST if prune >= pruned else Mark.KEPT_LAST
    if any(s.device.type != "cpu" for s in pool):
        return _select_on_device(pool, prune, mark, floors)
    return _select_with_floors(pool, prune, mark, floors)


def warn_of_min_keep(asked: int, count: int, most: int, limits: Limits) -> None:
    """Say that fewer units go than were asked for."""
    warn(
        f"{asked} of {count} units were to go, {most} do: min_keep={limits.min_keep} of each target stay; a Sparsifier with "
        "min_keep=0 lets whole targets go",
    )


def round_kept(scores: Sequence[Scores], keeps: Sequence[Tensor], limits: Limits) -> list[Tensor]:
    """The decisions with the kept count of each target rounded up to a multiple of `limits.round_to`, as far as it goes."""
    if limits.round_to is None:
        return list(keeps)
    result = []
    for s, keep in zip(scores, keeps, strict=True):
        step = limits.round_to if isinstance(limits.round_to, int) else limits.round_to.get(s.name, 1)
        kept = count_true(keep)
        rounded = min(s.count, -(-kept // step) * step)
        result.append(keep if rounded == kept else keep_highest([s], s.count - rounded, limits)[0])
    return result


def _select_with_floors(pool: Sequence[Scores], prune: int, mark: Mark, floors: Sequence[int]) -> list[Tensor]:
    """Select; where a target is left with too little, settle it alone and let the others make up for it."""
    keeps, kept = _select(pool, prune, mark)
    short = {i for i, (count, floor) in enumerate(zip(kept, floors, strict=True)) if count < floor}
    if not short:
        return keeps
    if len(pool) > 1:
        names = ", ".join(pool[i].name for i in sorted(short)[:5])
        warn(f"but for min_keep no unit of {names} would stay; a normalizer makes the scores of targets comparable")
    for i in short:
        keeps[i] = _at_floor(pool[i], floors[i], mark)
    rest = [i for i in range(len(pool)) if i not in short]
    left = prune - sum(pool[i].count - floors[i] for i in short)
    others = _select_with_floors([pool[i] for i in rest], left, mark, [floors[i] for i in rest])
    for i, keep in zip(rest, others, strict=True):
        keeps[i] = keep
    return keeps


def _at_floor(s: Scores, floor: int, mark: Mark) -> Tensor:
    """The decisions of one target of which just so many units stay; earlier masks may have left fewer."""
    if s.keep is None or mark is not Mark.PRUNED_FIRST or s.count - s.pruned >= floor:
        (keep,), _ = _select([s], s.count - floor, mark)
        return keep
    keep = s.keep.flatten().clone()
    missing = floor - (s.count - s.pruned)
    keep[(~keep).nonzero().flatten()[-missing:]] = True
    return keep.view(s.shape)


Place = tuple[int, int]  # which target of the pool, and where in its flat order a part starts


def _parts(
    pool: Sequence[Scores], mark: Mark, step: int = 1, check: bool = False
) -> Iterator[tuple[Place, Array, Array | None]]:
    """(place, scores, which can go) of a pool, part by part; or only of every `step`-th unit."""
    scratch = np.empty(PIECE, np.float32)
    for i, s in enumerate(pool):
        for start in range(0, s.count, PIECE * step):
            where = slice(start, min(s.count, start + PIECE * step), step)
            yield ((i, start), *s.marked(where, mark, scratch, check))


def _select(pool: Sequence[Scores], prune: int, mark: Mark) -> tuple[list[Tensor], list[int]]:
    """The decisions, and how many units of each target stay."""
    gone = sum(s.pruned for s in pool) if mark is Mark.PRUNED_FIRST else 0
    if prune <= gone:
        keeps = [torch.ones(s.shape, dtype=torch.bool) if s.keep is None or not gone else s.keep.clone() for s in pool]
        return keeps, [s.count - (s.pruned if gone else 0) for s in pool]
    count = sum(s.count for s in pool)
    if prune == count:
        return [torch.zeros(s.shape, dtype=torch.bool) for s in pool], [0] * len(pool)
    threshold, at_threshold = _kth_lowest(pool, prune - gone, count - gone, mark)
    # One array for all: a large one comes in large pages, which costs a third of many small ones.
    ends = list(itertools.accumulate(s.count for s in pool))
    flags = np.split(np.empty(ends[-1], dtype=np.bool_), ends[:-1])
    for (i, start), part, can_go in _parts(pool, mark):
        flag = flags[i][start : start + part.size]
        np.greater(part, threshold, out=flag)
        if can_go is not None:
            np.logical_and(flag, can_go, out=flag)
    kept = [int(np.count_nonzero(f)) for f in flags]
    surplus = count - sum(kept) - prune
    if surplus:
        _give_back_ties_(flags, pool, mark, threshold, at_threshold, surplus)
        kept = [int(np.count_nonzero(f)) for f in flags]
    return [torch.from_numpy(f).view(s.shape) for f, s in zip(flags, pool, strict=True)], kept


def _kth_lowest(pool: Sequence[Scores], k: int, count: int, mark: Mark) -> tuple[float, list[Place]]:
    """The k-th lowest score, k from 1, of the `count` units that can go, and the parts in which it occurs."""
    low, high = _bracket(pool, k / count, mark) if count > 2 * SAMPLE else (-np.inf, np.inf)
    flags = np.empty((2, PIECE), dtype=np.bool_)
    while True:
        above, inside, places = 0, [], []
        for place, part, can_go in _parts(pool, mark, check=True):
            over, within = flags[:, : part.size]
            np.greater(part, low, out=over)
            if can_go is not None:
                np.logical_and(over, can_go, out=over)
            above += int(np.count_nonzero(over))
            np.less_equal(part, high, out=within)
            np.logical_and(within, over, out=within)
            inside.append(np.compress(within, part))
            places.append(place)
        rank = k - (count - above) - 1
        candidates = np.concatenate(inside)
        if 0 <= rank < candidates.size:
            threshold = np.partition(candidates, rank)[rank]
            return threshold, [p for p, found in zip(places, inside, strict=True) if (found == threshold).any()]
        if rank < 0 and _count_below(pool, mark, low) < k:
            return low, places
        low, high = (-np.inf, low) if rank < 0 else (high, np.inf)  # the sample misled: look on that side


def _count_below(pool: Sequence[Scores], mark: Mark, score: float) -> int:
    """How many of the units that can go score less."""
    parts = ((part < score, can_go) for _, part, can_go in _parts(pool, mark))
    return sum(int(np.count_nonzero(under if can_go is None else under & can_go)) for under, can_go in parts)


def _bracket(pool: Sequence[Scores], share: float, mark: Mark) -> tuple[float, float]:
    """Two scores between which, by a sample, the given share of the units that can go almost surely ends."""
    step = max(1, sum(s.count for s in pool) // SAMPLE)
    parts = [part.copy() if can_go is None else part[can_go] for _, part, can_go in _parts(pool, mark, step)]
    sample = np.concatenate(parts)
    if sample.size < 2:
        return -np.inf, np.inf
    margin = 3 * math.sqrt(sample.size * share * (1 - share)) + 2
    ranks = np.clip([share * sample.size - margin, share * sample.size + margin], 0, sample.size - 1).astype(int)
    low, high = np.partition(sample, ranks)[ranks]
    return low if ranks[0] > 0 else -np.inf, high if ranks[1] < sample.size - 1 else np.inf


def _give_back_ties_(
    flags: list[Array], pool: Sequence[Scores], mark: Mark, threshold: float, at_threshold: list[Place], surplus: int
) -> None:
    """Keep the last `surplus` of the units that score exactly the threshold and could have gone."""
    scratch = np.empty(PIECE, np.float32)
    ties: list[tuple[int, Array]] = []
    for i, start in at_threshold:
        part, can_go = pool[i].marked(slice(start, start + PIECE), mark, scratch)
        equal = part == threshold
        ties.append((i, start + np.flatnonzero(equal if can_go is None else equal & can_go)))
    if sum(where.size for _, where in ties) == sum(s.count for s in pool) and mark is Mark.NONE:
        warn(
            f"all scores of {', '.join(s.name for s in pool[:3])}{', ...' if len(pool) > 3 else ''} are equal: "
            "which units go was settled by their position",
        )
    for i, where in reversed(ties):
        chosen = where[::-1][:surplus]
        flags[i][chosen] = True
        surplus -= chosen.size


def _select_on_device(pool: Sequence[Scores], prune: int, mark: Mark, floors: Sequence[int]) -> list[Tensor]:
    """The same choice with torch's operations; one synchronisation, for the check of the scores."""
    flats = [(s.tensor().flatten().clone(), s, floor) for s, floor in zip(pool, floors, strict=True)]
    if not bool(torch.stack([torch.isfinite(flat).all() for flat, _, _ in flats]).all()):
        raise _not_finite(next(s.name for flat, s, _ in flats if not torch.isfinite(flat).all()))
    for flat, s, floor in flats:
        if s.keep is not None and mark is Mark.PRUNED_FIRST:
            flat.masked_fill_(~s.keep.reshape(-1), -torch.inf)
        elif s.keep is not None and mark is Mark.KEPT_LAST:
            flat.masked_fill_(s.keep.reshape(-1), torch.finfo(flat.dtype).max)  # below what a floor protects
        if floor:
            flat[_last_to_go(flat, floor)] = torch.inf
    scores = torch.cat([flat for flat, _, _ in flats])
    keep = torch.ones_like(scores, dtype=torch.bool)
    if prune:
        threshold = scores.kthvalue(prune).values
        ties = scores == threshold
        spare = prune - (scores < threshold).sum()
        keep = (scores > threshold) | (ties & (ties.cumsum(0) > spare))
    parts = torch.split(keep, [s.count for s in pool])
    return [part.view(s.shape).clone() for part, s in zip(parts, pool, strict=True)]


def _last_to_go(flat: Tensor, count: int) -> Tensor:
    """Where the `count` units are that would go last: the highest scores, the last by position among equals."""
    order = torch.sort(flat, stable=True).indices
    return order[-count:]
