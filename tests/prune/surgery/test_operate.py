from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastai.optimizer import Adam as FastaiAdam
from torch import Tensor, nn

import fasterai.prune.surgery.operate as surgery
from fasterai.graph.channels import channel_graph
from fasterai.prune.surgery.operate import Surgery, apply_plan_, operate
from fasterai.prune.surgery.plan import Plan, make_plan


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
KEEP = np.array([True, False, True, False])


def plan_for(net: nn.Module) -> Plan:
    graph = channel_graph(net, (X,))
    assert len(graph.groups) == 1
    return make_plan(net, graph, [KEEP])


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fastai": lambda p: FastaiAdam(p, lr=0.01),
}


def train(net: nn.Module, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        net(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def picture(net: nn.Module, optimizer: Any) -> list[Any]:
    """Everything that a rollback has to bring back: tensors and whose they are."""
    state = {
        id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()} for p in net.parameters()
    }
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int | tuple | str)} for m in net.modules()]
    parameters = [(id(p), p.detach().clone(), None if p.grad is None else p.grad.clone(), p.stride()) for p in net.parameters()]
    return [{n: t.clone() for n, t in net.state_dict().items()}, state, numbers, parameters, [id(m) for m in net.modules()]]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_and_the_optimizers_state_are_cut_alike(kind: str) -> None:
    net = small_net()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    train(net, optimizer)
    plan, before, identities = plan_for(net), copy.deepcopy(net.state_dict()), [id(p) for p in net.parameters()]
    first = net[0].weight
    state = {k: v.clone() for k, v in optimizer.state[first].items() if isinstance(v, Tensor) and v.shape == first.shape}
    assert state
    Surgery(net, plan, optimizer)
    assert [id(p) for p in net.parameters()] == identities
    assert torch.equal(net[0].weight, before["0.weight"][[0, 2]])
    assert torch.equal(net[0].bias, before["0.bias"][[0, 2]])
    assert torch.equal(net[1].running_mean, before["1.running_mean"][[0, 2]])
    assert torch.equal(net[3].weight, before["3.weight"][:, [0, 2]])
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels, net[3].out_channels) == (2, 2, 2, 2)
    for key, value in state.items():
        assert torch.equal(optimizer.state[first][key], value[[0, 2]])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_it_would_with_silent_channels(kind: str) -> None:
    """The two channels that stay get the very steps that they get in the whole network whose others are held at zero."""
    net = small_net().eval()
    plan = plan_for(net)

    def silence(model: nn.Module) -> None:
        with torch.no_grad():
            for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
                tensor[[1, 3]] = 0
            model[3].weight[:, [1, 3]] = 0

    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    silence(net)
    train(net, optimizer, 1)
    silence(net)
    whole = copy.deepcopy(net)
    whole_optimizer = OPTIMIZERS[kind](list(whole.parameters()))
    if kind == "fastai":
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            whole_optimizer.state[q] = copy.deepcopy(optimizer.state[p])
    else:
        whole_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    Surgery(net, plan, optimizer)
    for _ in range(3):
        train(net, optimizer, 1)
        train(whole, whole_optimizer, 1)
        silence(whole)
    torch.testing.assert_close(net[0].weight, whole[0].weight[[0, 2]])
    torch.testing.assert_close(net[3].weight, whole[3].weight[:, [0, 2]])
    torch.testing.assert_close(net(X), whole(X))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_undo_brings_everything_back(kind: str) -> None:
    net = small_net()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    train(net, optimizer)
    net(X).sum().backward()
    plan = plan_for(net)
    before = picture(net, optimizer)
    done = Surgery(net, plan, optimizer)
    assert not same(before, picture(net, optimizer))
    done.undo()
    assert same(before, picture(net, optimizer))
    done.undo()
    assert same(before, picture(net, optimizer))


def test_gradients_are_cut_alike() -> None:
    net = small_net()
    net(X).sum().backward()
    gradient = net[0].weight.grad.clone()
    Surgery(net, plan_for(net))
    assert torch.equal(net[0].weight.grad, gradient[[0, 2]])


def test_what_a_parameter_and_a_module_are_like_stays() -> None:
    net = small_net().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    net[0].eval()
    net[1].note = "mine"
    calls: list[str] = []
    net[0].register_forward_hook(lambda *_: calls.append("module"))
    net[3].weight.register_hook(lambda g: calls.append(f"gradient {tuple(g.shape)}"))
    net[3].weight.register_post_accumulate_grad_hook(lambda p: calls.append(f"accumulated {tuple(p.grad.shape)}"))
    net(X).sum().backward()
    net.zero_grad()
    calls.clear()
    Surgery(net, plan_for(net))
    calls.clear()
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert [m.training for m in net.children()] == [False, True, True, True, True, True]
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[1].note == "mine"
    net(X).sum().backward()
    assert calls == ["module", "gradient (2, 2, 1, 1)", "accumulated (2, 2, 1, 1)"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_stays(dtype: torch.dtype) -> None:
    net = small_net()
    plan = plan_for(net)
    Surgery(net.to(dtype), plan)
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_attention_is_replaced_and_put_back() -> None:
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    net = nn.ModuleDict({"a": attention})
    rows = np.array([0, 1, 4, 5])
    in_rows = np.concatenate([rows, rows + 8, rows + 16])
    plan = Plan(
        {"a.in_proj_weight": (24, 8), "a.in_proj_bias": (24,), "a.out_proj.weight": (8, 8)},
        {("a.in_proj_weight", 0): in_rows, ("a.in_proj_bias", 0): in_rows, ("a.out_proj.weight", 1): rows},
        (("a.out_proj", "in_features", 8, 4),),
        {"a": 2},
    )
    done = Surgery(net, plan)
    assert (type(net["a"]).__name__, net["a"].num_heads, net["a"].out_proj.in_features) == ("SlimMultiheadAttention", 2, 4)
    x = torch.randn(2, 3, 8)
    assert net["a"](x, x, x)[0].shape == (2, 3, 8)
    done.undo()
    assert net["a"] is attention
    assert (attention.num_heads, attention.in_proj_weight.shape) == (4, (24, 8))


def test_a_plan_for_another_model_is_refused_by_name() -> None:
    plan = plan_for(small_net())
    other = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"plan must be for this model, got one where 0.weight is \(4, 3, 3, 3\), here \(2, 3\)"
    ):
        Surgery(other, plan)
    with pytest.raises(ValueError, match=r"plan must be for this model, got one that cuts 0\.weight, which is missing here"):
        Surgery(nn.ModuleDict({"a": nn.Linear(3, 2)}), plan)
    assert same(before, dict(other.state_dict()))


def test_a_surgery_that_fails_on_the_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](list(net.parameters()))
    train(net, optimizer)
    plan = plan_for(net)
    before = picture(net, optimizer)

    def fail(*_: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(surgery, "_set", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        Surgery(net, plan, optimizer)
    assert same(before, picture(net, optimizer))


def test_a_surgery_that_is_interrupted_in_a_change_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    plan, put, optimizer = plan_for(net), surgery._put, OPTIMIZERS["sgd"](list(net.parameters()))
    before = picture(net, optimizer)

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        put(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Surgery(net, plan, optimizer)
    assert same(before, picture(net, optimizer))


def test_what_was_undone_is_done_again_without_cutting_anew() -> None:
    net = small_net()
    optimizer = OPTIMIZERS["adam"](list(net.parameters()))
    train(net, optimizer)
    done = Surgery(net, plan_for(net), optimizer)
    small, addresses = picture(net, optimizer), [p.data_ptr() for p in net.parameters()]
    with done.undone():
        assert net[0].weight.shape == (4, 3, 3, 3)
    assert same(small, picture(net, optimizer))
    assert [p.data_ptr() for p in net.parameters()] == addresses
    done.redo()
    assert same(small, picture(net, optimizer))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loss_that_is_still_held_does_not_stand_in_the_way_of_training(kind: str) -> None:
    """It keeps alive what gathers the gradients, with the shapes that they had."""
    net = small_net()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    loss = net(X).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    Surgery(net, plan_for(net), optimizer)
    train(net, optimizer)
    assert loss.grad_fn is not None
    assert net[0].weight.shape == (2, 3, 3, 3)


def test_buffers_that_two_modules_share_stay_shared() -> None:
    net = nn.Sequential(*small_net(), nn.Identity())
    net[-1].register_buffer("mean", net[1].running_mean)
    Surgery(net, plan_for(net))
    assert net[-1].mean is net[1].running_mean
    assert net[1].running_mean.shape == (2,)


def test_attention_that_two_modules_share_stays_shared() -> None:
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    net = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])})
    rows = np.array([0, 1, 4, 5])
    in_rows = np.concatenate([rows, rows + 8, rows + 16])
    keep = {("a.in_proj_weight", 0): in_rows, ("a.in_proj_bias", 0): in_rows, ("a.out_proj.weight", 1): rows}
    shapes = {"a.in_proj_weight": (24, 8), "a.in_proj_bias": (24,), "a.out_proj.weight": (8, 8)}
    done = Surgery(net, Plan(shapes, keep, (("a.out_proj", "in_features", 8, 4),), {"a": 2}))
    assert net["a"] is net["b"][0] is not attention
    done.undo()
    assert net["a"] is net["b"][0] is attention


def test_weights_that_make_up_for_what_went_are_scaled_and_put_back() -> None:
    net = small_net()
    plan = replace(plan_for(net), scales={"1.weight": 1.5})
    before = net[1].weight.detach().clone()
    done = Surgery(net, plan)
    assert net[1].weight.tolist() == [1.5, 1.5]
    done.undo()
    assert torch.equal(net[1].weight, before)
    done.redo()
    assert net[1].weight.tolist() == [1.5, 1.5]


# --- copies ------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_carried_out_on_a_moving_average() -> None:
    net = small_net()
    average = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    average.update_parameters(net)
    optimizer = OPTIMIZERS["adam"](list(average.module.parameters()))
    plan, whole = plan_for(net), average.module[0].weight.detach().clone()
    Surgery(net, plan)
    apply_plan_(average, plan, optimizer=optimizer)
    assert torch.equal(average.module[0].weight, whole[[0, 2]])
    average.update_parameters(net)
    assert average(X).shape == (2, 2)


def test_either_all_copies_are_cut_or_none() -> None:
    net, twin, other = small_net(), small_net(), nn.Sequential(nn.Linear(3, 2))
    plan, optimizer = plan_for(net), OPTIMIZERS["adam"](list(net.parameters()))
    train(net, optimizer)
    before = picture(net, optimizer), copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=r"copies must be models of the same structure, got copies\[1\] where plan must be"):
        operate(net, plan, optimizer, [twin, other])
    assert same(before, (picture(net, optimizer), dict(twin.state_dict())))
    operate(net, plan, optimizer, [twin])
    assert twin[0].weight.shape == net[0].weight.shape == (2, 3, 3, 3)


PLANS: dict[str, tuple[Any, str]] = {
    "carried out": (lambda p: p, r"where 0\.weight is \(4, 3, 3, 3\), here \(2, 3, 3, 3\)"),
    "indices": (lambda p: replace(p, keep={("0.weight", 0): np.array([0, 4])}), r"that keeps indices of 0\.weight which do"),
    "no indices": (lambda p: replace(p, keep={("0.weight", 0): np.array([], int)}), r"that keeps indices of 0\.weight which"),
    "a dimension": (lambda p: replace(p, keep={("0.bias", 1): np.array([0])}), r"that keeps indices of 0\.bias which do not"),
    "no module": (lambda p: replace(p, attributes=(("9", "width", 4, 2),)), r"that sets 9\.width, which is missing here"),
    "a number": (lambda p: replace(p, attributes=(("0", "groups", 4, 2),)), r"where 0\.groups is 4, here 1"),
    "heads": (lambda p: replace(p, slim={"0": 2}), r"that takes heads from 0, which is no nn\.MultiheadAttention here"),
    "own heads": (lambda p: replace(p, slim={"": 2}), r"that takes heads from the model itself; put the attention into"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_plans_that_do_not_fit_are_refused_before_anything_changes(kind: str) -> None:
    change, match = PLANS[kind]
    net = small_net()
    plan = change(plan_for(net))
    if kind == "carried out":
        Surgery(net, plan)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"plan must be for this model, got one {match}"):
        apply_plan_(net, plan)
    assert same(dict(before), dict(net.state_dict()))
