"""L1. The exact choice: which units of a pool stay when a given number goes.

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
SAMPLE = 1 << 16  # the bracket then holds about 1 % of the scores
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

    @property
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
        """Whether no score is below 0, and those of pruned units are 0."""
        return False

    def marked(self, where: slice, mark: Mark, scratch: Array, check: bool = False) -> Array:
        """The scores of some units, pruned ones the lowest or kept ones the highest.

        Raises:
            ValueError: `check` is asked for and a score is NaN or infinite.
        """
        part = self.part(where, scratch)
        # A maximum is one pass over the cache and carries NaN; isfinite would write a second array.
        if check and part.size and not (math.isfinite(part.max()) and (self.nonnegative or math.isfinite(part.min()))):
            raise _not_finite(self.name)
        # Pruned weights are zero, which of non-negative scores is the lowest anyway; among equals the pruned go first.
        if self.keep is None or mark is Mark.NONE or (self.nonnegative and mark is Mark.PRUNED_FIRST):
            return part
        keep = self.keep.reshape(-1).numpy()[where]
        if mark is Mark.PRUNED_FIRST:
            return np.where(keep, part, part.dtype.type(-np.inf))
        return np.where(keep, part.dtype.type(np.inf), part)


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
        evidence: What is known of the target; its tensors contiguous, its pruned weights zero.
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

    Ties are settled by position: in the order of the pool, and of each target's units, the first go first; but among
    equals what is pruned already goes before what is not, and while the number rises no pruned unit comes back. While it
    falls, no kept unit goes.

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
    if prune == pruned and pruned and all(s.keep is not None for s in pool):
        return [s.keep.clone() for s in pool if s.keep is not None]
    mark = Mark.NONE if not pruned else Mark.PRUNED_FIRST if prune >= pruned else Mark.KEPT_LAST
    if any(s.device.type != "cpu" for s in pool):
        return _select_on_device(pool, prune, mark, floors)
    return _select_with_floors(pool, prune, mark, floors)


def warn_of_min_keep(asked: int, count: int, most: int, limits: Limits) -> None:
    """Say that fewer units go than were asked for."""
    warn(
        f"{asked} of {count} units were to go, {most} do: min_keep={limits.min_keep} of each target stay; pass min_keep=0 to "
        "let whole targets go",
    )


def round_kept(scores: Sequence[Scores], keeps: Sequence[Tensor], limits: Limits) -> list[Tensor]:
    """The decisions with the kept count of each target rounded up to a multiple of `limits.round_to`, as far as it goes."""
    if limits.round_to is None:
        return list(keeps)
    result = []
    for s, keep in zip(scores, keeps, strict=True):
        kept = count_true(keep)
        rounded = min(s.count, -(-kept // limits.round_to) * limits.round_to)
        result.append(keep if rounded == kept else keep_highest([s], s.count - rounded, limits)[0])
    return result


def _select_with_floors(pool: Sequence[Scores], prune: int, mark: Mark, floors: Sequence[int]) -> list[Tensor]:
    """Select; where a target is left with too little, settle it alone and let the others make up for it."""
    keeps = _select(pool, prune, mark)
    short = {i for i, (keep, floor) in enumerate(zip(keeps, floors, strict=True)) if floor and count_true(keep) < floor}
    if not short:
        return keeps
    if len(pool) > 1:
        names = ", ".join(pool[i].name for i in sorted(short)[:5])
        warn(f"but for min_keep no unit of {names} would stay; a normalizer makes the scores of targets comparable")
    for i in short:
        keeps[i] = _select([pool[i]], pool[i].count - floors[i], mark)[0]
    rest = [i for i in range(len(pool)) if i not in short]
    left = prune - sum(pool[i].count - floors[i] for i in short)
    others = _select_with_floors([pool[i] for i in rest], left, mark, [floors[i] for i in rest])
    for i, keep in zip(rest, others, strict=True):
        keeps[i] = keep
    return keeps


Place = tuple[int, int]  # which target of the pool, and where in its flat order a part starts


def _parts(pool: Sequence[Scores], mark: Mark, step: int = 1, check: bool = False) -> Iterator[tuple[Place, Array]]:
    """All marked scores of a pool, part by part; or only every `step`-th."""
    scratch = np.empty(PIECE, np.float32)
    for i, s in enumerate(pool):
        for start in range(0, s.count, PIECE * step):
            yield (i, start), s.marked(slice(start, min(s.count, start + PIECE * step), step), mark, scratch, check)


def _select(pool: Sequence[Scores], prune: int, mark: Mark) -> list[Tensor]:
    if prune == 0:
        return [torch.ones(s.shape, dtype=torch.bool) for s in pool]
    if prune == sum(s.count for s in pool):
        return [torch.zeros(s.shape, dtype=torch.bool) for s in pool]
    threshold, at_threshold = _kth_lowest(pool, prune, mark)
    # One array for all: a large one comes in large pages, which costs a third of many small ones.
    ends = list(itertools.accumulate(s.count for s in pool))
    flags = np.split(np.empty(ends[-1], dtype=np.bool_), ends[:-1])
    for (i, start), part in _parts(pool, mark):
        np.greater(part, threshold, out=flags[i][start : start + part.size])
    surplus = int(sum(f.size - np.count_nonzero(f) for f in flags)) - prune
    if surplus:
        _give_back_ties_(flags, pool, mark, threshold, at_threshold, surplus)
    return [torch.from_numpy(f).view(s.shape) for f, s in zip(flags, pool, strict=True)]


def _kth_lowest(pool: Sequence[Scores], k: int, mark: Mark) -> tuple[float, list[Place]]:
    """The k-th lowest marked score of the pool, k from 1, and the parts in which it occurs."""
    n = sum(s.count for s in pool)
    low, high = _bracket(pool, k / n, mark) if n > 2 * SAMPLE else (-np.inf, np.inf)
    flags = np.empty((2, PIECE), dtype=np.bool_)
    while True:
        # Open below, so that the mass of pruned units, which all score the lowest, does not lie inside.
        below, inside, places = 0, [], []
        for place, part in _parts(pool, mark, check=True):
            within, under = flags[:, : part.size]
            np.less_equal(part, high, out=within)
            np.less_equal(part, low, out=under)
            below += int(np.count_nonzero(under))
            np.not_equal(within, under, out=within)
            inside.append(np.compress(within, part))
            places.append(place)
        rank = k - below - 1
        candidates = np.concatenate(inside)
        if 0 <= rank < candidates.size:
            threshold = np.partition(candidates, rank)[rank]
            return threshold, [p for p, found in zip(places, inside, strict=True) if (found == threshold).any()]
        if rank < 0 and sum(np.count_nonzero(part < low) for _, part in _parts(pool, mark)) < k:
            return low, places
        low, high = (-np.inf, low) if rank < 0 else (high, np.inf)  # the sample misled: look on that side


def _bracket(pool: Sequence[Scores], share: float, mark: Mark) -> tuple[float, float]:
    """Two scores between which, by a sample, the given share of the pool almost surely ends."""
    step = max(1, sum(s.count for s in pool) // SAMPLE)
    sample = np.concatenate([part.copy() for _, part in _parts(pool, mark, step)])
    margin = 3 * math.sqrt(sample.size * share * (1 - share)) + 2
    ranks = np.clip([share * sample.size - margin, share * sample.size + margin], 0, sample.size - 1).astype(int)
    low, high = np.partition(sample, ranks)[ranks]
    return low if ranks[0] > 0 else -np.inf, high if ranks[1] < sample.size - 1 else np.inf


def _give_back_ties_(
    flags: list[Array], pool: Sequence[Scores], mark: Mark, threshold: float, at_threshold: list[Place], surplus: int
) -> None:
    """Keep the last `surplus` of the units that score exactly the threshold, those pruned already only for want of others."""
    scratch = np.empty(PIECE, np.float32)
    ties: list[tuple[int, Array, Array]] = []
    for i, start in at_threshold:
        s = pool[i]
        where = start + np.flatnonzero(s.marked(slice(start, start + PIECE), mark, scratch) == threshold)
        fresh = np.ones(where.size, bool) if s.keep is None else s.keep.reshape(-1).numpy()[where]
        ties.append((i, where, fresh))
    if sum(where.size for _, where, _ in ties) == sum(s.count for s in pool) and mark is Mark.NONE:
        warn(
            f"all scores of {', '.join(s.name for s in pool[:3])}{', ...' if len(pool) > 3 else ''} are equal: "
            "which units go was settled by their position",
        )
    for wanted in (True, False):  # first those that are not pruned yet
        for i, where, fresh in reversed(ties):
            chosen = where[fresh == wanted][::-1][:surplus]
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
            flat.masked_fill_(s.keep.reshape(-1), torch.inf)
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
