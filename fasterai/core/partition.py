"""The exact choice on a CPU: the k lowest of a pool go, in one pass over its scores.

A sample gives two scores, the bracket, between which the k-th lowest almost surely lies. One pass over the scores, in pieces
that fit into the cache, writes the decision `score > low` of every unit, and notes the few units inside the bracket: only
these are partitioned, and the decisions of those that go are taken back. No copy of the scores is made.

By hand: 12 units, the k = 5 lowest go.

    place      0    1    2    3    4    5    6    7    8    9   10   11
    score     .9   .2   .5   .4   .8   .1   .4   .7   .4   .6   .3   .5

    bracket   (.3, .5), from a sample
    > .3       x         x    x    x         x    x    x    x         x    9 units, so that 12 - 9 = 3 are at most .3
    < .5                      x              x         x                   of these: .4 .4 .4; only they are partitioned
    rank      5 - 3 = 2: the second lowest inside is the threshold, .4; no score inside is below it, so the first 2 ties go
    kept       x         x         x              x    x    x         x    places 0 2 4 7 8 9 11

A bracket that misses decides about the time alone. With (.4, .6) 6 units are above .4 and 6 at most .4, so the fifth lowest is
not inside. 3 units are below .4 and 3 at it: 3 < 5 <= 6, so the threshold is .4 itself, and 5 - 3 = 2 ties go. Were it not,
a wider bracket would follow, and at last all scores. Scores that many units share, zeros say, come to an end in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fasterai.core.checks import warn
from fasterai.core.scores import PIECE, Array, Mark, Scores, not_finite

__all__ = ["drop_lowest_"]

SMALL = 1 << 13  # of fewer scores all are partitioned, which takes about 1 ns each
MARGINS = (4.0, 16.0)  # of the bracket, in deviations of the rank in a sample: the first misses once in 16,000 choices


@dataclass(frozen=True)
class Found:
    """The units of a pool that can go, as a bracket divides them.

    Attributes:
        above: How many score more than its lower end, target by target.
        places: Those strictly inside: where they are in the pool's flat order, rising.
        scores: Their scores.
    """

    above: list[int]
    places: Array
    scores: Array


def drop_lowest_(flags: Array, pool: Sequence[Scores], k: int, count: int, mark: Mark) -> list[int]:
    """Decide on each unit of a pool: of the `count` units that can go the `k` lowest do, of equals the first by position.

    Args:
        flags: The decisions are written here, True = keep: bool, one per unit, target after target.
        pool: The scores.
        k: From 1 to `count`.
        count: The number of units that can go.
        mark: What the masks so far mean; what cannot go while the number rises is pruned already, and stays so.

    Returns:
        How many units of each target are kept.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    for low, high in _brackets(pool, k, count, mark):
        score = low
        if low < high:
            found = _look(flags, pool, low, high, mark)
            rank = k - (count - sum(found.above)) - 1
            if 0 <= rank < found.scores.size:
                return _take_inside_(flags, pool, found, rank, mark)
            score = low if rank < 0 else high
        if kept := _take_at_(flags, pool, score, k, mark):
            return kept
    raise not_finite(pool[0].name)


def _brackets(pool: Sequence[Scores], k: int, count: int, mark: Mark) -> Iterator[tuple[float, float]]:
    """Yield pairs of scores, each wider than the last, between which the k-th lowest almost surely lies."""
    if count > SMALL:
        sample = _sample(pool, mark)
        share = k / count
        for margin in MARGINS if sample.size > 1 else ():
            spread = margin * math.sqrt(sample.size * share * (1 - share)) + 2
            first, last = math.floor(share * sample.size - spread), math.ceil(share * sample.size + spread)
            low = sample[first] if first > 0 else -np.inf
            yield low, sample[last] if last < sample.size - 1 else np.inf
    yield -np.inf, np.inf


def _sample(pool: Sequence[Scores], mark: Mark) -> Array:
    """Return the scores of evenly spread units that can go, in rising order.

    Of n scores n^(2/3): the bracket then holds about as many.
    """
    count = sum(s.count for s in pool)
    step = max(1, round(count ** (1 / 3)))
    while math.gcd(step, 210) > 1:  # weights repeat by kernel size and by channels: a step of 9 would see one corner only
        step -= 1
    parts = [part.copy() if can_go is None else part[can_go] for _, part, can_go in _parts(pool, mark, step)]
    sample: Array = np.concatenate(parts)
    sample.sort()
    return sample


def _parts(
    pool: Sequence[Scores], mark: Mark, step: int = 1, check: bool = False
) -> Iterator[tuple[slice, Array, Array | None]]:
    """Yield (place in the pool's flat order, scores, which can go) part by part; or only of every `step`-th unit."""
    scratch = np.empty(min(PIECE, max((s.count for s in pool), default=0)), np.float32)
    first = 0
    for s in pool:
        for start in range(0, s.count, PIECE * step):
            end = min(s.count, start + PIECE * step)
            yield (slice(first + start, first + end), *s.marked(slice(start, end, step), mark, scratch, check))
        first += s.count


def _look(flags: Array, pool: Sequence[Scores], low: float, high: float, mark: Mark) -> Found:
    """Decide by `score > low`, and find the units strictly inside a bracket."""
    within = np.empty(PIECE, np.bool_)
    ends = list(itertools.accumulate(s.count for s in pool))
    above, target, places, scores = [0] * len(pool), 0, [], []
    for where, part, can_go in _parts(pool, mark, check=True):
        while where.start >= ends[target]:
            target += 1
        flag, inside = flags[where], within[: part.size]
        np.greater(part, low, out=flag)
        if can_go is not None:
            np.logical_and(flag, can_go, out=flag)
        above[target] += int(np.count_nonzero(flag))
        np.less(part, high, out=inside)
        np.logical_and(inside, flag, out=inside)
        found = np.flatnonzero(inside)
        places.append(found + where.start)
        scores.append(part[found])
    return Found(above, np.concatenate(places), np.concatenate(scores))


def _take_inside_(flags: Array, pool: Sequence[Scores], found: Found, rank: int, mark: Mark) -> list[int]:
    """Take back the decisions of the `rank` + 1 lowest inside a bracket, and count what is kept."""
    threshold = np.partition(found.scores, rank)[rank]
    below = found.places[found.scores < threshold]
    ties = found.places[found.scores == threshold]
    _warn_if_all_tie(pool, ties.size, mark)
    kept = np.array(found.above)
    for gone in (below, ties[: rank + 1 - below.size]):
        flags[gone] = False
        ends = np.searchsorted(gone, list(itertools.accumulate(s.count for s in pool)))
        kept -= np.diff(ends, prepend=0)
    return [int(n) for n in kept]


def _take_at_(flags: Array, pool: Sequence[Scores], score: float, k: int, mark: Mark) -> list[int]:
    """Decide by a score that many units share, if the k-th lowest is one of them; else return nothing."""
    below = ties = 0
    for _, part, can_go in _parts(pool, mark, check=True):
        under, equal = part < score, part == score
        below += int(np.count_nonzero(under if can_go is None else under & can_go))
        ties += int(np.count_nonzero(equal if can_go is None else equal & can_go))
    if not below < k <= below + ties:
        return []
    _warn_if_all_tie(pool, ties, mark)
    left = k - below  # of the ties that go
    for where, part, can_go in _parts(pool, mark):
        flag = flags[where]
        np.greater_equal(part, score, out=flag)
        if can_go is not None:
            np.logical_and(flag, can_go, out=flag)
        if left:
            gone = np.flatnonzero(flag & (part == score))[:left]
            flag[gone] = False
            left -= gone.size
    return [int(np.count_nonzero(part)) for part in np.split(flags, list(itertools.accumulate(s.count for s in pool))[:-1])]


def _warn_if_all_tie(pool: Sequence[Scores], ties: int, mark: Mark) -> None:
    if mark is Mark.NONE and ties == sum(s.count for s in pool):
        warn(
            f"all scores of {', '.join(s.name for s in pool[:3])}{', ...' if len(pool) > 3 else ''} are equal: "
            "which units go was settled by their position",
        )
