import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.core import schedules
from fasterai.core.schedules import DSD, Linear, OneCycle, OneShot, Piecewise, lin
from fasterai.core.updates import Updates, plan_updates


def at_steps(schedule, sparsity, steps, most):
    """Step -> share."""
    plan = plan_updates(schedule, sparsity, steps, most)
    return {round(p * steps): s for p, s in zip(plan.positions, plan.shares, strict=True)}


def ways(shares, sparsity):
    """The survivors' way before the first share and at each: -log(1 - sparsity * share)."""
    return [0.0, *(-math.log1p(-sparsity * s) for s in shares)]


@pytest.mark.parametrize(
    ("schedule", "sparsity", "most", "steps", "expected"),
    [
        # 75 % of the weights: survivors 1, 1/2, 1/4. Two even shares; the half is crossed at share 2/3, step 67, and the end is
        # near from survivors 1/4 * 2^(1/2) = 0.3536 on, which is share 0.8619.
        (lin, 0.75, 2, 100, {67: 0.67, 87: 1.0}),
        (lin, 0.75, 1, 100, {67: 1.0}),  # near from half the way on
        (lin, 0.5, 10, 4, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}),  # few steps: at each of them
        (OneShot(0.3), 0.9, 10, 100, {30: 1.0}),
        (schedules.iterative, 0.9, 3, 10, {3: 1 / 3, 5: 2 / 3, 8: 1.0}),  # its own stairs, though the first is small
        (Linear(0.5, 0.5), 0.9, 3, 100, {50: 1.0}),
        (lambda position: 0.0, 0.9, 3, 100, {}),
        (lin, 0.0, 3, 100, {}),
        # Up and down, two turns of log 4 each; each costs half an update: even shares of 2 log 4 / 3. The turn at 50 is gone to
        # from survivors 4^(-2/3) = 0.3969 on (share 0.8042), the end from survivors 4^(-1/3) = 0.63 on (share 0.4933).
        (DSD(), 0.75, 4, 100, None),
    ],
)
def test_by_hand(schedule, sparsity, most, steps, expected):
    found = at_steps(schedule, sparsity, steps, most)
    if expected is None:
        shares = list(found.values())
        assert 1.0 in shares and shares[-1] == 0.0 and len(found) <= most
        assert shares[: shares.index(1.0) + 1] == sorted(shares[: shares.index(1.0) + 1])
        return
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()))


def test_shares_between_the_updates():
    plan = Updates((0.25, 0.5), (0.1, 1.0))
    assert [plan.share(p) for p in (0.0, 0.24, 0.25, 0.4, 0.5, 1.0)] == [0.0, 0.0, 0.1, 0.1, 1.0, 1.0]
    assert Updates().share(1.0) == 0.0


@pytest.mark.parametrize("name", schedules.__all__)
@given(
    sparsity=st.floats(0.01, 0.999),
    steps=st.integers(1, 4000),
    most=st.one_of(st.integers(10, 50), st.integers(51, 10_000)),
)
@settings(max_examples=25, deadline=None)
def test_no_update_takes_more_than_two_even_shares_and_the_end_is_settled_early(name, sparsity, steps, most):
    schedule = getattr(schedules, name)
    plan = plan_updates(schedule, sparsity, steps, most)
    way = ways([schedule(i / steps) for i in range(1, steps + 1)], sparsity)
    jumps = [abs(b - a) for a, b in itertools.pairwise(way)]
    length, moved = sum(jumps), ways(plan.shares, sparsity)
    assert len(plan.positions) <= most
    if length:
        assert plan.shares[-1] == schedule(1.0)  # exact at the end
        even = length / min(most, steps)
        # Two even shares, or what the schedule itself jumps in a step on top of one.
        assert max(abs(b - a) for a, b in itertools.pairwise(moved)) <= max(2 * even, 1.5 * even + max(jumps)) + 1e-9
        if (
            sum(j > 0 for j in jumps) > most and jumps[-1] < even / 4
        ):  # the schedule itself comes near to its end before the last step
            assert plan.positions[-1] < 1


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 500),
    st.floats(0, 0.999),
)
@settings(max_examples=200, deadline=None)
def test_never_more_often_than_asked_however_a_schedule_turns(points, most, steps, sparsity):
    schedule = Piecewise(tuple(sorted(points)))
    plan = plan_updates(schedule, sparsity, steps, most)
    assert len(plan.positions) <= most
    assert all(0 < a < b for a, b in itertools.pairwise(plan.positions))
    own = {schedule(i / steps) for i in range(1, steps + 1)}
    assert set(plan.shares) <= own


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="what the schedule returns must be in"):
        plan_updates(lambda position: 2 * position, 0.9, 100, 10)


def test_a_run_of_a_million_steps_is_planned_at_once():
    plan = plan_updates(schedules.one_cycle, 0.99, 1_000_000, 50)
    assert 40 <= len(plan.positions) <= 50 and plan.shares[-1] == 1.0


def test_the_figures_of_the_files_head():
    """Updates even in the share: at one of 50 ticks, if the share has gone on by a fiftieth; what is left, at the last step."""
    schedule, steps, most = OneCycle(beta=5), 4000, 50
    plan = plan_updates(schedule, 0.99, steps, most)
    left = [1.0, *(1 - 0.99 * s for s in plan.shares)]
    assert round(100 * max(1 - b / a for a, b in itertools.pairwise(left))) == 12 and plan.positions[-1] < 1
    share, before = 0.0, [1.0]
    for tick in range(1, most + 1):
        now = schedule(tick / most)
        if tick == most or now - share >= 1 / most:
            share = now
            before.append(1 - 0.99 * share)
    assert round(100 * (1 - before[-1] / before[-2])) == 65
