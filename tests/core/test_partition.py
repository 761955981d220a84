from __future__ import annotations

import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.core import partition
from fasterai.core.partition import drop_lowest_
from fasterai.core.scores import Mark, TensorScores

BY_HAND = np.array([0.9, 0.2, 0.5, 0.4, 0.8, 0.1, 0.4, 0.7, 0.4, 0.6, 0.3, 0.5], np.float32)
KEPT_BY_HAND = [0, 2, 4, 7, 8, 9, 11]


def oracle(values, can_go, k):
    """The contract in numpy: one sort by (cannot go, score, position); what cannot go is pruned already."""
    order = np.lexsort((np.arange(values.size), values, ~can_go))
    kept = can_go.copy()
    kept[order[:k]] = False
    return kept


def drop(values, k, can_go=None, sizes=None):
    sizes = sizes or [values.size]
    ends = np.cumsum(sizes)[:-1]
    keeps = [None] * len(sizes) if can_go is None else [torch.from_numpy(c) for c in np.split(can_go, ends)]
    parts = zip(np.split(values, ends), keeps, strict=True)
    pool = [TensorScores(f"t{i}", torch.from_numpy(v), keep) for i, (v, keep) in enumerate(parts)]
    flags = np.empty(values.size, bool)
    count = values.size if can_go is None else int(can_go.sum())
    with warnings.catch_warnings(action="ignore"):
        kept = drop_lowest_(flags, pool, k, count, Mark.NONE if can_go is None else Mark.PRUNED_FIRST)
    assert kept == [int(part.sum()) for part in np.split(flags, ends)]
    return flags


def brackets(monkeypatch, *pairs):
    monkeypatch.setattr(partition, "_brackets", lambda *args: iter([*pairs, (-np.inf, np.inf)]))


@pytest.mark.parametrize("pair", [(0.3, 0.5), (0.4, 0.6), (0.1, 0.4), (0.4, 0.4), (0.6, 0.8), (-np.inf, np.inf)])
def test_the_example_of_the_files_head(monkeypatch, pair):
    brackets(monkeypatch, tuple(map(np.float32, pair)))
    assert np.flatnonzero(drop(BY_HAND, 5)).tolist() == KEPT_BY_HAND


def test_the_example_is_partitioned_where_the_head_says(monkeypatch):
    brackets(monkeypatch, tuple(map(np.float32, (0.3, 0.5))))
    seen = []
    take = partition._take_inside_
    monkeypatch.setattr(partition, "_take_inside_", lambda *args: seen.append((args[2], args[3])) or take(*args))
    drop(BY_HAND, 5)
    ((found, rank),) = seen
    assert (found.above, found.places.tolist(), rank) == ([9], [3, 6, 8], 1)


few = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bracket_gives_the_same_choice(data):
    """A bracket decides about the time alone: narrow, wide, beside the threshold, of one value, in any order."""
    n = data.draw(st.integers(1, 60))
    element = data.draw(st.sampled_from([few, st.floats(-3, 3, width=32)]))
    values = np.array(data.draw(st.lists(element, min_size=n, max_size=n)), np.float32)
    can_go = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    can_go[0] = True
    k = data.draw(st.integers(1, int(can_go.sum())))
    cuts = data.draw(st.lists(st.tuples(st.sampled_from(values), st.sampled_from(values)), max_size=3))
    first = data.draw(st.integers(0, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "PIECE", 8)
        brackets(patch, *(sorted(pair) for pair in cuts))
        assert (drop(values, k, can_go, [first, n - first]) == oracle(values, can_go, k)).all()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("masked", [False, True])
def test_many_scores_are_looked_at_once_and_few_of_them_partitioned(monkeypatch, share, masked):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400_000).astype(np.float32)
    can_go = rng.random(values.size) < 0.6 if masked else np.ones(values.size, bool)
    k = round(share * can_go.sum())
    sizes = []
    look = partition._look
    monkeypatch.setattr(partition, "_look", lambda *args: sizes.append((found := look(*args)).scores.size) or found)
    found = drop(values, k, can_go if masked else None, [150_000, 1, 249_999])
    assert (found == oracle(values, can_go, k)).all()
    assert len(sizes) == 1
    assert sizes[0] < 0.06 * values.size


@pytest.mark.parametrize("kind", ["normal", "half zeros", "constant", "two values"])
def test_no_copy_of_the_scores_is_made(kind):
    normal = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)
    values = {
        "normal": normal,
        "half zeros": np.maximum(normal, 0),
        "constant": np.ones_like(normal),
        "two values": (normal > 0).astype(np.float32),
    }[kind]
    tracemalloc.start()
    drop(values, 900_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.7 * values.nbytes  # a quarter are the decisions; the rest is pieces and the bracket


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 7, 399_999])
@pytest.mark.parametrize("fill", ["normal", "constant"])
def test_what_is_not_finite_is_found_wherever_it_is(bad, where, fill):
    values = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    values = values if fill == "normal" else np.ones_like(values)
    values[where] = bad
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity for t1"):
        drop(np.concatenate([np.ones(5, np.float32), values]), 100_000, sizes=[5, values.size])


def test_the_sample_sees_every_place_of_a_kernel(monkeypatch):
    """A step that is a multiple of 9 would see the first corners of the kernels alone."""
    steps = []
    parts = partition._parts

    def noted(pool, mark, step=1, check=False):
        steps.append(step)
        return parts(pool, mark, step, check)

    monkeypatch.setattr(partition, "_parts", noted)
    for count in (27**3, 45**3, 70**3):
        steps.clear()
        drop(np.random.default_rng(0).standard_normal(count).astype(np.float32), count // 2)
        assert steps[0] > 1
        assert math.gcd(steps[0], 2 * 3 * 5 * 7) == 1
