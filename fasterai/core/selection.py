"""The exact choice of the units of a pool to keep, for a given number to remove.

One function, `keep_highest`, makes every choice. The number is exact, position decides among equal scores, and each target may
have a floor: a number of units that are kept at least. On a CPU `core/partition.py` finds the lowest scores in one pass; on
other devices torch's own selection does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import warn
from fasterai.core.partition import drop_lowest_
from fasterai.core.scores import EvidenceScores, Mark, Scores, TensorScores, count_true, not_finite
from fasterai.core.types import Limits

__all__ = [
    "EvidenceScores",
    "Mark",
    "Scores",
    "TensorScores",
    "count_true",
    "keep_highest",
    "round_kept",
    "warn_of_min_keep",
]

CHUNK = 1 << 22  # of ties that are counted at once, in 8 bytes each


def keep_highest(pool: Sequence[Scores], prune: int, limits: Limits) -> list[Tensor]:
    """Keep the highest units of a pool: choose its `prune` lowest for removal, and keep all others.

    Among equal scores the first are removed first, in the order of the pool and of each target's units. Unless `limits.nested`
    is False, pruned units stay pruned, whatever they score, while the number rises, and kept units stay kept while it falls.

    Args:
        pool: The scores of the targets that compete.
        prune: The number of units to remove. If `limits.min_keep` does not allow it, fewer are removed, with a warning.
        limits: The fewest kept units of a target, and whether fewer units may be pruned than are already.

    Returns:
        For each target a new bool tensor of the units' shape, True = keep.

    Raises:
        ValueError: A score is NaN or infinite.

    Two targets that compete; three units are to be removed, and at least one of each target is kept. The three lowest are 1, 2
    and 3, but then the first target would keep none. So its highest, 3, is kept, and the next lowest, 4, is removed instead:

    >>> import warnings
    >>> pool = [TensorScores("a", torch.tensor([1.0, 3.0, 2.0])), TensorScores("b", torch.tensor([4.0, 9.0]))]
    >>> with warnings.catch_warnings(action="ignore"):
    ...     [keep.tolist() for keep in keep_highest(pool, 3, Limits(min_keep=1))]
    [[False, True, False], [False, True]]
    """
    floors = [min(limits.min_keep, s.count) for s in pool]
    most = sum(s.count - floor for s, floor in zip(pool, floors, strict=True))
    if prune > most:
        warn_of_min_keep(prune, sum(s.count for s in pool), most, limits)
        prune = most
    pruned = sum(s.pruned for s in pool)
    if not limits.may_fall:
        prune = max(prune, min(pruned, most))  # masks below the floors return to them
    if limits.nested and prune == pruned and pruned and all(s.keep is not None for s in pool):
        return [s.keep.clone() for s in pool if s.keep is not None]
    mark = Mark.NONE if not pruned or not limits.nested else Mark.PRUNED_FIRST if prune >= pruned else Mark.KEPT_LAST
    if any(s.device.type != "cpu" for s in pool):
        return _select_on_device(pool, prune, mark, floors)
    return _select_with_floors(pool, prune, mark, floors)


def warn_of_min_keep(asked: int, count: int, most: int, limits: Limits) -> None:
    """Warn that `most` units are pruned in place of the `asked`, since each target keeps some."""
    warn(
        f"asked to prune {asked} of {count} units, pruned {most}: min_keep={limits.min_keep} of each target are kept; a "
        "Sparsifier with min_keep=0 prunes whole targets",
    )


def round_kept(scores: Sequence[Scores], keeps: Sequence[Tensor], limits: Limits) -> list[Tensor]:
    """Round the kept count of each target up to a multiple of `limits.round_to`, and at most to all of its units.

    With `round_to=4` a target of 10 units that keeps 5 keeps 8 instead, and one that keeps 9 keeps all 10.
    """
    if limits.round_to is None:
        return list(keeps)
    result = []
    for s, keep in zip(scores, keeps, strict=True):
        step = limits.round_to if isinstance(limits.round_to, int) else limits.round_to.get(s.name, 1)
        kept = count_true(keep)
        rounded = min(s.count, -(-kept // step) * step)
        result.append(keep if rounded == kept else keep_highest([s], s.count - rounded, limits)[0])
    return result


def _select_with_floors(
    pool: Sequence[Scores], prune: int, mark: Mark, floors: Sequence[int], saved: tuple[str, ...] = ()
) -> list[Tensor]:
    """Select; a target left below its floor keeps exactly its floor, and more are removed from the others in its place.

    `saved` are those to which that has happened already, for the warning, which is one for all of them.
    """
    keeps, kept = _select(pool, prune, mark)
    short = {i for i, (count, floor) in enumerate(zip(kept, floors, strict=True)) if count < floor}
    if not short:
        _warn_of_floors(saved)
        return keeps
    if len(pool) > 1 or saved:
        saved = (*saved, *(pool[i].name for i in sorted(short)))
    for i in short:
        keeps[i] = _at_floor(pool[i], floors[i], mark)
    rest = [i for i in range(len(pool)) if i not in short]
    left = prune - sum(pool[i].count - floors[i] for i in short)
    others = _select_with_floors([pool[i] for i in rest], left, mark, [floors[i] for i in rest], saved)
    for i, keep in zip(rest, others, strict=True):
        keeps[i] = keep
    return keeps


def _warn_of_floors(saved: Sequence[str]) -> None:
    if saved:
        names = ", ".join(saved[:5])
        warn(
            f"only min_keep keeps units of {names}, which score lowest of all targets; a normalizer makes them comparable: "
            "criteria=large_final.using(normalizer='mean'), say"
        )


def _at_floor(s: Scores, floor: int, mark: Mark) -> Tensor:
    """Keep exactly `floor` units of one target; if earlier masks have kept fewer, the last pruned ones return."""
    if s.keep is None or mark is not Mark.PRUNED_FIRST or s.count - s.pruned >= floor:
        (keep,), _ = _select([s], s.count - floor, mark)
        return keep
    keep = s.keep.flatten().clone()
    missing = floor - (s.count - s.pruned)
    keep[(~keep).nonzero().flatten()[-missing:]] = True
    return keep.view(s.shape)


def _select(pool: Sequence[Scores], prune: int, mark: Mark) -> tuple[list[Tensor], list[int]]:
    """Return the decisions, and the number of kept units of each target."""
    gone = sum(s.pruned for s in pool) if mark is Mark.PRUNED_FIRST else 0
    if prune <= gone:
        keeps = [torch.ones(s.shape, dtype=torch.bool) if s.keep is None or not gone else s.keep.clone() for s in pool]
        return keeps, [s.count - (s.pruned if gone else 0) for s in pool]
    count = sum(s.count for s in pool)
    if prune == count:
        return [torch.zeros(s.shape, dtype=torch.bool) for s in pool], [0] * len(pool)
    # One array for all: a large one comes in large pages, which costs a third of many small ones.
    flags = np.empty(count, dtype=np.bool_)
    kept = drop_lowest_(flags, pool, prune - gone, count - gone, mark)
    parts = np.split(flags, list(itertools.accumulate(s.count for s in pool))[:-1])
    return [torch.from_numpy(f).view(s.shape) for f, s in zip(parts, pool, strict=True)], kept


def _select_on_device(pool: Sequence[Scores], prune: int, mark: Mark, floors: Sequence[int]) -> list[Tensor]:
    """Make the same choice with torch's operations, with one copy of the scores and one synchronisation (for the check)."""
    sizes = [s.count for s in pool]
    scores = torch.cat([s.tensor().flatten() for s in pool])
    # The extremes carry NaN; isfinite would make an array of magnitudes.
    if len(scores) and not bool(torch.isfinite(torch.stack(scores.aminmax())).all()):
        raise not_finite(next(s.name for s in pool if not torch.isfinite(s.tensor()).all()))
    for flat, s, floor in zip(torch.split(scores, sizes), pool, floors, strict=True):
        if s.keep is not None and mark is Mark.PRUNED_FIRST:
            flat.masked_fill_(~s.keep.reshape(-1), -torch.inf)
        elif s.keep is not None and mark is Mark.KEPT_LAST:
            flat.masked_fill_(s.keep.reshape(-1), torch.finfo(flat.dtype).max)  # below what a floor protects
        if floor:
            flat.masked_fill_(_highest(flat, floor), torch.inf)
    keep = _highest(scores, len(scores) - prune)
    return [part.view(s.shape).clone() for part, s in zip(torch.split(keep, sizes), pool, strict=True)]


def _highest(flat: Tensor, count: int) -> Tensor:
    """Return flags of the `count` highest, among equals the last by position; `flat` is not changed."""
    if not 0 < count < len(flat):
        return torch.full_like(flat, count > 0, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    ties = flat == threshold
    found = flat > threshold
    spare = ties.sum() - (count - found.sum())  # of the ties that are removed
    for part in torch.split(ties, CHUNK):
        counts = part.cumsum(0)
        part &= counts > spare
        spare = spare - counts[-1]
    return found.logical_or_(ties)
