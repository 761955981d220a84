"""Snapshots: everything goes back, bit for bit."""

import pytest
import torch
from torch import nn

from fasterai.model.snapshots import clear_states_, find_differences, put_back_, sum_of, take_snapshot
from tests.ticket_nets import Net, equal, net, tensors_of, train


def trained(model: Net) -> None:
    from fasterai.core.loop import Participant

    train(model, [Participant()])


def test_everything_goes_back_bit_for_bit():
    model = net()
    before = tensors_of(model)
    snapshot = take_snapshot(model)
    trained(model)
    assert not any(torch.equal(x, before[name]) for name, x in tensors_of(model).items()), "all of it has moved"
    put_back_(model, snapshot)
    assert equal(tensors_of(model), before)


def test_a_snapshot_is_a_copy():
    model = net()
    snapshot = take_snapshot(model)
    trained(model)
    assert torch.equal(snapshot["raw"], torch.ones(8))
    put_back_(model, snapshot)
    with torch.no_grad():
        model.raw.zero_()
    assert torch.equal(snapshot["raw"], torch.ones(8))


def test_tied_tensors_are_noted_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    snapshot = take_snapshot(model)
    assert list(snapshot) == ["0.weight", "0.bias", "2.bias"]
    with torch.no_grad():
        model[2].weight.zero_()
    put_back_(model, snapshot)
    assert model[2].weight is model[0].weight and torch.equal(model[2].weight, snapshot["0.weight"])


def test_a_wrapped_model_has_the_names_of_the_plain_one():
    model = net()
    assert equal(take_snapshot(nn.DataParallel(model)), tensors_of(model))


def test_a_buffer_of_another_shape_is_replaced():
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(2))
    snapshot = take_snapshot(model)
    model.cache = torch.ones(5)
    put_back_(model, snapshot)
    assert torch.equal(model.cache, torch.zeros(2)) and model.cache is not snapshot["cache"]


def test_a_buffer_whose_places_overlap_is_left_where_it_has_not_changed():
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.zeros(1).expand(4))
    put_back_(model, take_snapshot(model))  # writing into it would be an error


def test_differences_are_named():
    model, other = nn.Linear(2, 3), nn.Linear(2, 4, bias=False)
    assert find_differences(model, take_snapshot(model)) == []
    found = find_differences(model, {**take_snapshot(other), "more": torch.ones(1)})
    assert found == ["more is missing", "bias is there besides", "weight is (3, 2) here and (4, 2) there"]


def test_a_buffer_that_no_file_has_may_be_absent():
    model = net()
    assert find_differences(model, model.state_dict()) == []


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_a_sum_tells_tensors_apart(change: str):
    x = torch.arange(6.0)
    other = {"value": {"x": x + 1}, "name": {"y": x}, "dtype": {"x": x.double()}, "shape": {"x": x.view(2, 3)}}[change]
    assert sum_of({"x": x}) == sum_of({"x": x.clone()}) != sum_of(other)


def test_optimizers_are_cleared_and_keep_their_settings():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state
    clear_states_([optimizer])
    assert not optimizer.state and optimizer.param_groups[0]["momentum"] == 0.9
