from __future__ import annotations

import math
import pickle
import warnings
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.core import contexts
from fasterai.core.checks import from_catalogue
from fasterai.core.contexts import (
    ERK,
    LAMP,
    NM,
    Global,
    Local,
    PerTarget,
    apportion,
    erk,
    global_,
    lamp,
    lamp_scores,
    local,
    two_four,
)
from fasterai.core.selection import TensorScores, keep_highest
from fasterai.core.types import Layout, Limits

pytestmark = pytest.mark.filterwarnings("ignore:all scores of:UserWarning", "ignore:asked to prune:UserWarning")


def layout(shape, *axes):
    return Layout(tuple(shape), tuple(frozenset(a.split("+")) for a in axes))


def matrix(out, inn):
    return layout((out, inn), "out", "in")


def pool(*values, keeps=None):
    keeps = keeps or [None] * len(values)
    return [
        TensorScores(name, torch.as_tensor(v, dtype=torch.float32), k)
        for name, v, k in zip("abcdef", values, keeps, strict=False)
    ]


def layouts(scores):
    return [matrix(1, s.count) if len(s.shape) == 1 else matrix(*s.shape) for s in scores]


def choose(context, scores, sparsity, **limits):
    return [keep.int().tolist() for keep in context(scores, layouts(scores), sparsity, Limits(**limits))]


def counts(context, scores, sparsity, **limits):
    return [int((~keep).sum()) for keep in context(scores, layouts(scores), sparsity, Limits(**limits))]


A, B = [4.0, 1.0, 3.0, 2.0], [8.0, 5.0, 6.0, 7.0]
# entry -> (scores of two targets, sparsity, what stays), by hand
CASES = {
    "local": ((A, B), 0.5, [[1, 0, 1, 0], [1, 0, 0, 1]]),
    "global_": ((A, B), 0.375, [[1, 0, 0, 0], [1, 1, 1, 1]]),
    # both of shape (1, 4): densities 5/4 each, so half of each
    "erk": ((A, B), 0.5, [[1, 0, 1, 0], [1, 0, 0, 1]]),
    # a: 16/16, 1/30, 9/25, 4/29; b: 64/64, 25/174, 36/149, 49/113: the lowest four are 1/30, 4/29, 25/174, 36/149
    "lamp": ((A, B), 0.5, [[1, 0, 1, 0], [1, 0, 0, 1]]),
    "two_four": ((A, B), 0.5, [[1, 0, 1, 0], [1, 0, 0, 1]]),
}


def test_every_entry_has_a_case():
    assert set(CASES) == set(contexts.__all__)


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    values, sparsity, keep = CASES[name]
    scores = [TensorScores(n, torch.tensor([v])) for n, v in zip("ab", values, strict=True)]
    found = getattr(contexts, name)(scores, layouts(scores), sparsity)
    assert [k.int().tolist()[0] for k in found] == keep


@pytest.mark.parametrize("name", CASES)
def test_entries_pickle_and_are_frozen(name):
    context = getattr(contexts, name)
    assert pickle.loads(pickle.dumps(context)) == context
    with pytest.raises(FrozenInstanceError):
        context.anything = 1


def test_names():
    assert from_catalogue("context", "global", contexts) is global_
    with pytest.raises(
        ValueError, match="context must be one of erk, global, lamp, local, two_four, got 'globl'; did you mean"
    ):
        from_catalogue("context", "globl", contexts)


@pytest.mark.parametrize("context", [Local(), Global(), ERK(), LAMP(), NM(2, 4), PerTarget({"a": 1.0})], ids=repr)
@pytest.mark.parametrize(
    ("sparsity", "error"), [(50, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.5", TypeError)]
)
def test_a_sparsity_out_of_range_is_refused(context, sparsity, error):
    with pytest.raises(error, match=f"sparsity must be .*got {sparsity!r}"):
        choose(context, pool([A]), sparsity)


@pytest.mark.parametrize("context", [Local(), Global(), ERK(), LAMP(), NM(2, 4), PerTarget({"b": 1.0})], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_their_target(context, bad):
    scores = [TensorScores("a", torch.tensor([A])), TensorScores("b", torch.tensor([[1.0, bad, 2.0, 3.0]]))]
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity for b"):
        context(scores, layouts(scores), 0.25)


# --- local and global ---

shapes = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@settings(deadline=None)
@given(shapes, st.floats(0, 1), st.booleans())
def test_local_takes_its_share_of_each_target_exactly(sizes, sparsity, ties):
    values = [torch.rand(n).mul(3 if ties else 1).round(decimals=0 if ties else 6) for n in sizes]
    wanted = [min(round(sparsity * n), n - 1) for n in sizes]
    assert counts(local, pool(*values), sparsity) == wanted


@settings(deadline=None)
@given(shapes, st.floats(0, 1), st.booleans())
def test_the_others_take_their_share_of_the_whole_exactly(sizes, sparsity, ties):
    values = [torch.rand(n).mul(3 if ties else 1).round(decimals=0 if ties else 6) for n in sizes]
    wanted = min(round(sparsity * sum(sizes)), sum(sizes) - len(sizes))
    for context in (global_, erk, lamp):
        assert sum(counts(context, pool(*values), sparsity)) == wanted


def test_halves_are_rounded_to_the_even_number():
    assert counts(local, pool(torch.rand(10), torch.rand(10)), 0.25) == [2, 2]  # 2.5
    assert counts(local, pool(torch.rand(10)), 0.35) == [4]  # 3.5
    assert counts(global_, pool(torch.rand(5), torch.rand(5)), 0.05) == [0, 0]  # 0.5


def test_ties_are_settled_by_position():
    assert choose(local, pool([1, 2, 1, 1], [5, 5]), 0.5) == [[0, 1, 0, 1], [0, 1]]
    assert choose(global_, pool([2, 1, 2], [2, 3]), 0.4) == [[0, 0, 1], [1, 1]]
    assert choose(global_, pool([2, 3], [2, 1, 2]), 0.6) == [[0, 1], [0, 0, 1]]


def test_global_may_empty_a_target_only_if_it_is_told_to():
    scores = pool([1, 2], [3, 4], [5, 6])
    assert choose(global_, scores, 0.5) == [[0, 1], [0, 1], [0, 1]]
    assert choose(global_, scores, 0.5, min_keep=0) == [[0, 0], [0, 1], [1, 1]]
    assert choose(global_, scores, 1 / 3, min_keep=2) == [[1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("context", [local, global_, erk, lamp])
def test_everything_at_once_leaves_min_keep_of_each(context):
    with pytest.warns(UserWarning, match="min_keep=1 of each target are kept"):
        found = context(pool([A], [B]), [matrix(1, 4)] * 2, 1.0)
    assert [k.int().tolist() for k in found] == [[[1, 0, 0, 0]], [[1, 0, 0, 0]]]


@pytest.mark.parametrize("context", [local, global_, erk, lamp])
def test_as_many_as_min_keep_lets_go_are_no_reason_to_warn(context):
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert counts(context, pool(A, A), 0.75, min_keep=1) == [3, 3]


@pytest.mark.parametrize("context", [local, global_, erk, lamp])
def test_nothing_asked_nothing_pruned(context):
    assert counts(context, pool(A, B), 0.0) == [0, 0]


@pytest.mark.parametrize(
    ("sparsity", "round_to", "pruned"),
    [
        (0.5, None, [5, 12]),  # of 10 and 24 units
        (0.5, 4, [2, 12]),  # 5 and 12 stay: 8 and 12
        (0.55, 4, [6, 12]),  # 4 and 11 stay: 4 and 12
        (0.9, 8, [2, 16]),  # 1 and 2 stay: 8 and 8
        (0.5, 100, [0, 0]),
    ],
)
def test_kept_counts_are_rounded_up_to_a_multiple(sparsity, round_to, pruned):
    assert counts(local, pool(torch.rand(10), torch.rand(24)), sparsity, round_to=round_to) == pruned


# --- a sparsity for each target ---


def test_each_target_has_its_own_share_and_others_stay():
    context = PerTarget({"a": 0.5, "c": 0.25})
    assert choose(context, pool(A, B, B), 1.0) == [[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    assert counts(context, pool(A, B, B), 0.5) == [1, 0, 0]  # 1 and 0.5 of 4, which is even
    assert counts(context, pool(torch.rand(40), torch.rand(9), torch.rand(40)), 0.5) == [10, 0, 5]


def test_a_target_without_a_share_keeps_its_mask():
    mask = torch.tensor([True, False, True, True])
    found = PerTarget({"b": 0.5})(pool(A, B, keeps=[mask, None]), [matrix(1, 4)] * 2, 1.0)
    assert found[0].tolist() == mask.tolist()
    assert found[0].data_ptr() != mask.data_ptr()


# --- how many are asked for ---


def test_asked_moves_with_the_number_of_units_that_go():
    of = {"a": 10, "b": 5}
    assert global_.asked(of, 0.28) == global_.asked(of, 0.29)
    assert global_.asked(of, 0.30) != global_.asked(of, 0.50)
    assert local.asked(of, 0.0) == (0, 0, 0)
    assert local.asked(of, 0.5) == (8, 5, 2)  # 7.5 and 2.5 to the even number
    per = PerTarget({"a": 0.5})
    assert per.asked(of, 1.0) == (5, 0)
    assert per.asked(of, 0.8) == (4, 0)


# --- erk ---


def test_erk_by_hand():
    # densities go as (4 + 4) / 16 and (8 + 8) / 64, times the counts 8 and 16: of 24 kept, 8 and 16
    scores = [TensorScores("a", torch.rand(4, 4)), TensorScores("b", torch.rand(8, 8))]
    assert counts(erk, scores, 0.7) == [16 - 8, 64 - 16]


def test_erk_with_a_saturated_layer():
    # shares 4 of 4 and 16 of 64: of 34 kept the first would have 6.8, so it stays dense and the second has 30
    scores = [TensorScores("a", torch.rand(2, 2)), TensorScores("b", torch.rand(8, 8))]
    assert counts(erk, scores, 0.5) == [0, 34]
    # of 27 kept: 27 / 20 of 4 is above 4 as well
    assert counts(erk, scores, 41 / 68) == [0, 41]
    # of 15 kept: 3 and 12
    assert counts(erk, scores, 53 / 68) == [1, 52]


@pytest.mark.parametrize(
    ("read", "units", "share"),
    [
        (layout((8, 4, 3, 3), "out", "in", "height", "width"), (8, 4, 3, 3), 8 + 4 + 3 + 3),
        (layout((8, 4, 3, 3), "out", "in", "height", "width"), (8, 1, 1, 1), 8 * 18 / 288),
        (layout((2, 4, 3, 3, 3), "out+in", "out", "in", "height", "width"), (2, 4, 3, 3, 3), 8 + 3 + 3 + 3),
        (layout((5, 4), "in", "out"), (5, 4), 9),
        (layout((5, 4, 2), "out", "in", "width"), (5, 4, 2), 11),
    ],
)
def test_erk_shares_against_a_square_matrix(read, units, share):
    """Beside a matrix of 100 x 100, whose share is 200, the kept split as the shares do."""
    scores = [TensorScores("a", torch.rand(units)), TensorScores("b", torch.rand(100, 100))]
    total = sum(s.count for s in scores)
    kept = max(2, math.floor(share + 200)) // 2
    found = erk(scores, [read, matrix(100, 100)], 1 - kept / total, Limits(min_keep=0))
    assert int(found[0].sum()) == pytest.approx(kept * share / (share + 200), abs=0.51)
    assert sum(int(k.sum()) for k in found) == kept


def test_erk_keeps_the_highest_of_each():
    scores = pool([A], [B])
    assert erk(scores, layouts(scores), 0.25)[0].int().tolist() == [[1, 0, 1, 1]]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(-5, 200),
)
def test_apportion_against_giving_out_one_by_one(rows, total):
    shares = [float(share) for share, _, _ in rows]
    ceilings = [top for _, _, top in rows]
    floors = [min(low, top) for _, low, top in rows]
    found = apportion(total, shares, floors, ceilings)
    wanted = list(floors)
    while sum(wanted) < min(total, sum(ceilings)):  # Sainte-Lague: the next goes where share / (2 n + 1) is the highest
        open_ = [i for i in range(len(rows)) if wanted[i] < ceilings[i]]
        best = max(open_, key=lambda i: (Fraction(rows[i][0], 2 * wanted[i] + 1), -i))
        wanted[best] += 1
    assert sum(found) == sum(wanted)
    # equal quotients may be served in either order
    assert all(low <= n <= top for low, n, top in zip(floors, found, ceilings, strict=True))
    assert all(abs(n - w) <= 1 for n, w in zip(found, wanted, strict=True))
    spare = [Fraction(rows[i][0], 2 * n + 1) for i, n in enumerate(found) if n < ceilings[i]]
    given_out = [Fraction(rows[i][0], 2 * n - 1) for i, n in enumerate(found) if n > floors[i]]
    assert not spare or not given_out or max(spare) <= min(given_out)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=6))
def test_one_more_in_total_never_takes_one_away(rows):
    shares = [share for share, _, _ in rows]
    ceilings = [top for _, _, top in rows]
    floors = [min(low, top) for _, low, top in rows]
    before = apportion(0, shares, floors, ceilings)
    assert before == floors
    for total in range(sum(ceilings) + 2):
        parts = apportion(total, shares, floors, ceilings)
        assert all(a <= b for a, b in zip(before, parts, strict=True))
        assert sum(parts) == min(max(total, sum(floors)), sum(ceilings))
        before = parts
    assert before == ceilings


def test_apportion_of_large_numbers():
    found = apportion(10**9, [1.0, 3.0], [0, 0], [10**9, 10**9])
    assert found == [250_000_000, 750_000_000]
    assert apportion(7, [], [], []) == []


# --- lamp ---


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([1.0, 2.0, 3.0], [1 / 14, 4 / 13, 1.0]),
        ([3.0, 1.0, 2.0], [1.0, 1 / 14, 4 / 13]),
        ([2.0, 2.0], [0.5, 0.5]),  # each counts the other
        ([1.0, 2.0, 1.0], [1 / 6, 1.0, 1 / 6]),
        ([0.0, 0.0, 5.0], [0.0, 0.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([-1.0, 0.0, 2.0], [0.0, 0.1, 1.0]),  # shifted to 0, 1, 3
        ([7.0], [1.0]),
        ([], []),
    ],
)
def test_lamp_scores_by_hand(scores, wanted):
    found = lamp_scores(torch.tensor(scores))
    assert found.tolist() == pytest.approx(wanted)
    assert found.dtype == torch.float64
    if len(wanted) == 3:
        assert lamp_scores(torch.tensor(scores).view(3, 1)).shape == (3, 1)


def test_lamp_by_hand_with_ties():
    # a: 1/14, 4/13, 1; b: a half each
    scores = pool([1, 2, 3], [2, 2])
    assert choose(lamp, scores, 0.4) == [[0, 0, 1], [1, 1]]
    assert choose(lamp, scores, 0.6) == [[0, 0, 1], [0, 1]]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_lamp_chooses_by_its_scores(data):
    """By count it chooses as by place: with ties in and between targets, zeros, masks before, rising and falling."""
    element = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, 2.0]) if data.draw(st.booleans()) else st.floats(0, 5, width=32)
    if data.draw(st.booleans()):
        element = st.one_of(element, st.floats(-2, 2, width=32))
    pool, by_place = [], []
    for i, n in enumerate(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))):
        values = torch.tensor(data.draw(st.lists(element, min_size=n, max_size=n)))
        keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) if data.draw(st.booleans()) else None
        values = values if keep is None or data.draw(st.booleans()) else values * keep
        pool.append(TensorScores(f"t{i}", values, keep))
        by_place.append(TensorScores(f"t{i}", lamp_scores(values), keep))
    sparsity = data.draw(st.floats(0, 1))
    limits = Limits(min_keep=data.draw(st.integers(0, 2)), may_fall=data.draw(st.booleans()))
    prune = round(sparsity * sum(s.count for s in pool))
    with warnings.catch_warnings(action="ignore"):
        found = lamp.select(pool, layouts(pool), sparsity, limits)
        wanted = keep_highest(by_place, prune, limits)
    assert all(map(torch.equal, found, wanted))


def test_lamp_sorts_where_it_can(monkeypatch):
    monkeypatch.setattr(contexts, "lamp_scores", None)
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).abs()
    keep = lamp([TensorScores("a", weight)], layouts(pool(A)), 0.5)[0]
    assert lamp([TensorScores("a", weight * keep, keep)], layouts(pool(A)), 0.75)[0].sum() == 150
    for refused in (TensorScores("a", weight, keep), TensorScores("a", -weight)):  # pruned ones that score, and negative ones
        with pytest.raises(TypeError):
            lamp([refused], layouts(pool(A)), 0.75)


def test_lamp_refuses_nan_by_name():
    bad = TensorScores("bad", torch.tensor([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity for bad"):
        lamp([TensorScores("good", torch.ones(3)), bad], layouts(pool(A, B)), 0.5)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30))
def test_lamp_scores_against_the_definition(scores):
    found = lamp_scores(torch.tensor(scores))
    x = np.array(scores)
    squares = (x - min(0.0, x.min())) ** 2
    wanted = [0.0 if s == 0 else s / squares[squares >= s].sum() for s in squares]
    assert np.allclose(found.numpy(), wanted, rtol=1e-9)
    assert ((x[:, None] == x) <= (found.numpy()[:, None] == found.numpy())).all()  # equals score the same


# --- N:M ---


def winners_by_numpy(values, n, m, axis):
    """Of every m neighbours along an axis the n highest, of equals the last."""
    x = np.moveaxis(values, axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, m)
    rank = np.argsort(np.argsort(groups, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.moveaxis((rank >= m - n).reshape(x.shape), -1, axis)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (4, 4)])
@pytest.mark.parametrize(
    ("read", "axis"),
    [
        (matrix(6, 16), 1),
        (layout((16, 6), "in", "out"), 0),
        (layout((6, 8, 3, 3), "out", "in", "height", "width"), 1),
        (layout((8, 6, 3, 2), "in", "out", "height", "width"), 0),
        (layout((2, 3, 8, 3, 3), "out+in", "out", "in", "height", "width"), 2),
        (layout((2, 3, 8), "expert", "out", "in"), 2),
    ],
)
def test_exact_n_of_m_along_the_inputs(n, m, read, axis):
    for values in (torch.randn(read.shape), torch.randint(0, 3, read.shape).float()):
        scores = [TensorScores("a", values)]
        found = NM(n, m)(scores, [read], 1 - n / m)[0].numpy()
        assert (found == winners_by_numpy(values.numpy(), n, m, axis)).all()


def test_between_dense_and_two_of_four_the_lowest_go_that_may():
    scores = [TensorScores("a", torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 6.0, 8.0, 7.0]]))]
    read = [matrix(1, 8)]
    assert two_four(scores, read, 0.125)[0].int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]
    assert two_four(scores, read, 0.25)[0].int().tolist() == [[0, 1, 1, 0, 1, 1, 1, 1]]
    assert two_four(scores, read, 0.375)[0].int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1]]
    assert two_four(scores, read, 0.5)[0].int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_what_is_pruned_does_not_come_back_when_the_scores_move():
    read = [matrix(1, 8)]
    keep = torch.tensor([[False, True, True, True, False, True, True, True]])
    scores = [TensorScores("a", torch.tensor([[9.0, 4.0, 3.0, 2.0, 9.0, 6.0, 8.0, 7.0]]), keep)]
    assert two_four(scores, read, 0.5, Limits(may_fall=False))[0].int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_scores_of_any_sign_and_size_keep_their_group():
    for scale in (1e-30, 1.0, 1e30):
        scores = [TensorScores("a", torch.tensor([[-1.0, -4.0, -3.0, -2.0, 5.0, 6.0, 8.0, 7.0]]) * scale)]
        assert two_four(scores, [matrix(1, 8)], 0.5)[0].int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]


def test_equal_scores_keep_the_last_two():
    assert two_four(pool([[1.0] * 8]), [matrix(1, 8)], 0.5)[0].int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize(("n", "m", "sparsity", "most"), [(2, 4, 0.6, "0.5"), (1, 4, 0.8, "0.75"), (4, 4, 0.1, "0")])
def test_more_than_n_of_m_can_give_is_refused(n, m, sparsity, most):
    with pytest.raises(ValueError, match=f"sparsity must be at most {most} for {n}:{m}, got {sparsity}"):
        NM(n, m).check(sparsity)
    with pytest.raises(ValueError, match=f"sparsity must be at most {most}"):
        NM(n, m)(pool([A]), [matrix(1, 4)], sparsity)


@pytest.mark.parametrize(
    ("shape", "read", "reason"),
    [
        ((8, 6), matrix(8, 6), "its 6 inputs are not a multiple of 4"),
        ((8, 1), matrix(8, 4), "2:4 needs granularity 'weight'"),
        ((6, 3, 3, 3), layout((6, 3, 3, 3), "out", "in", "height", "width"), "its 3 inputs are not a multiple of 4"),
        ((8, 4), matrix(8, 4), None),
    ],
)
def test_what_does_not_fit_says_why(shape, read, reason):
    assert two_four.fits(shape, read) == reason
    if reason:
        with pytest.raises(ValueError, match=f"conv1 cannot be 2:4 sparse: {reason}"):
            two_four([TensorScores("conv1", torch.rand(shape))], [read], 0.5)


@pytest.mark.parametrize(
    ("n", "m", "error", "message"),
    [
        (3, 2, ValueError, "n must be at most m, got n=3, m=2"),
        (0, 4, ValueError, "n must be at least 1, got 0"),
        (2, 4.0, TypeError, "m must be a whole number of at least 1, got 4.0"),
    ],
)
def test_n_and_m_are_checked(n, m, error, message):
    with pytest.raises(error, match=message):
        NM(n, m)


def test_other_contexts_take_units_of_any_shape():
    for context in (local, global_, erk, lamp, PerTarget()):
        assert context.fits((8, 1), matrix(8, 6)) is None


# --- what rounding keeps is made up for ---


@pytest.mark.parametrize("name", contexts.__all__)
def test_every_context_says_how_many_units_are_to_go(name):
    wanted = 5 + 10 if name == "local" else 16  # round(5) and round(10.5), or round(15.5)
    assert getattr(contexts, name).total({"a": 10, "b": 21}, 0.5) == wanted
    assert PerTarget({"b": 1.0}).total({"a": 10, "b": 21}, 0.5) == 10


@pytest.mark.parametrize("context", [global_, erk, lamp])
def test_others_make_up_for_what_rounding_keeps(context):
    """Of 288 units 102 are to go; each target keeps a multiple of 8, so up to 7 may be missing."""
    torch.manual_seed(0)
    scores = pool(torch.rand(64), torch.rand(96), torch.rand(128))
    plain, made_up = (counts(context, scores, 102 / 288, round_to=8, make_up=m) for m in (False, True))
    assert all(n % 8 == 0 for n in (*plain, *made_up))
    assert sum(made_up) in range(102 - 7, 102 + 1)
    assert sum(plain) <= sum(made_up)


def test_what_is_made_up_is_as_much_as_was_asked_for():
    """Kept counts are even, or all. Of the three lowest, 1 and 2 leave three of b: one comes back, and 4 goes for it.

    With 5 as well, b would lose three.
    """
    a, b, c = [4.0, 13.0, 14.0], [1.0, 2.0, 5.0, 9.0, 10.0], [3.0, 11.0, 12.0]
    found = [choose(global_, pool(a, b, c), 3 / 11, round_to=2, make_up=m) for m in (False, True)]
    assert found[0] == [[1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1]]
    assert found[1] == [[0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1]]


def test_a_target_by_itself_has_nothing_to_make_up_with():
    scores = pool(torch.rand(64), torch.rand(96))
    # 35 and 53 stay: 40 and 56
    assert counts(local, scores, 0.45, round_to=8, make_up=True) == [24, 40]
    assert counts(PerTarget({"a": 0.45, "b": 0.45}), scores, 1.0, round_to=8, make_up=True) == [24, 40]
