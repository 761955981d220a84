import pytest
import torch
from torch import nn

from fasterai.core import schedules
from fasterai.core.schedules import Piecewise
from fasterai.model.optimizers import check_trained
from fasterai.prune.gradual_settings import check_bare, check_settings


@pytest.mark.parametrize("name", sorted(set(schedules.__all__) - {"alternating", "dsd"}))
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
