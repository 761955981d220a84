"""Who keeps something of a model's parameters hears of cuts by the names that it knows, and is not kept alive by that."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.model.cuts import announce, check_trains, follow, kept_slices, note_optimizer, noted_optimizers, sliced

CUT = {("0.weight", 0): np.array([0, 2]), ("1.inner.weight", 1): np.array([1])}


class Heard:
    def __init__(self):
        self.cuts = []

    def after_cut(self, cut):
        self.cuts.append({place: kept.tolist() for place, kept in cut.items()})


def nest():
    inner = nn.ModuleDict({"inner": nn.Linear(3, 2)})
    return nn.Sequential(nn.Linear(3, 3), inner)


def test_a_follower_of_the_model_hears_of_it():
    model, heard = nest(), Heard()
    follow(model, heard)
    follow(model, heard)
    announce(model, CUT)
    assert heard.cuts == [{("0.weight", 0): [0, 2], ("1.inner.weight", 1): [1]}]


def test_a_follower_of_a_part_hears_of_what_is_in_it():
    model, of_part, of_other = nest(), Heard(), Heard()
    follow(model[1], of_part)
    follow(nest(), of_other)
    announce(model, CUT)
    assert of_part.cuts == [{("inner.weight", 1): [1]}]
    assert of_other.cuts == []


def test_a_follower_of_the_whole_hears_of_a_cut_in_a_part():
    model, heard = nest(), Heard()
    follow(model, heard)
    announce(model[1], {("inner.weight", 0): np.array([1])})
    assert heard.cuts == [{("1.inner.weight", 0): [1]}]


def test_nothing_is_said_of_an_empty_cut_or_of_other_parts():
    model, heard = nest(), Heard()
    follow(model[1], heard)
    announce(model, {})
    announce(model, {("0.weight", 0): np.array([1])})
    assert heard.cuts == []


def test_names_do_without_what_compile_adds():
    model, heard = nest(), Heard()
    follow(torch.compile(model), heard)
    announce(torch.compile(model), {("0.weight", 0): np.array([1])})
    assert heard.cuts == [{("0.weight", 0): [1]}]


def test_followers_and_models_are_not_kept_alive():
    model, heard = nest(), Heard()
    follow(model, heard)
    there = weakref.ref(model), weakref.ref(heard)
    del heard
    gc.collect()
    assert there[1]() is None
    del model
    gc.collect()
    assert there[0]() is None


def test_sliced_takes_what_stays_of_each_dimension():
    x = torch.arange(12.0).view(3, 4)
    cut = {("w", 0): np.array([0, 2]), ("w", 1): np.array([3]), ("v", 0): np.array([1])}
    assert sliced(x, cut, "w").tolist() == [[3.0], [11.0]]
    assert sliced(x, cut, "v").tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert sliced(x, cut, "u") is x


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 6, 1, 1), (4, 6, 2, 3, 3), (4, 1, 3, 3)])
@pytest.mark.parametrize("is_last", [True, False])
def test_the_memory_format_stays(shape, is_last):
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if is_last else torch.contiguous_format
    tensor = torch.randn(shape).to(memory_format=layout)
    small = kept_slices(tensor, {0: np.array([0, 2])})
    assert torch.equal(small, tensor[[0, 2]])
    assert small.stride() == torch.empty(2, *shape[1:]).to(memory_format=layout).stride()
    assert torch.equal(sliced(tensor, {("w", 0): np.array([0, 2])}, "w"), small)


def test_what_stays_carries_no_gradient():
    tensor = torch.ones(3, requires_grad=True)
    assert not kept_slices(tensor * 2, {0: [1]}).requires_grad
    assert kept_slices(tensor, {}) is tensor


def test_an_optimizer_that_trains_none_of_the_parameters_is_refused():
    own, other = nn.Linear(2, 2), nn.Linear(2, 2)
    trains_own, trains_other = (torch.optim.SGD(m.parameters(), 0.1) for m in (own, other))
    with pytest.raises(
        ValueError, match="optimizer must train the net, got one that holds none of its weights: make the optimizer anew"
    ):
        check_trains(trains_other, own.parameters(), "the net", "its weights")
    with pytest.raises(ValueError, match="optimizer must train the net"):
        check_trains([trains_other, None], own.parameters(), "the net", "its weights")
    for allowed in (trains_own, [trains_other, trains_own], None, object(), []):
        check_trains(allowed, own.parameters(), "the net", "its weights")


def test_optimizers_are_known_by_model_part_and_whole():
    model = nest()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    note_optimizer(model, optimizer)
    note_optimizer(model, [optimizer, None])
    assert noted_optimizers(model) == [optimizer]
    assert noted_optimizers(model[1]) == [optimizer]
    assert noted_optimizers(nn.Sequential(model)) == [optimizer]
    assert noted_optimizers(nest()) == []
    del optimizer
    gc.collect()
    assert noted_optimizers(model) == []


def test_buffers_and_every_name_of_a_tied_weight_are_heard_of():
    model, heard = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), Heard()
    model[2].weight = model[0].weight
    follow(model, heard)
    announce(model, {("1.running_mean", 0): np.array([0]), ("0.weight", 1): np.array([2])})
    assert heard.cuts == [{("0.weight", 1): [2], ("2.weight", 1): [2], ("1.running_mean", 0): [0]}]


def test_optimizers_may_stand_in_a_tuple():
    model = nest()
    both = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[1].parameters(), 0.1)
    note_optimizer(model, both)
    assert {id(one) for one in noted_optimizers(model)} == {id(one) for one in both}


def test_what_has_no_state_or_cannot_be_noted_without_being_kept_alive_is_not_noted():
    class Slotted:
        __slots__ = ("state",)

        def __init__(self):
            self.state = {}

    class Stateless: ...

    model, others = nest(), [Slotted(), Stateless()]
    note_optimizer(model, others)
    assert noted_optimizers(model) == []


def test_a_tied_parameter_is_heard_of_under_the_name_that_it_has_there():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    heard = Heard()
    follow(model[1], heard)
    announce(model, {("0.weight", 0): np.array([1])})
    assert heard.cuts == [{("weight", 0): [1]}]


def test_who_shares_a_part_with_the_model_hears_of_it():
    body = nn.Linear(3, 3)
    one, other = nn.Sequential(body, nn.ReLU()), nn.Sequential(nn.ReLU(), body)
    heard, optimizer = Heard(), torch.optim.SGD(other.parameters(), 0.1)
    follow(other, heard)
    note_optimizer(other, optimizer)
    announce(one, {("0.weight", 0): np.array([1])})
    assert heard.cuts == [{("1.weight", 0): [1]}]
    assert noted_optimizers(one) == [optimizer]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_if_one_fails_all_are_as_they_were(error):
    class Counting:
        count = 0

        def __init__(self, fails=False):
            self.fails, self.sizes = fails, (3,)

        def after_cut(self, cut):
            Counting.count += 1
            self.sizes = (2,)
            if self.fails and Counting.count == 4:  # the first three have followed
                raise error("failing")

    model, other = nest(), nest()
    followers = [Counting(fails=True) for _ in range(5)]
    for follower in followers:
        follow(model if follower in followers[:3] else other, follower)
    with pytest.raises(error, match="failing"):
        announce(model, CUT, [other])
    assert [follower.sizes for follower in followers] == [(3,)] * 5
    announce(model, CUT, [other])
    assert [follower.sizes for follower in followers] == [(2,)] * 5
