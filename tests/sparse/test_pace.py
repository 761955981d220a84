"""When masks move: where the updates of a run are, and how far it has come."""

from __future__ import annotations

import pytest

from fasterai.core.schedules import OneShot, dsd, lin
from fasterai.sparse.pace import Pace


def started(schedule=lin, max_updates: int = 1000, steps: int = 4, sparsity: float = 0.5) -> Pace:
    pace = Pace(schedule, max_updates)
    pace.start(steps, sparsity)
    return pace


@pytest.mark.parametrize(
    ("schedule", "max_updates", "steps", "shares"),
    [
        # At positions 0.2, 0.25, 0.49, 0.5, 0.74, 0.75, 0.99, 1.
        (lin, 1000, 4, [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]),
        (OneShot(0.5), 1000, 4, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # The way back counts as well, and at the end is the schedule's own share.
        (dsd, 1000, 4, [0.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 0.0]),
        # One update, which goes to the end as soon as half of the survivors' way is left: 1 - s / 2 = sqrt(1 / 2), s = 0.586.
        (lin, 1, 100, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_share_is_that_of_the_last_update(schedule, max_updates: int, steps: int, shares: list[float]):
    pace = started(schedule, max_updates, steps)
    assert [pace.at(p) for p in (0.2, 0.25, 0.49, 0.5, 0.74, 0.75, 0.99, 1.0)] == pytest.approx(shares, abs=1e-12)


def test_masks_are_due_where_they_are_not_where_they_are_to_be_and_at_the_end():
    pace = started()
    assert [pace.is_due(p) for p in (0.2, 0.25, 0.3, 0.5, 1.0)] == [False, True, True, True, True]
    pace.share = 0.25
    assert [pace.is_due(p) for p in (0.2, 0.25, 0.3, 0.5, 1.0)] == [True, False, False, True, True]
    pace.share = 1.0
    assert pace.is_due(1.0)


def test_without_a_run_nothing_is_due_before_the_end():
    pace = Pace(lin, 1000)
    assert [pace.at(0.5), pace.at(1.0)] == [0.0, 1.0]
    assert [pace.is_due(0.5), pace.is_due(1.0)] == [False, True]


def test_a_new_run_begins_where_a_schedule_does():
    pace = started()
    pace.share, pace.asked = 0.75, (3, "0.weight")
    pace.finish()
    assert pace.finished
    pace.start(2, 0.5)
    assert (pace.share, pace.asked, pace.finished) == (0.0, (), False)
    assert [pace.at(p) for p in (0.25, 0.5, 0.75)] == [0.0, 0.5, 0.5]


def test_a_state_is_numbers_and_goes_on_where_it_was():
    pace = started()
    pace.share, pace.asked = 0.75, (3, "0.weight", 4)
    pace.finish()
    state = pace.state_dict()
    assert state == {"share": 0.75, "asked": [3, "0.weight", 4], "finished": True}
    other = started()
    other.load_state_dict(state)
    assert (other.share, other.asked, other.finished) == (0.75, (3, "0.weight", 4), True)
    assert state == {"share": 0.75, "asked": [3, "0.weight", 4], "finished": True}
    other.load_state_dict({"share": 0.5, "asked": []})  # as earlier versions wrote it
    assert (other.share, other.asked, other.finished) == (0.5, (), False)
