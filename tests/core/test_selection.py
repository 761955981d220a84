from __future__ import annotations

import math
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasterai.core import criteria, partition, selection
from fasterai.core.selection import EvidenceScores, Mark, TensorScores, count_true, keep_highest, round_kept
from fasterai.core.types import Evidence, Limits


@pytest.fixture
def small_parts(monkeypatch):
    """Parts and samples so small that pools of a few units take every way that large ones take."""
    monkeypatch.setattr(partition, "PIECE", 8)
    monkeypatch.setattr(partition, "SMALL", 4)


def oracle(values, keeps, prune, min_keep=1, may_fall=True):
    """The contract in numpy: one sort of everything by (kept so far, score, position)."""
    keeps = [np.ones(v.size, bool) if k is None else k.ravel() for v, k in zip(values, keeps, strict=True)]
    pruned = sum(int((~k).sum()) for k in keeps)
    prune = prune if may_fall else max(prune, pruned)
    orders = [np.lexsort((np.arange(v.size), v.ravel(), k)) for v, k in zip(values, keeps, strict=True)]
    safe = [set(order[order.size - min(min_keep, order.size) :].tolist()) for order in orders]
    score = np.concatenate([v.ravel() for v in values])
    kept = np.concatenate(keeps)
    held = np.concatenate([np.isin(np.arange(v.size), list(s)) for v, s in zip(values, safe, strict=True)])
    order = np.lexsort((np.arange(score.size), score, kept, held))
    prune = min(prune, int((~held).sum()))
    result = np.ones(score.size, bool)
    result[order[:prune]] = False
    ends = np.cumsum([v.size for v in values])[:-1]
    return [part.reshape(v.shape) for part, v in zip(np.split(result, ends), values, strict=True)]


def choose(values, keeps, prune, **limits):
    pool = [
        TensorScores(f"t{i}", torch.from_numpy(v), None if k is None else torch.from_numpy(k))
        for i, (v, k) in enumerate(zip(values, keeps, strict=True))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [keep.numpy() for keep in keep_highest(pool, prune, Limits(**limits))]


def assert_same(found, wanted):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == bool and a.shape == b.shape
        assert (a == b).all(), f"target {i} differs at {np.argwhere(a != b)[:5].tolist()}"


# --- by hand ---


@pytest.mark.parametrize(
    ("scores", "prune", "keep"),
    [
        ([3, 1, 2, 4], 0, [1, 1, 1, 1]),
        ([3, 1, 2, 4], 2, [1, 0, 0, 1]),
        ([-3, -1, -2, -4], 2, [0, 1, 1, 0]),
        ([1, 2, 1, 1], 2, [0, 1, 0, 1]),  # ties: the first go first
        ([2, 2, 2, 1], 3, [0, 0, 1, 0]),
        ([0, 0, 0, 5], 1, [0, 1, 1, 1]),
    ],
)
def test_one_target_by_hand(scores, prune, keep):
    found = keep_highest([TensorScores("a", torch.tensor(scores, dtype=torch.float32))], prune, Limits())
    assert found[0].int().tolist() == keep


def test_a_pool_by_hand_keeps_shapes_and_settles_ties_in_its_order():
    pool = [TensorScores("a", torch.tensor([[1.0, 5.0], [1.0, 7.0]])), TensorScores("b", torch.tensor([1.0, 9.0, 1.0]))]
    a, b = keep_highest(pool, 3, Limits())
    assert a.tolist() == [[False, True], [False, True]]
    assert b.tolist() == [False, True, True]


def test_min_keep_by_hand_and_the_others_make_up_for_it():
    pool = [TensorScores("low", torch.tensor([1.0, 2.0, 3.0])), TensorScores("high", torch.tensor([10.0, 20.0, 30.0]))]
    low, high = keep_highest(pool, 3, Limits(min_keep=1))
    assert low.tolist() == [False, False, True]
    assert high.tolist() == [False, True, True]
    low, high = keep_highest(pool, 3, Limits(min_keep=0))
    assert low.tolist() == [False, False, False]
    assert high.tolist() == [True, True, True]


def test_more_than_min_keep_allows_warns_and_does_what_it_can():
    pool = [TensorScores("a", torch.tensor([1.0, 2.0])), TensorScores("b", torch.tensor([4.0, 3.0]))]
    with pytest.warns(
        UserWarning, match="asked to prune 4 of 4 units, pruned 2: min_keep=1 of each target are kept; a Sparsifier"
    ):
        a, b = keep_highest(pool, 4, Limits())
    assert (a.tolist(), b.tolist()) == ([False, True], [True, False])


def test_equal_scores_warn_with_the_names():
    with pytest.warns(UserWarning, match="all scores of conv1.weight are equal"):
        keep = keep_highest([TensorScores("conv1.weight", torch.ones(4))], 2, Limits())[0]
    assert keep.tolist() == [False, False, True, True]


def test_what_is_pruned_stays_pruned_while_the_number_rises():
    scores = TensorScores("a", torch.tensor([9.0, 1.0, 2.0, 8.0]), torch.tensor([False, True, True, True]))
    assert keep_highest([scores], 2, Limits())[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize(("min_keep", "low"), [(2, [0, 0, 1, 1]), (3, [0, 1, 1, 1])])
def test_the_last_of_the_pruned_come_back_where_more_are_to_stay_than_are_left(min_keep, low):
    """Earlier masks left one of four: what comes back is settled by position, as all pruned units rank alike."""
    pool = [
        TensorScores("low", torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([False, False, False, True])),
        TensorScores("high", torch.arange(10.0, 18.0)),
    ]
    with pytest.warns(UserWarning, match="only min_keep keeps units of low"):
        found = keep_highest(pool, 5, Limits(min_keep=min_keep))
    gone = 5 - low.count(0)
    assert [keep.int().tolist() for keep in found] == [low, [0] * gone + [1] * (8 - gone)]
    others = selection._select_on_device(pool, 5, Mark.PRUNED_FIRST, [min_keep] * 2)
    assert all(map(torch.equal, found, others))


def test_the_best_of_the_pruned_come_back_while_it_falls():
    scores = TensorScores("a", torch.tensor([9.0, 1.0, 2.0, 0.0]), torch.tensor([False, False, False, True]))
    assert keep_highest([scores], 1, Limits())[0].tolist() == [True, False, True, True]
    assert keep_highest([scores], 1, Limits(may_fall=False))[0].tolist() == [False, False, False, True]
    assert keep_highest([scores], 0, Limits())[0].tolist() == [True, True, True, True]


def test_the_same_number_again_gives_the_same_masks_in_new_tensors():
    keep = torch.tensor([False, True, True])
    found = keep_highest([TensorScores("a", torch.tensor([3.0, 2.0, 1.0]), keep)], 1, Limits())[0]
    assert found.tolist() == keep.tolist()
    assert found.data_ptr() != keep.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [4, 3 * partition.SMALL])
def test_scores_that_are_not_finite_name_their_target(bad, size):
    values = torch.rand(size)
    values[2] = bad
    pool = [TensorScores("fine", torch.rand(4)), TensorScores("layer4.conv2.weight", values)]
    for select in (lambda: keep_highest(pool, 3, Limits()), lambda: selection._select_on_device(pool, 3, Mark.NONE, [1, 1])):
        with pytest.raises(ValueError, match=r"scores must be finite, got NaN or infinity for layer4\.conv2\.weight"):
            select()


def test_empty_targets_and_pools():
    assert keep_highest([], 0, Limits()) == []
    empty, full = keep_highest([TensorScores("e", torch.ones(0)), TensorScores("f", torch.tensor([2.0, 1.0]))], 1, Limits())
    assert empty.shape == (0,)
    assert full.tolist() == [True, False]


def test_one_unit_stays():
    with pytest.warns(UserWarning, match="asked to prune 1 of 1 units, pruned 0"):
        assert keep_highest([TensorScores("a", torch.tensor([1.0]))], 1, Limits())[0].tolist() == [True]
    assert keep_highest([TensorScores("a", torch.tensor([1.0]))], 1, Limits(min_keep=0))[0].tolist() == [False]


# --- against the oracle ---

few_values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 3.0])
some_values = st.one_of(few_values, st.floats(-10, 10, width=32))


@st.composite
def pools(draw, masked):
    shapes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    element = draw(st.sampled_from([few_values, some_values, st.just(1.0)]))
    values = [np.array(draw(st.lists(element, min_size=n, max_size=n)), np.float32) for n in shapes]
    keeps = [np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) if masked else None for n in shapes]
    return values, keeps


@pytest.mark.usefixtures("small_parts")
class TestAgainstTheOracle:
    @settings(max_examples=150, deadline=None)
    @given(pools(masked=False), st.data())
    def test_first_choice(self, pool, data):
        values, keeps = pool
        prune = data.draw(st.integers(0, sum(v.size for v in values)))
        min_keep = data.draw(st.integers(0, 3))
        assert_same(choose(values, keeps, prune, min_keep=min_keep), oracle(values, keeps, prune, min_keep))

    @settings(max_examples=150, deadline=None)
    @given(pools(masked=True), st.data())
    def test_later_choice_rising_or_falling(self, pool, data):
        values, keeps = pool
        prune = data.draw(st.integers(0, sum(v.size for v in values)))
        may_fall = data.draw(st.booleans())
        found = choose(values, keeps, prune, min_keep=0, may_fall=may_fall)
        assert_same(found, oracle(values, keeps, prune, 0, may_fall))
        pruned = sum(int((~k).sum()) for k in keeps)
        if not may_fall or prune >= pruned:
            assert all(not (new & ~old).any() for new, old in zip(found, keeps, strict=True))
        else:
            assert all(not (old & ~new).any() for new, old in zip(found, keeps, strict=True))

    @settings(max_examples=100, deadline=None)
    @given(pools(masked=False), st.data())
    def test_a_rising_run_prunes_exactly_and_brings_nothing_back(self, pool, data):
        values, keeps = pool
        total = sum(v.size for v in values)
        most = total - sum(min(2, v.size) for v in values)
        for prune in sorted(data.draw(st.lists(st.integers(0, total), max_size=4))):
            found = choose(values, keeps, prune, min_keep=2, may_fall=False)
            assert sum(int((~k).sum()) for k in found) == min(prune, most)
            assert all(k.sum() >= min(2, k.size) for k in found)
            assert_same(found, oracle(values, keeps, min(prune, most), 2, False))
            keeps = found
            values = [v[::-1].copy() for v in values]  # training has moved the scores

    @settings(max_examples=100, deadline=None)
    @given(st.booleans().flatmap(lambda masked: pools(masked=masked)), st.data())
    def test_the_way_of_other_devices(self, pool, data):
        values, keeps = pool
        prune = data.draw(st.integers(0, sum(v.size for v in values)))
        min_keep = data.draw(st.integers(0, 2))
        held = [
            TensorScores(f"t{i}", torch.from_numpy(v), None if k is None else torch.from_numpy(k))
            for i, (v, k) in enumerate(zip(values, keeps, strict=True))
        ]
        pruned = sum(s.pruned for s in held)
        floors = [min(min_keep, s.count) for s in held]
        prune = min(prune, sum(s.count for s in held) - sum(floors))
        mark = Mark.NONE if not pruned else Mark.PRUNED_FIRST if prune >= pruned else Mark.KEPT_LAST
        before = [v.copy() for v in values]
        found = [k.numpy() for k in selection._select_on_device(held, prune, mark, floors)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(found, [k.numpy() for k in selection._select_with_floors(held, prune, mark, floors)])
        if min_keep == 0 or mark is Mark.NONE:
            assert_same(found, oracle(values, keeps, prune, min_keep))
        assert all((a == b).all() for a, b in zip(before, values, strict=True))


STEP = 43  # of the sample of so many scores: the greatest below their cube root, 44, that is prime to 2, 3, 5 and 7


def large(kind):
    """Many scores, so that the threshold is bracketed first."""
    rng = np.random.default_rng(0)
    n = 85_537
    normal = rng.standard_normal(n).astype(np.float32)
    alternating = np.where(np.arange(n) % STEP == 0, normal, 1000 + normal).astype(np.float32)
    return {
        "normal": normal,
        "constant": np.full(n, 0.25, np.float32),
        "half zeros": np.where(normal > 0, normal, 0).astype(np.float32),
        "heavy ties": np.round(normal * 2).astype(np.float32),
        "two values": (normal > 0.3).astype(np.float32),
        "sorted": np.sort(normal),
        "falling": np.sort(normal)[::-1].copy(),
        "seen only low": alternating,  # the sample sees the lowest scores alone
        "double": rng.standard_normal(n),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["normal", "constant", "half zeros", "heavy ties", "two values", "sorted", "falling", "seen only low", "double"]
)
@pytest.mark.parametrize("share", [0.00001, 0.5, 0.9])
def test_large_pools_against_the_oracle(kind, share):
    values = large(kind)
    split = [values[:70_000].reshape(70, 1000), values[70_000:70_001], values[70_001:]]
    prune = round(share * values.size)
    first = choose(split, [None] * 3, prune)
    assert_same(first, oracle(split, [None] * 3, prune))
    moved = [v[::-1].copy() for v in split]
    for later in (round(0.7 * prune), prune + (values.size - prune) // 3):
        assert_same(choose(moved, first, later), oracle(moved, first, later))


@pytest.mark.parametrize("kind", ["normal", "half zeros", "heavy ties", "constant"])
@pytest.mark.parametrize("chunk", [1000, 1 << 22])
def test_the_way_of_other_devices_with_large_pools(kind, chunk, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", chunk)
    values = torch.from_numpy(large(kind))
    pool = [TensorScores("a", values[:50_000]), TensorScores("b", values[50_000:])]
    prune = values.numel() // 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = selection._select_with_floors(pool, prune, Mark.NONE, [1, 1])
    found = selection._select_on_device(pool, prune, Mark.NONE, [1, 1])
    assert all(map(torch.equal, found, wanted))


class Live(TorchDispatchMode):
    """Follows how many bytes of tensors that operations made are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                size = x.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self.free, size)
        return result

    def free(self, size):
        self.now -= size


@pytest.mark.parametrize("mark", [Mark.NONE, Mark.PRUNED_FIRST, Mark.KEPT_LAST])
def test_other_devices_hold_twice_the_scores_at_most(mark, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 1000)
    values = torch.from_numpy(large("normal"))
    keep = values > -0.5
    pool = [TensorScores(f"t{i}", v, k) for i, (v, k) in enumerate(zip(values.split(30_000), keep.split(30_000), strict=True))]
    prune = values.numel() // (10 if mark is Mark.KEPT_LAST else 2)
    with Live() as live:
        selection._select_on_device(pool, prune, mark, [1] * len(pool))
    assert values.nbytes < live.peak <= 2 * values.nbytes


# --- scores that are worked out part by part ---

ELEMENTWISE = [name for name in criteria.__all__ if getattr(criteria, name).elementwise]


def evidence_pool(name, dtype, keeps=None, sizes=((7, 9), (5,), (4, 3, 2, 2))):
    criterion = getattr(criteria, name)
    generator = torch.Generator().manual_seed(3)
    pool = []
    for i, shape in enumerate(sizes):
        tensors = {
            key: torch.randn(shape, generator=generator).mul(2).round().to(dtype)
            for key in ("weight", *sorted(criterion.needs))
        }
        keep = None if keeps is None else keeps[i]
        if keep is not None:
            tensors["weight"] = tensors["weight"] * keep
        pool.append(EvidenceScores(f"t{i}", Evidence(f"t{i}", **tensors), criterion, keep))
    return pool


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_by_part_choose_as_scores_held_in_a_tensor(name, dtype):
    keeps = None
    for prune in (20, 41, 70, 35):  # rising, then falling
        by_part = evidence_pool(name, dtype, keeps)
        held = [TensorScores(s.name, s.tensor(), s.keep) for s in by_part]
        assert [(s.shape, s.count, s.pruned, s.device) for s in by_part] == [
            (s.shape, s.count, s.pruned, s.device) for s in held
        ]
        found = keep_highest(by_part, prune, Limits())
        assert all(map(torch.equal, found, keep_highest(held, prune, Limits())))
        assert sum(int((~k).sum()) for k in found) == prune
        keeps = found


@pytest.mark.parametrize("name", ["large_final", "squared_final", "movement"])
def test_scores_by_part_of_large_targets(name):
    sizes = ((300, 1000), (17,))
    by_part = evidence_pool(name, torch.float32, sizes=sizes)
    held = [TensorScores(s.name, s.tensor()) for s in by_part]
    first = keep_highest(by_part, 250_000, Limits())
    assert all(map(torch.equal, first, keep_highest(held, 250_000, Limits())))
    by_part = evidence_pool(name, torch.float32, first, sizes)
    held = [TensorScores(s.name, s.tensor(), s.keep) for s in by_part]
    for prune in (280_000, 100_000):
        assert all(map(torch.equal, keep_highest(by_part, prune, Limits()), keep_highest(held, prune, Limits())))


def test_scores_by_part_are_not_written_into_the_weight():
    pool = evidence_pool("large_final", torch.float32)
    before = [s.evidence.weight.clone() for s in pool]
    keep_highest(pool, 30, Limits())
    assert all(torch.equal(s.evidence.weight, b) for s, b in zip(pool, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["large_final", "small_final"])
def test_weights_that_are_not_finite_name_their_target(bad, name):
    pool = evidence_pool(name, torch.float32)
    pool[1].evidence.weight[2] = bad
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity for t1; look for NaN or infinite weights"):
        keep_highest(pool, 3, Limits())


def test_a_living_weight_of_zero_goes_after_the_pruned_ones():
    """All three zeros score the same; the second is the one that is pruned already."""
    weight = torch.tensor([0.0, 0.0, 0.0, 3.0])
    keep = torch.tensor([True, False, True, True])
    for kind in (
        EvidenceScores("w", Evidence("w", weight), criteria.large_final, keep),
        TensorScores("w", weight.abs(), keep),
    ):
        assert keep_highest([kind], 2, Limits())[0].tolist() == [False, False, True, True]
        assert keep_highest([kind], 3, Limits())[0].tolist() == [False, False, False, True]


# --- rounding ---


@pytest.mark.parametrize(
    ("kept", "round_to", "rounded"),
    [(3, 4, 4), (4, 4, 4), (5, 4, 8), (5, 16, 10), (1, 8, 8), (0, 8, 0), (7, None, 7), (7, 1, 7)],
)
def test_kept_counts_are_rounded_up(kept, round_to, rounded):
    scores = TensorScores("a", torch.arange(10.0).flip(0))
    keep = keep_highest([scores], 10 - kept, Limits(min_keep=0))
    found = round_kept([scores], keep, replace(Limits(), round_to=round_to))[0]
    assert found.tolist() == [True] * rounded + [False] * (10 - rounded)


def test_count_true():
    assert count_true(torch.tensor([[True, False], [True, True]])) == 3
    assert count_true(torch.zeros(0, dtype=torch.bool)) == 0


def test_masks_below_every_floor_return_to_it():
    """Four of the six units were pruned before; the floor of one of each target leaves three of them pruned."""
    pool = [TensorScores("a", torch.zeros(1)), TensorScores("b", torch.zeros(1))]
    pool.append(TensorScores("c", torch.zeros(4), torch.zeros(4, dtype=torch.bool)))
    with warnings.catch_warnings(action="ignore"):
        found = keep_highest(pool, 0, Limits(min_keep=1, may_fall=False))
    assert [keep.int().tolist() for keep in found] == [[1], [1], [0, 0, 0, 1]]


def test_the_second_target_that_min_keep_saves_is_in_the_same_warning():
    """Of 12 units 7 go: all of `low` and 3 of `middle`; in place of the one that `low` keeps, `middle` would lose its last."""
    pool = [TensorScores(name, torch.arange(4.0) + 10 * i) for i, name in enumerate(("low", "middle", "high"))]
    with pytest.warns(UserWarning, match="only min_keep keeps units of low, middle, which") as told:
        found = keep_highest(pool, 7, Limits(min_keep=1))
    assert [int(keep.sum()) for keep in found] == [1, 1, 3]
    (text,) = [str(one.message) for one in told]
    assert text.endswith("a normalizer makes them comparable: criteria=large_final.using(normalizer='mean'), say")
