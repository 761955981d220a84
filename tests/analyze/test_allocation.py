from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.analyze.allocation import allocate

STEEP, FLAT = [(0.5, 3.0)], [(0.5, 1.0)]  # drops of 6 and of 2 per unit share


@pytest.mark.parametrize(
    ("curves", "units", "sparsity", "counts"),
    [
        # s/2 + s/6 of 100 each is 50 at a drop of 0.75: 37.5 and 12.5
        ([FLAT, STEEP], [100, 100], 0.25, [38, 12]),
        # the same shares of unequal targets: 3/8 and 1/8 of 200 and 8
        ([FLAT, STEEP], [200, 8], 76 / 208, [75, 1]),
        # costs nothing up to one half: in equal parts
        ([[(0.5, 0.0)], [(0.5, 0.0)]], [100, 20], 0.25, [25, 5]),
        # a gain is taken as no drop
        ([[(0.5, -2.0)], [(0.5, 0.0)]], [100, 20], 0.25, [25, 5]),
        # free for the first, so all of it comes from there
        ([[(0.5, 0.0)], [(0.5, 1.0)]], [100, 100], 0.25, [50, 0]),
        # beyond what was measured in equal parts of the rest: 0.5 + 0.5 * 0.5
        ([FLAT, STEEP], [100, 100], 0.75, [75, 75]),
        # a plateau lets 40 go at a drop of 1, where the other has 25: of the 80 asked for it gives 55
        ([[(0.5, 1.0), (0.9, 1.0)], [(0.5, 2.0)]], [100, 100], 0.4, [55, 25]),
        # a drop that comes and goes counts as staying: 0.5 -> 1, 0.7 -> 1, 0.9 -> 2 against a line to 2 at 0.9
        ([[(0.5, 1.0), (0.7, 0.2), (0.9, 2.0)], [(0.9, 2.0)]], [100, 100], 0.525, [60, 45]),
        # NaN is twice the worst finite drop: slopes of 4 and 2
        ([[(0.5, math.nan)], [(0.5, 1.0)]], [100, 100], 0.25, [17, 33]),
        ([[(0.5, math.inf)], [(0.5, 1.0)]], [100, 100], 0.25, [17, 33]),
        # nothing and everything; the last unit stays
        ([FLAT, STEEP], [100, 100], 0.0, [0, 0]),
        ([FLAT, STEEP], [100, 10], 1.0, [99, 9]),
        # of one unit there is nothing to keep
        ([FLAT, STEEP], [1, 1], 0.5, [1, 0]),
        ([FLAT, STEEP], [1, 1], 1.0, [1, 1]),
        # measured at 0 too
        ([[(0.0, 0.0), (0.5, 1.0)], [(0.0, 0.0), (0.5, 3.0)]], [100, 100], 0.25, [38, 12]),
        # round half to even, as the contexts do
        ([FLAT], [10], 0.25, [2]),
    ],
)
def test_targets_tolerate_the_same_drop(curves, units, sparsity, counts):
    assert allocate(curves, units, sparsity, 0.0, 1.0) == counts


def test_limits_hold():
    assert allocate([FLAT, STEEP], [100, 100], 0.25, 0.0, 0.3) == [30, 20]
    assert allocate([FLAT, STEEP], [100, 100], 0.25, 0.2, 1.0) == [30, 20]
    assert allocate([FLAT, STEEP], [3, 3], 0.5, 0.5, 0.5) == [2, 1]


@pytest.mark.parametrize(("sparsity", "least", "most"), [(0.5, 0.6, 1.0), (0.5, 0.0, 0.4), (0.5, 0.7, 0.3)])
def test_limits_without_room(sparsity, least, most):
    with pytest.raises(ValueError, match=f"sparsity must lie between least={least} and most={most}, got {sparsity}"):
        allocate([FLAT, STEEP], [100, 100], sparsity, least, most)


drops = st.floats(-1, 10) | st.sampled_from([math.nan, math.inf, 0.0, 1.0])
targets = st.lists(st.tuples(st.integers(2, 300), st.lists(drops, min_size=3, max_size=3)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(targets, st.floats(0, 1))
def test_the_total_is_met_to_the_unit(found, sparsity):
    units = [n for n, _ in found]
    curves = [list(zip((0.3, 0.6, 0.9), values, strict=True)) for _, values in found]
    counts = allocate(curves, units, sparsity, 0.0, 1.0)
    assert sum(counts) == min(round(sparsity * sum(units)), sum(units) - len(units))
    assert all(0 <= k < n for k, n in zip(counts, units, strict=True))
    assert [round(k / n * n) for k, n in zip(counts, units, strict=True)] == counts  # what a Sparsifier makes of the shares


@settings(max_examples=50, deadline=None)
@given(targets, st.floats(0, 0.9), st.floats(0, 0.1))
def test_more_in_total_takes_none_away(found, sparsity, more):
    units = [n for n, _ in found]
    curves = [list(zip((0.3, 0.6, 0.9), values, strict=True)) for _, values in found]
    less, more_counts = (allocate(curves, units, s, 0.0, 1.0) for s in (sparsity, sparsity + more))
    assert all(b >= a - 1 for a, b in zip(less, more_counts, strict=True))  # but for the rounding
