import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.core import schedules
from fasterai.core.schedules import AGP, Linear, OneShot, Piecewise, lin, one_cycle
from fasterai.prune.gradual_settings import check_bare, check_settings, check_trained, next_share


def moves(schedule, max_updates: int, steps: int) -> dict[int, float]:
    """The steps at which channels go, and the shares that are gone to."""
    done, found = 0.0, {}
    for i in range(1, steps + 1):
        share = next_share(schedule, schedule(i / steps), done, max_updates)
        if share is not None:
            done = found[i] = share
    return found


@pytest.mark.parametrize(
    ("schedule", "max_updates", "steps", "expected"),
    [
        (lin, 10, 4, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}),  # few steps: at each of them
        (lin, 1, 10, {5: 1.0}),  # closest to the only stair from 1/2 on
        (lin, 2, 100, {25: 0.25, 75: 1.0}),
        (lin, 3, 100, {17: 0.17, 50: 0.5, 84: 1.0}),  # from 1/6, 3/6 and 5/6 on
        (OneShot(0.3), 10, 100, {30: 1.0}),
        (schedules.iterative, 10, 10, {3: 1 / 3, 5: 2 / 3, 8: 1.0}),  # its own stairs
        (Linear(0.2, 0.6), 2, 100, {30: 0.25, 50: 1.0}),  # 1/4 and 3/4 of the window
        (Linear(0.5, 0.5), 3, 100, {50: 1.0}),
        (Piecewise(((0.0, 0.0), (1.0, 0.5))), 2, 100, {25: 0.125, 75: 0.5}),  # the stairs are those of its own end
        (lambda position: 0.0, 3, 100, {}),
    ],
)
def test_when_channels_go(schedule, max_updates, steps, expected):
    found = moves(schedule, max_updates, steps)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()))


@given(
    st.sampled_from([lin, one_cycle, schedules.agp, schedules.cos, schedules.iterative, OneShot(0.37), AGP(0.1, 0.8)]),
    st.integers(1, 20),
    st.integers(1, 300),
)
@settings(max_examples=100, deadline=None)
def test_never_more_often_than_asked_and_always_to_the_end(schedule, max_updates, steps):
    found = moves(schedule, max_updates, steps)
    assert len(found) <= max_updates
    assert list(found.values())[-1] == schedule(1.0)
    assert all(share in (schedule(i / steps), schedule(1.0)) for i, share in found.items())


@pytest.mark.parametrize("name", sorted(set(schedules.__all__) - {"dsd"}))
def test_every_schedule_that_rises_is_taken(name):
    assert check_settings(0.5, "local", "large_final", name, None, 10, None, {}) == getattr(schedules, name)


def test_a_falling_schedule_is_refused_with_where_it_falls():
    falling = Piecewise(((0.0, 0.0), (0.25, 0.8), (1.0, 0.7)))
    with pytest.raises(
        ValueError, match=r"schedule must never fall, .*from 0.8 to 0.7999 at position 0.251; pass one that rises"
    ):
        check_settings(0.5, "local", "large_final", falling, None, 10, None, {})


def test_an_optimizer_that_trains_something_else_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    theirs, ours = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (other, model))
    check_trained(model, ours)
    check_trained(model, [theirs, ours])
    check_trained(model, None)
    for optimizer in (theirs, [theirs]):
        with pytest.raises(ValueError, match=r"optimizer must train the model that channels go from, .* this Linear"):
            check_trained(model, optimizer)


def test_a_bare_model_is_no_error_and_a_compiled_one_is():
    model = nn.Sequential(nn.Linear(2, 2))
    check_bare(model)
    model._compiler_ctx = {"compiler": "dynamo"}  # as Lightning notes it on a module that it has unwrapped
    with pytest.raises(ValueError, match=r"model must be the bare network, got a Sequential that torch\.compile has compiled"):
        check_bare(model)
