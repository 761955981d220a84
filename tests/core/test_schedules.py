from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from functools import partial

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterai.core import schedules
from fasterai.core.schedules import (
    AGP,
    DSD,
    Alternating,
    Cosine,
    Custom,
    Iterative,
    Linear,
    OneCycle,
    OneShot,
    Phases,
    Piecewise,
    Position,
    Schedule,
    as_schedule,
    sched_agp,
    sched_cos,
    sched_dsd,
    sched_iterative,
    sched_lin,
    sched_onecycle,
    sched_oneshot,
)

mpl.use("agg")
THIRD = 1 / 3
# entry -> {position: share}; worked out by hand from the formulas.
CASES = {
    "one_shot": {0.0: 0.0, 0.49: 0.0, 0.5: 1.0, 0.75: 1.0, 1.0: 1.0},
    # three stairs between 0.2 and 1: inside, 0.3 is 1/8, 0.5 is 3/8, 0.9 is 7/8
    "iterative": {0.0: 0.0, 0.2: 0.0, 0.3: THIRD, 0.5: 2 * THIRD, 0.9: 1.0, 1.0: 1.0},
    # 1 - (1 - pos)^3: inside, 0.4 is 1/4, 0.6 is 1/2, 0.8 is 3/4
    "agp": {0.0: 0.0, 0.2: 0.0, 0.4: 0.578125, 0.6: 0.875, 0.8: 0.984375, 1.0: 1.0},
    # (1 + e^-8) / (1 + e^(6 - 14 t)): at the inflection 6/14 it is half of the numerator
    "one_cycle": {0.0: 0.00247345, 3 / 7: 0.50016773, 1.0: 1.0},
    "cos": {0.0: 0.0, THIRD: 0.25, 0.5: 0.5, 2 * THIRD: 0.75, 1.0: 1.0},
    "lin": {0.0: 0.0, 0.3: 0.3, 0.5: 0.5, 1.0: 1.0},
    # up to the middle and down again: a sixth of the way is a third of half a cosine
    # phases of 100 epochs: sparse 10-15, 20-25, ... 70-75, and from 85 on
    "alternating": {
        0.0: 0.0,
        0.0999: 0.0,
        0.1: 1.0,
        0.1499: 1.0,
        0.15: 0.0,
        0.2: 1.0,
        0.45: 0.0,
        0.7: 1.0,
        0.75: 0.0,
        0.85: 1.0,
    },
    "dsd": {0.0: 0.0, 1 / 6: 0.25, 0.25: 0.5, 0.5: 1.0, 0.75: 0.5, 5 / 6: 0.25, 1.0: 0.0},
}
TENTHS = [i / 10 for i in range(11)]
# Hubens et al. 2021, One-Cycle Pruning, alpha 14: the share at 0, 0.1, ... 1
ONE_CYCLE = {
    5: [0.0067, 0.0266, 0.0998, 0.3101, 0.6457, 0.8809, 0.9678, 0.9920, 0.9981, 0.9996, 1.0],
    6: [0.0025, 0.0100, 0.0392, 0.1419, 0.4014, 0.7313, 0.9171, 0.9784, 0.9948, 0.9990, 1.0],
}
# The author's run log: target 95 %, end of epochs 0 to 9 of 10, beta 5
ONE_CYCLE_LOG = [2.53, 9.48, 29.46, 61.34, 83.69, 91.94, 94.24, 94.82, 94.96, 95.00]


def rise_and_rest(start, end, pos):
    return end if pos > 0.5 else start + 2 * pos * (end - start)


def halves(position):
    return position / 2


ALL = {
    **{name: getattr(schedules, name) for name in schedules.__all__},
    "beta 5": OneCycle(beta=5),
    "five stairs": Iterative(n_steps=5, start_pct=0.1, end_pct=0.7),
    "piecewise": Piecewise(((0.2, 0.0), (0.6, 0.8), (0.6, 0.9), (1.0, 1.0))),
    "custom": Custom(rise_and_rest, 0.1, 0.8, 0.2, 0.7),
    "phases": Phases((Custom(sched_lin, 0.0, 0.5, 0.0, 0.4), Custom(sched_agp, 0.5, 1.0, 0.4, 1.0))),
    "position": Position(halves),
}


def test_every_entry_has_a_case():
    assert set(CASES) == set(schedules.__all__)


@pytest.mark.parametrize(("name", "position", "share"), [(n, p, s) for n, case in CASES.items() for p, s in case.items()])
def test_by_hand(name, position, share):
    assert getattr(schedules, name)(position) == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize("beta", [5, 6])
def test_one_cycle_as_published(beta):
    assert [OneCycle(beta=beta)(p) for p in TENTHS] == pytest.approx(ONE_CYCLE[beta], abs=5.1e-5)


def test_one_cycle_as_in_the_authors_run_log():
    assert [95 * OneCycle(beta=5)(p) for p in TENTHS[1:]] == pytest.approx(ONE_CYCLE_LOG, abs=5.1e-3)


def test_one_cycles_default_is_that_of_the_released_code():
    assert (schedules.one_cycle.alpha, schedules.one_cycle.beta) == (14, 6)


@pytest.mark.parametrize("name", [n for n in schedules.__all__ if n != "dsd"])
def test_the_last_position_reaches_the_whole_exactly(name):
    assert getattr(schedules, name)(1.0) == 1.0


@pytest.mark.parametrize("n_steps", range(1, 200))
def test_the_last_stair_is_the_whole_exactly(n_steps):
    assert Iterative(n_steps=n_steps, start_pct=0.0)(1.0) == 1.0


@pytest.mark.parametrize("name", [n for n in schedules.__all__ if n not in {"dsd", "alternating"}])
def test_all_rise_but_those_that_come_back(name):
    shares = [getattr(schedules, name)(i / 500) for i in range(501)]
    assert shares == sorted(shares)


def test_phases_begin_at_their_position_and_are_as_long_as_they_say():
    phases = Alternating(dense=0.2, compressed=0.1, decompressed=0.2, last=0.7, final=0.9)
    assert [i for i in range(100) if phases(i / 100)] == [*range(20, 30), *range(50, 60), *range(90, 100)]
    assert phases.jumps >= 5
    assert [Alternating(0.0, 1.0, 1.0, 1.0, 1.0)(p) for p in (0.0, 0.5, 0.99, 1.0)] == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compressed": 0.0}, "compressed must be above 0, got 0.0"),
        ({"decompressed": -0.1}, r"decompressed must be in \[0, 1\], got -0.1"),
        ({"final": 1.5}, r"final must be in \[0, 1\], got 1.5"),
        ({"last": 0.9}, "last must be at least dense and at most final, got dense=0.1, last=0.9, final=0.85"),
        ({"dense": 0.8}, "last must be at least dense and at most final, got dense=0.8, last=0.75"),
    ],
)
def test_phases_out_of_order_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Alternating(**wrong)


def test_dense_sparse_dense_goes_up_and_comes_back():
    shares = [schedules.dsd(i / 100) for i in range(101)]
    assert shares == pytest.approx(shares[::-1], abs=1e-12)
    assert shares[:51] == sorted(shares[:51])
    assert shares[50] == 1.0
    assert shares[-1] == pytest.approx(0.0, abs=1e-12)


@given(st.floats(0, 1))
def test_every_share_is_in_range_and_depends_on_the_position_alone(position):
    for schedule in ALL.values():
        share = schedule(position)
        assert 0 <= share <= 1
        schedule(0.5)
        assert schedule(position) == share


@pytest.mark.parametrize("name", ALL)
def test_values_pickle_compare_and_are_frozen(name):
    schedule = ALL[name]
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert [copy(p) for p in TENTHS] == [schedule(p) for p in TENTHS]
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, fields(schedule)[0].name, 0.9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("position", "error"), [(-0.01, ValueError), (1.01, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_positions_outside_are_refused(name, position, error):
    with pytest.raises(error, match=f"position must be .*got {position!r}"):
        ALL[name](position)


# --- windows ---


@pytest.mark.parametrize("kind", [OneShot, Iterative, AGP, OneCycle, Cosine, Linear, DSD])
def test_a_window_moves_the_curve(kind):
    whole, part = kind(start_pct=0.0, end_pct=1.0), kind(start_pct=0.25, end_pct=0.75)
    assert part(0.2) == 0.0
    assert part(0.375) == whole(0.25)
    assert part(0.625) == whole(0.75)
    assert part(0.75) == part(0.9) == part(1.0) == whole(1.0)


@pytest.mark.parametrize("kind", [OneShot, Iterative, AGP, OneCycle, Cosine, Linear, DSD])
@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"start_pct": 20}, "start_pct must be in .* got 20; pass 0.2"),
        ({"end_pct": -1}, "end_pct must be in .* got -1"),
        ({"start_pct": 0.8, "end_pct": 0.6}, "start_pct must be at most end_pct, got start_pct=0.8, end_pct=0.6"),
    ],
)
def test_a_window_must_lie_in_the_training(kind, window, message):
    with pytest.raises(ValueError, match=message):
        kind(**window)


def test_an_empty_window_is_a_jump():
    jump = Linear(start_pct=0.5, end_pct=0.5)
    assert [jump(0.49), jump(0.5), jump(1.0)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Iterative(n_steps=0), ValueError, "n_steps must be at least 1, got 0"),
        (lambda: Iterative(n_steps=2.5), TypeError, "n_steps must be a whole number"),
        (lambda: OneCycle(alpha=0), ValueError, "got alpha=0, beta=6.0"),
        (lambda: OneCycle(alpha=math.nan), ValueError, "got alpha=nan, beta=6.0"),
        (lambda: OneCycle(alpha=501), ValueError, "got alpha=501, beta=6.0"),
        (lambda: OneCycle(beta=501), ValueError, "got alpha=14.0, beta=501"),
        (lambda: OneCycle(beta=-501), ValueError, "got alpha=14.0, beta=-501"),
    ],
)
def test_settings_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- piecewise ---


@pytest.mark.parametrize(
    ("position", "share"),
    [(0.0, 0.0), (0.2, 0.0), (0.3, 0.2), (0.4, 0.4), (0.6, 0.9), (0.8, 0.95), (1.0, 1.0)],
)
def test_piecewise_by_hand(position, share):
    assert ALL["piecewise"](position) == pytest.approx(share)


def test_piecewise_rests_before_its_first_and_after_its_last_point():
    level = Piecewise(((0.3, 0.5), (0.6, 0.2)))
    assert [level(0.0), level(0.29), level(0.45), level(0.6), level(1.0)] == pytest.approx([0.5, 0.5, 0.35, 0.2, 0.2])
    assert {Piecewise([(0.5, 0.7)])(p) for p in TENTHS} == {0.7}


def test_a_jump_at_the_first_point_counts_from_there_on():
    jump = Piecewise(((0.3, 0.1), (0.3, 0.5), (1.0, 0.5)))
    assert [jump(0.29), jump(0.3), jump(0.31)] == [0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "points must be at least one pair"),
        (((0.5, 0.5), (0.2, 1.0)), "points must be in the order of their positions"),
        (((0.5, 50),), "points' share must be in .* got 50.0; pass 0.5"),
        (((2, 0.5),), "points' position must be in .* got 2.0"),
    ],
)
def test_piecewise_checks_its_points(points, message):
    with pytest.raises(ValueError, match=message):
        Piecewise(points)


# --- from functions ---


@pytest.mark.parametrize(
    ("function", "at_quarter"),
    [
        (sched_oneshot, 0.8),
        (sched_iterative, 0.4),  # 0.2 + 0.6 / 3
        (partial(sched_iterative, n_steps=2), 0.5),  # 0.2 + 0.6 / 2
        (sched_agp, 0.546875),  # 0.8 - 0.6 * 27 / 64
        (sched_onecycle, 0.2455302),  # 0.2 + 0.6 (1 + e^-8) / (1 + e^2.5)
        (partial(sched_onecycle, α=10, β=4), 0.3097267),  # 0.2 + 0.6 (1 + e^-6) / (1 + e^1.5)
        (sched_cos, 0.2878680),  # 0.2 + 0.3 (1 - sqrt(1/2))
        (sched_lin, 0.35),
        (sched_dsd, 0.5),
    ],
)
def test_functions_between_two_values_by_hand(function, at_quarter):
    assert function(0.2, 0.8, 0.25) == pytest.approx(at_quarter, abs=1e-7)


def test_a_schedule_made_of_a_function_has_a_window_and_values():
    schedule = Schedule(sched_lin, 0.2, 0.6, 0.1, 0.9)
    assert isinstance(schedule, Custom)
    assert [schedule(p) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.9, 0.9])
    assert Schedule(sched_lin, start_pct=0.25)(0.25) == 0.0
    assert Schedule(sched_lin)(0.25) == 0.25


def test_a_custom_schedule_may_fall():
    assert Schedule(sched_lin, start_val=0.9, end_val=0.1)(0.75) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Schedule(0.5), TypeError, r"sched_func must be a function \(start, end, pos\), got 0.5"),
        (lambda: Schedule(sched_lin, end_val=90), ValueError, "end_val must be in .* got 90; pass 0.9"),
        (lambda: Schedule(sched_lin, start_val=-0.1), ValueError, "start_val must be in .* got -0.1"),
        (lambda: Schedule(sched_lin, 0.5, 0.4), ValueError, "start_pct must be at most end_pct"),
        (lambda: Schedule(lambda s, e, p: 1.5)(0.5), ValueError, "what sched_func returns must be in .* got 1.5"),
        (lambda: Schedule(lambda s, e, p: None)(0.5), TypeError, "what sched_func returns must be a number .* got None"),
        (lambda: Position(lambda p: 2 * p)(0.75), ValueError, "what the schedule returns must be in .* got 1.5"),
        (lambda: Phases(()), TypeError, "schedules must be schedules with a window"),
        (lambda: Phases((halves,)), TypeError, "schedules must be schedules with a window"),
        (lambda: as_schedule(0.5), TypeError, "schedule must be a schedule, its name, or a function .* got 0.5"),
        (lambda: as_schedule("agp"), TypeError, "got 'agp'"),
    ],
)
def test_what_is_no_schedule_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_list_of_schedules_is_one_after_the_other():
    phases = as_schedule([Schedule(sched_lin, 0.1, 0.5, 0.0, 0.4), Schedule(sched_agp, 0.6, 1.0, 0.4, 1.0)])
    assert isinstance(phases, Phases)
    # in the gap the first rests at its end; at 0.8 the second has 1 - 0.6 / 8
    assert [phases(p) for p in (0.0, 0.1, 0.3, 0.55, 0.6, 0.8, 1.0)] == pytest.approx([0, 0, 0.2, 0.4, 0.4, 0.925, 1])


def test_the_next_schedule_begins_where_its_window_does():
    phases = as_schedule([Schedule(sched_lin, 0.0, 0.5, 0.0, 0.4), Schedule(sched_lin, 0.5, 1.0, 0.6, 1.0)])
    assert [phases(0.49), phases(0.5)] == pytest.approx([0.392, 0.6])


def test_a_plain_function_of_the_position_is_a_schedule():
    schedule = as_schedule(halves)
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.25, 0.5]
    assert as_schedule(schedule) is schedule
    assert as_schedule(schedules.agp) is schedules.agp


# --- plot ---


@pytest.mark.parametrize("name", ALL)
def test_plot_draws_the_target_times_the_share(name):
    axes = ALL[name].plot(0.5, num_points=11)
    x, y = axes.lines[0].get_data()
    assert list(x) == pytest.approx(TENTHS)
    assert list(y) == pytest.approx([0.5 * ALL[name](p) for p in TENTHS])
    assert ALL[name].plot(ax=axes) is axes
    assert len(axes.lines) == 2
    mpl.pyplot.close(axes.figure)


def test_plot_refuses_percent_and_single_points():
    with pytest.raises(ValueError, match=r"target must be in .* got 50; pass 0.5"):
        schedules.agp.plot(50)
    with pytest.raises(ValueError, match="num_points must be at least 2, got 1"):
        schedules.agp.plot(num_points=1)


def test_a_function_of_start_end_and_position_is_a_schedule_too():
    assert as_schedule(sched_agp)(0.5) == 0.875
    assert as_schedule(lambda start, end, pos: start + pos * (end - start))(0.25) == 0.25


def test_what_a_function_has_a_default_for_is_not_asked_of_a_loop():
    assert as_schedule(lambda start, end, pos, power=2: start + pos**power * (end - start))(0.5) == 0.25
    assert as_schedule(lambda pos, low=0.5, high=1.0: low + pos * (high - low))(0.5) == 0.75


def test_what_a_schedule_returns_is_never_taken_for_a_percentage():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1\.2$"):
        as_schedule(lambda pos: 1.2)(0.5)


def fails(*_):
    raise KeyError("inside")


@pytest.mark.parametrize("schedule", [as_schedule(lambda pos: fails()), Schedule(partial(fails))], ids=["position", "custom"])
def test_an_error_of_a_function_of_your_own_says_where_it_comes_from(schedule):
    with pytest.raises(KeyError, match="inside") as caught:
        schedule(0.25)
    (note,) = caught.value.__notes__
    assert note in (
        "raised by the schedule's function <lambda>, at position 0.25",
        "raised by the schedule's function fails, at position 0.25",
    )


def test_a_plot_on_given_axes_names_one_schedule_alone():
    import matplotlib.pyplot as plt

    alone, together, named = plt.figure().subplots(1, 3)
    schedules.lin.plot(ax=alone)
    schedules.agp.plot(ax=schedules.one_cycle.plot(ax=together))
    named.set_title("mine")
    schedules.lin.plot(ax=named)
    assert [axes.get_title("left") for axes in (alone, together, named)] == ["Linear", "", ""]
    assert named.get_title() == "mine"
    plt.close("all")
