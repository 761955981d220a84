"""The best ternary values of groups: against all 3^N patterns, and by what has to hold of them."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fasterai.core.types import Layout
from fasterai.misc.ternary.groups import divide
from fasterai.misc.ternary.optimum import _exchanges, check_rule, ternary_of


def rows(n_rows: int, n: int) -> Layout:
    return Layout((n_rows, n), (frozenset({"out"}), frozenset({"in"})))


def ternary(w: np.ndarray, group: int | None = None, rule: str = "exact") -> np.ndarray:
    found = torch.from_numpy(w)
    return ternary_of(found, divide(rows(*w.shape), group or w.shape[1]), rule).numpy()


@cache
def patterns(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1, 0, 1), repeat=n)), dtype=float)


def least_errors(w: np.ndarray) -> np.ndarray:
    """The least error of each row over every pattern, each with its own best scale of at least 0."""
    t = patterns(w.shape[1])
    counts = np.maximum((t**2).sum(1), 1)
    gains = np.maximum(w @ t.T, 0) ** 2 / counts
    return (w**2).sum(1) - gains.max(1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_no_pattern_of_a_small_group_is_better(n):
    w = np.random.default_rng(n).standard_normal((300, n)) ** 3
    np.testing.assert_allclose(((w - ternary(w)) ** 2).sum(1), least_errors(w), atol=1e-12)


def test_no_pattern_of_a_large_group_is_better(monkeypatch):
    """Groups that are sorted row by row: those of more than 8, and here of 4 as well."""
    w = np.random.default_rng(9).standard_normal((40, 9))
    np.testing.assert_allclose(((w - ternary(w)) ** 2).sum(1), least_errors(w), atol=1e-12)
    small, before = w[:, :4].copy(), ternary(w[:, :4].copy())
    monkeypatch.setattr("fasterai.misc.ternary.optimum.EXCHANGED", 0)
    np.testing.assert_allclose(ternary(small), before, atol=1e-15)


@pytest.mark.parametrize(
    ("weights", "exact", "threshold"),
    [
        ([4.0, -3.0, 1.0, 0.5], [3.5, -3.5, 0, 0], [3.5, -3.5, 0, 0]),  # P^2/k: 16, 24.5, 21.3, 18.1; 0.7 mean 1.49
        ([4.0, -1.0, 1.0, 1.0], [4, 0, 0, 0], [4, 0, 0, 0]),  # 16, 12.5, 12, 12.25; 0.7 mean 1.225
        ([-2.0, 2.0, -2.0, 2.0], [-2, 2, -2, 2], [-2, 2, -2, 2]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], [0, 0, 0, 0]),
        ([0.0, -5.0, 0.0, 0.0], [0, -5, 0, 0], [0, -5, 0, 0]),
        ([9.0, 5.0, 5.0, 4.0], [5.75, 5.75, 5.75, 5.75], [19 / 3, 19 / 3, 19 / 3, 0]),  # 81, 98, 120.3, 132.25; 0.7 mean 4.03
    ],
)
def test_values_by_hand(weights, exact, threshold):
    w = np.array([weights], dtype=np.float32)
    assert ternary(w).tolist() == [exact]
    np.testing.assert_allclose(ternary(w, rule="threshold"), [threshold], rtol=1e-6)


@pytest.mark.parametrize("group", [4, 16])
def test_the_threshold_of_a_smaller_last_group_is_that_of_its_own_weights(group):
    """3 and 1 are left over: 0.7 of their mean is 1.4, above 1; with zeros counted in it would be below."""
    w = np.array([[2.0] * group + [3.0, 1.0]])
    assert ternary(w, group, "threshold").tolist() == [[2.0] * group + [3.0, 0.0]]


def test_of_equal_gains_the_fewest_weights_are_kept():
    """3 alone gains 9, and so do all four: 6^2 / 4."""
    assert np.count_nonzero(ternary(np.array([[3.0, 1.0, 1.0, 1.0]]))) == 1


GROUPS = arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.floats(-100, 100, width=32))


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(-20, 20), st.randoms(use_true_random=False))
def test_error_scale_order_and_the_threshold_rule(w, power, random):
    found = ternary(w)
    ranked = -np.sort(-np.abs(w), axis=1)
    gains = ranked.cumsum(1) ** 2 / np.arange(1, w.shape[1] + 1)
    squares = (w**2).sum(1)
    error = ((w - found) ** 2).sum(1)
    np.testing.assert_allclose(error, squares - gains.max(1), atol=1e-9 * (1 + squares.max()))
    assert (error <= ((w - ternary(w, rule="threshold")) ** 2).sum(1) + 1e-9 * (1 + squares)).all()
    assert np.array_equal(ternary(w * 2.0**power), found * 2.0**power)
    order = random.sample(range(w.shape[1]), w.shape[1])
    np.testing.assert_allclose(ternary(w[:, order].copy()), found[:, order], rtol=1e-12)
    assert np.array_equal(ternary(-w), -found)


@pytest.mark.parametrize("n", range(1, 9))
def test_the_exchanges_sort(n):
    """Zeros and ones of every kind are sorted, and so everything is (Knuth's 0-1 principle)."""
    for bits in itertools.product((0, 1), repeat=n):
        values = list(bits)
        for i, j in _exchanges(n):
            values[i], values[j] = max(values[i], values[j]), min(values[i], values[j])
        assert values == sorted(bits, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["exact", "threshold"])
def test_half_precision_is_worked_out_in_float32_and_rounded_once(dtype, rule):
    w = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    division = divide(rows(50, 16), 4)
    found = ternary_of(w, division, rule)
    assert found.dtype == dtype
    assert torch.equal(found, ternary_of(w.float(), division, rule).to(dtype))


def test_the_largest_and_smallest_numbers_neither_overflow_nor_vanish():
    w = torch.tensor([[2e38, 5e37, 0.0, 0.0], [2e-37, 5e-38, 0.0, 0.0]])
    assert ternary_of(w, divide(rows(2, 4), 4)).tolist() == w.new_tensor([[2e38, 0, 0, 0], [2e-37, 0, 0, 0]]).tolist()


@pytest.mark.parametrize("group", [4, 16])
def test_nan_stays_in_its_group_and_no_zero_is_negative(group):
    w = torch.randn(2, 2 * group, generator=torch.Generator().manual_seed(0))
    w[0, 1] = torch.nan
    found = ternary_of(w, divide(rows(2, 2 * group), group))
    assert found[0, :group].isnan().all() and not found[0, group:].isnan().any() and not found[1].isnan().any()
    zeros = found[1][found[1] == 0]
    assert len(zeros) and not torch.signbit(zeros).any()


@pytest.mark.parametrize("group", [4, 16])
def test_blocks_and_layouts_in_memory_make_no_difference(group, monkeypatch):
    layout = Layout((6, 32, 3, 3), tuple(frozenset({a}) for a in ("out", "in", "height", "width")))
    w = torch.randn(6, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    before, copy = ternary_of(w, divide(layout, group)), w.clone()
    monkeypatch.setattr("fasterai.misc.ternary.optimum.BLOCK", 1)
    assert torch.equal(ternary_of(w.to(memory_format=torch.channels_last), divide(layout, group)), before)
    assert torch.equal(w, copy)


def test_scales_are_rounded_to_a_type():
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    division = divide(rows(5, 8), 4)
    exact, half = ternary_of(w, division), ternary_of(w, division, scale_dtype=torch.float16)
    assert torch.equal(half, exact.half().float()) and not torch.equal(half, exact)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"rule must be one of exact, threshold, got 'exakt'; did you mean 'exact'\?"):
        check_rule("exakt")
