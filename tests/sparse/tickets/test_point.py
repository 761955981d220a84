"""The moment that is gone back to."""

import pytest
import torch
from torch import nn

from fasterai.core.loop import Fit, Loop
from fasterai.sparse.tickets.point import RewindPoint


def run(point, steps, completed=True, **fit):
    loop = Loop([point])
    loop.start(Fit(steps, point.model, **fit))
    for _ in range(steps if completed else steps // 2):
        with torch.no_grad():
            point.model.weight.add_(1)
        loop.before_step()
        loop.after_step()
    loop.end(completed)


def zeros():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


@pytest.mark.parametrize(("position", "steps", "value"), [(0.0, 4, 0), (0.25, 4, 1), (0.3, 4, 2), (0.1, 10, 1), (0.7, 10, 7)])
def test_the_moment_is_the_first_step_at_which_the_position_is_reached(position, steps, value):
    point = RewindPoint(zeros(), position=position)
    run(point, steps)
    assert point.weights["weight"].item() == value and point.is_completed


def test_known_tensors_are_not_noted_again():
    point = RewindPoint(zeros(), {"weight": torch.tensor([[7.0]])}, position=0.5)
    run(point, 4)
    assert point.weights["weight"].item() == 7


def test_a_run_that_ends_before_the_moment_is_refused():
    point = RewindPoint(zeros(), position=0.75)
    run(point, 4, completed=False)
    with pytest.raises(ValueError, match="train must go on beyond the moment to go back to, step 3, got 2 steps"):
        point.check_used()


def test_a_search_for_a_learning_rate_is_no_run():
    point = RewindPoint(zeros())
    run(point, 2, is_search=lambda: True)
    with pytest.raises(ValueError, match="took no step"):
        point.check_used()
    run(point, 2)
    point.check_used()
    assert point.weights["weight"].item() == 2


def test_noted_tensors_survive_an_interruption_within_a_round():
    point = RewindPoint(zeros(), position=0.25)
    run(point, 4)
    state = point.state_dict()
    other = RewindPoint(zeros(), position=0.25)
    other.load_state_dict(state)
    state["weights"]["weight"].fill_(9)
    assert other.weights["weight"].item() == point.weights["weight"].item() == 1
    with pytest.raises(ValueError, match="state's weights must be of this model"):
        other.load_state_dict({"weights": {"bias": torch.ones(1)}})
    with pytest.raises(TypeError, match="state's weights must be a dict"):
        other.load_state_dict({"weights": 3})
