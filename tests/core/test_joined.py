"""Parameters that join an optimizer for a time."""

from __future__ import annotations

import copy

import pytest
import torch
from fastai.optimizer import Adam as FastaiAdam
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer

from fasterai.core.joined import Joined, innermost


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def step(optimizer, model, extra) -> None:
    (model(torch.ones(1, 3)).sum() + extra.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.01}, {"params": p[1:]}], 0.1),
    "fastai": lambda p: FastaiAdam(p, 0.1),
    "fastai's wrapper": lambda p: OptimWrapper(p, torch.optim.Adam, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_trains_with_the_optimizer_and_leaves_nothing(make):
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = make(list(model.parameters()))
    before = [list(group["params"]) for group in optimizer.param_groups]
    joined = Joined(optimizer, [extra])
    step(optimizer, model, extra)
    assert (extra < 1).all()
    joined.leave()
    after = [list(group["params"]) for group in optimizer.param_groups]
    assert [[id(p) for p in group] for group in before] == [[id(p) for p in group] for group in after]
    assert extra not in innermost(optimizer).state
    step(optimizer, model, extra)
    alone, bare = layer(), None
    bare = make(list(alone.parameters()))
    for _ in range(2):
        step(bare, alone, torch.zeros(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizers_file_is_the_same_as_without_it(make):
    model, alone, extra = layer(), layer(), nn.Parameter(torch.ones(2))
    optimizer, bare = make(list(model.parameters())), make(list(alone.parameters()))
    joined = Joined(optimizer, [extra])
    step(optimizer, model, extra)
    step(bare, alone, torch.zeros(1))
    saved, plain = optimizer.state_dict(), bare.state_dict()
    assert len(saved["state"]) == len(plain["state"]) == 2
    bare.load_state_dict(copy.deepcopy(saved))  # goes into one that knows nothing of it
    value = extra.detach().clone()
    optimizer.load_state_dict(copy.deepcopy(plain))  # and the other way round: its own state stays
    step(optimizer, model, extra)
    assert (extra < value).all()
    joined.leave()


def test_its_own_state_goes_on():
    finals = []
    for resumes in (False, True):
        model, extra = layer(), nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        joined = Joined(optimizer, [extra])
        for i in range(4):
            if resumes and i == 2:
                state, value = joined.state_dict(), extra.detach().clone()
                joined.leave()
                extra = nn.Parameter(value)
                joined = Joined(optimizer, [extra])
                joined.load_state_dict(state)
            step(optimizer, model, extra)
        finals.append(extra.detach())
    assert torch.equal(*finals)


def test_every_schedule_of_the_rate_goes_on():
    for make in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    ):
        model, extra = layer(), nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rate = make(optimizer)
        joined = Joined(optimizer, [extra])
        for _ in range(3):
            step(optimizer, model, extra)
            rate.step()
        joined.leave()


def test_bad_parameters_and_optimizers_are_refused():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"parameters to train must be new to the optimizer, got one of shape \(2, 3\) twice"):
        Joined(optimizer, [model.weight])
    extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"parameters to train must be new to the optimizer, got one of shape \(1,\) twice"):
        Joined(optimizer, [extra, extra])
    assert len(optimizer.param_groups[0]["params"]) == 2
    with pytest.raises(TypeError, match="optimizer must have param_groups for further parameters, got object"):
        Joined(object(), [nn.Parameter(torch.ones(1))])
    joined = Joined(optimizer, [nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="state must be of 1 joined parameters, got 2"):
        joined.load_state_dict({"states": [{}, {}]})


def test_wrappers_are_looked_through():
    optimizer = torch.optim.SGD(layer().parameters(), 0.1)

    class Outer:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    assert innermost(Outer(Outer(optimizer))) is optimizer
    assert innermost(optimizer) is optimizer
    wrapped = PostLocalSGDOptimizer.__new__(PostLocalSGDOptimizer)
    wrapped.optim = optimizer
    assert innermost(wrapped) is optimizer
    assert innermost(None) is None


def test_groups_that_are_added_later_keep_their_own_state():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([model.weight], 0.1)
    joined = Joined(optimizer, [extra])
    optimizer.add_param_group({"params": [model.bias]})  # as a callback that unfreezes layers does
    step(optimizer, model, extra)
    alone = layer()
    bare = torch.optim.Adam([{"params": [alone.weight]}, {"params": [alone.bias]}], 0.1)
    step(bare, alone, torch.zeros(1))
    saved, plain = optimizer.state_dict(), bare.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [group["params"] for group in plain["param_groups"]]
    assert all(torch.equal(saved["state"][i]["exp_avg"], plain["state"][i]["exp_avg"]) for i in (0, 1))
    kept = optimizer.state[extra]["exp_avg"].clone()
    optimizer.load_state_dict(copy.deepcopy(plain))
    assert torch.equal(optimizer.state[extra]["exp_avg"], kept)
    assert optimizer.state[model.bias]["exp_avg"].shape == (2,) and optimizer.state[model.weight]["exp_avg"].shape == (2, 3)
    joined.leave()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(model.weight)], [id(model.bias)]]


def test_states_find_their_owners():
    model, one, two = layer(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    joined = Joined(optimizer, [one, two], ["one", "two"])
    (model(torch.ones(1, 3)).sum() + one.sum() + 5 * two.sum()).backward()
    optimizer.step()
    state = joined.state_dict()
    joined.leave()
    again = Joined(optimizer, [two, one], ["two", "one"])
    again.load_state_dict(state)
    assert optimizer.state[one]["exp_avg"].tolist() == pytest.approx([0.1, 0.1])  # (1 - 0.9) * 1
    assert optimizer.state[two]["exp_avg"].tolist() == pytest.approx([0.5, 0.5])
    again.leave()
    fresh = Joined(optimizer, [one], ["three"])
    fresh.load_state_dict(state)
    assert optimizer.state[one] == {}
    fresh.leave()
    with pytest.raises(ValueError, match="state must be of 2 joined parameters of one, got 1"):
        Joined(optimizer, [one, two], ["one", "one"]).load_state_dict(state)


def test_a_state_of_before_the_first_step_begins_anew():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    joined = Joined(optimizer, [extra])
    state = joined.state_dict()
    step(optimizer, model, extra)
    joined.load_state_dict(state)
    step(optimizer, model, extra)
    assert float(optimizer.state[extra]["step"]) == 1


def test_states_of_before_they_had_owners_are_taken_in_order():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    joined = Joined(optimizer, [extra], ["one"])
    joined.load_state_dict({"states": [{"exp_avg": torch.full((2,), 3.0)}]})
    assert optimizer.state[extra]["exp_avg"].tolist() == [3.0, 3.0]


def test_an_optimizer_that_mixes_all_parameters_is_refused():
    optimizer = torch.optim.LBFGS(layer().parameters())
    with pytest.raises(TypeError, match="optimizer must treat each parameter alone where further ones are to train, got LBFGS"):
        Joined(optimizer, [nn.Parameter(torch.ones(1))])
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_it_goes_over_to_another_optimizer_with_its_state():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    first, second = (torch.optim.Adam(model.parameters(), 0.1) for _ in range(2))
    joined = Joined(first, [extra], ["one"])
    step(first, model, extra)
    kept = first.state[extra]["exp_avg"].clone()
    assert joined.moved(first) is joined
    moved = joined.moved(second)
    assert len(first.param_groups[0]["params"]) == 2 and extra not in first.state
    assert torch.equal(second.state[extra]["exp_avg"], kept) and moved.owners == ["one"]
    moved.leave()


def test_what_is_saved_and_loaded_is_copied():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    joined = Joined(optimizer, [extra])
    step(optimizer, model, extra)
    state = joined.state_dict()
    before = copy.deepcopy(state)
    joined.load_state_dict(state)
    step(optimizer, model, extra)
    for name, value in before["states"][0].items():
        assert torch.equal(state["states"][0][name], value)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_further_parameters_come_and_those_that_are_there_keep_their_state(make):
    model, first, second = layer(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make(list(model.parameters()))
    joined = Joined(optimizer, [first], ["one"])
    step(optimizer, model, first)
    before, value = copy.deepcopy(joined.state_dict()["states"][0]), first.detach().clone()
    joined = joined.extended([second], ["two"])
    state = joined.state_dict()
    assert state["owners"] == ["one", "two"] and state["states"][1] == {}
    assert all(torch.equal(torch.as_tensor(state["states"][0][n]), torch.as_tensor(v)) for n, v in before.items())
    step(optimizer, model, first + second)
    assert (first < value).all() and (second < 1).all()
    joined.leave()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert first not in innermost(optimizer).state and second not in innermost(optimizer).state


def test_further_parameters_that_are_there_already_are_refused_and_nothing_changes():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    joined = Joined(optimizer, [extra])
    step(optimizer, model, extra)
    before = joined.state_dict()["states"][0]
    for twice in (extra, model.weight):
        with pytest.raises(ValueError, match="parameters to train must be new to the optimizer, got one of shape"):
            joined.extended([twice], ["two"])
    assert len(optimizer.param_groups[0]["params"]) == 3
    assert torch.equal(optimizer.state[extra]["exp_avg"], before["exp_avg"])
    joined.leave()


@pytest.mark.parametrize("leaves", [0, 1])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_two_loops_have_joined_is_left_out_of_the_file_and_stays_when_it_is_loaded(make, leaves):
    """Two callbacks of one training have a loop each."""
    model, extras = layer(), [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = make(list(model.parameters()))
    bare = copy.deepcopy(optimizer.state_dict())
    both = [Joined(optimizer, [extra]) for extra in extras]
    step(optimizer, model, extras[0] + extras[1])
    kept = [one.state_dict()["states"][0] for one in both]
    for left in (both, [both[1 - leaves]]):
        if left is not both:
            both[leaves].leave()
        state = optimizer.state_dict()
        groups = state.get("param_groups", [])
        assert [group["params"] for group in groups] == [group["params"] for group in bare.get("param_groups", [])]
        assert len(state["state"]) <= 2
        optimizer.load_state_dict(copy.deepcopy(state))
        for one in left:
            own, before = one.state_dict()["states"][0], kept[both.index(one)]
            assert all(torch.equal(torch.as_tensor(own[n]), torch.as_tensor(x)) for n, x in before.items())
    both[1 - leaves].leave()
    assert "state_dict" not in vars(innermost(optimizer))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_gradients_that_a_skipped_step_has_left_are_cleared_and_those_of_a_batch_before_stay():
    model, extra = layer(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    joined = Joined(optimizer, [extra])
    extra.grad = torch.full((2,), float("inf"))
    joined.clear_left_over(torch.ones(()))
    assert extra.grad is None
    (model(torch.ones(1, 3)).sum() + extra.sum()).backward()
    joined.clear_left_over(torch.ones(()))
    assert torch.equal(extra.grad, torch.ones(2))
    joined.leave()
