"""Allocation of a sparsity to targets, from curves of the drop that pruning each one costs: pure functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["allocate"]

Curve = Sequence[tuple[float, float]]
HALVINGS = 200


def allocate(curves: Sequence[Curve], units: Sequence[int], sparsity: float, least: float, most: float) -> list[int]:
    """Return the number of units to remove from each target, so that all targets cost the same drop of the score.

    Args:
        curves: For each target (sparsity, drop) as measured, by rising sparsity.
        units: Number of units of each target.
        sparsity: The share of all units to prune, in [0, 1].
        least: The lowest share of a target.
        most: The highest share; one unit of each target stays in any case, unless it has no other.

    Raises:
        ValueError: `sparsity` does not lie between `least` and `most`.

    >>> allocate([[(0.5, 1.0)], [(0.5, 3.0)]], [100, 100], 0.25, 0.0, 1.0)  # drops of 2 and of 6 per unit share
    [38, 12]
    """
    if not least <= sparsity <= most:
        raise ValueError(f"sparsity must lie between least={least!r} and most={most!r}, got {sparsity!r}")
    ceilings = [min(math.ceil(most * n - 1e-9), _most(n)) for n in units]
    floors = [min(math.floor(least * n + 1e-9), high) for n, high in zip(units, ceilings, strict=True)]
    total = min(round(sparsity * sum(units)), sum(ceilings))
    shares = _tolerances(curves)

    def counts(level: float) -> list[float]:
        wanted = [n * share for n, share in zip(units, shares(level), strict=True)]
        return [min(max(k, low), high) for k, low, high in zip(wanted, floors, ceilings, strict=True)]

    return _to_whole(_at_total(counts, total), total, ceilings)


def _most(n: int) -> int:
    return n - 1 if n > 1 else n


def _tolerances(curves: Sequence[Curve]) -> Callable[[float], list[float]]:
    """Return a function: level in [0, 3] -> the share of each target that may be removed; it never falls.

    From 0 to 1 the shares rise to what costs nothing, from 1 to 2 the tolerated drop rises to the largest one measured, from
    2 to 3 what lies beyond the last measured sparsity follows.
    """
    finite = [drop for curve in curves for _, drop in curve if math.isfinite(drop)]
    # A score that is not finite is worse than all that are.
    worst = 2 * max([0.0, *finite]) or 1.0
    rising = [_rising(curve, worst) for curve in curves]
    largest = max((curve[-1][1] for curve in rising), default=0.0)

    def shares(level: float) -> list[float]:
        if level <= 1:
            return [level * _tolerated(curve, 0.0) for curve in rising]
        if level <= 2:
            return [_tolerated(curve, (level - 1) * largest) for curve in rising]
        return [curve[-1][0] + (level - 2) * (1 - curve[-1][0]) for curve in rising]

    return shares


def _rising(curve: Curve, worst: float) -> list[tuple[float, float]]:
    """Return the curve with (0, 0) as its first point and drops that never fall; drops that are not finite count as `worst`."""
    points = [(0.0, 0.0)]
    for sparsity, drop in curve:
        height = max(points[-1][1], drop if math.isfinite(drop) else worst)
        if sparsity > points[-1][0]:
            points.append((sparsity, height))
    return points


def _tolerated(curve: Sequence[tuple[float, float]], drop: float) -> float:
    """Return the highest sparsity that costs at most `drop`; between two points of the curve lies a straight line."""
    if drop >= curve[-1][1]:
        return curve[-1][0]
    after = next(i for i, (_, height) in enumerate(curve) if height > drop)
    (low, below), (high, above) = curve[after - 1], curve[after]
    return low + (high - low) * (drop - below) / (above - below)


def _at_total(counts: Callable[[float], list[float]], total: int) -> list[float]:
    """Find by halving the level at which the counts add up to `total`, and return the counts there.

    Where the sum jumps over `total`, the counts before and after the jump are mixed linearly.
    """
    low, high = 0.0, 3.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sum(counts(middle)) < total else (low, middle)
    below, above = counts(low), counts(high)
    gap = sum(above) - sum(below)
    part = min(max((total - sum(below)) / gap, 0.0), 1.0) if gap > 0 else 0.0
    return [a + part * (b - a) for a, b in zip(below, above, strict=True)]


def _to_whole(counts: Sequence[float], total: int, ceilings: Sequence[int]) -> list[int]:
    """Round counts to whole numbers that add up to `total`: the largest remainders are rounded up, of equal ones the first."""
    whole = [math.floor(k + 1e-9) for k in counts]
    order = sorted(range(len(counts)), key=lambda i: (whole[i] - counts[i], i))
    for i in order * 2:
        if sum(whole) >= total:
            break
        if whole[i] < ceilings[i]:
            whole[i] += 1
    assert sum(whole) == total
    return whole
