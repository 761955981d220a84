from __future__ import annotations

import copy
import pickle
from typing import Any

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Batch, Fit, Loop
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
from fasterai.regularize.regularizer import Regularizer
from fasterai.sparse.sparsifier import Sparsifier

mpl.use("agg")
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1] * 4)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def regularizer(model: nn.Module, granularity: Any = "coupled", **options: Any) -> Regularizer:
    return Regularizer(model, granularity=granularity, example_inputs=X[:2], **options)


def train(model: nn.Module, made: Any, steps: int, optimizer: Any = None, **options: Any) -> Any:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = attach(optimizer, *made, total_steps=steps, model=model, **options) if made else None
    go_on(model, optimizer, handle, steps)
    if handle is not None:
        handle.remove()
    return optimizer


def go_on(model: nn.Module, optimizer: Any, handle: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(X)
        loss = F.cross_entropy(outputs, Y)
        (loss if handle is None else handle.loss(loss, X, Y, outputs)).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def written(model: nn.Sequential, penalty: str) -> Tensor:
    """The formula for filters of the two convolutions, without the library."""
    total: Any = 0
    for conv, norm in ((model[0], model[1]), (model[3], model[4])):
        rows = conv.weight.flatten(1)
        lengths = rows.square().sum(1).sqrt()
        if penalty == "l1":
            total = total + rows.abs().sum() / rows.shape[1]
        elif penalty == "group_lasso":
            total = total + rows.shape[1] ** 0.5 * lengths.sum()
        elif penalty == "growing":
            behind = ((lengths.max() - lengths) / (lengths.max() - lengths.min())).detach()
            total = total + (16**behind * rows.square().sum(1)).sum() / 2
        else:
            total = total + norm.weight.abs().sum()
    return total


@pytest.mark.parametrize("penalty", ["l1", "group_lasso", "growing", "slimming"])
def test_in_the_loss_and_as_a_gradient_it_is_the_written_formula(penalty):
    plain, in_loss, as_gradient = network(), network(), network()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    (F.cross_entropy(plain(X), Y) + 0.3 * written(plain, penalty)).backward()
    optimizer.step()
    for model, how in ((in_loss, "loss"), (as_gradient, "gradient")):
        made = regularizer(model, "filter", weight=0.3, penalty=penalty, how=how)
        train(model, [made], 1, torch.optim.SGD(model.parameters(), 0.1))
        assert made.metrics() == {"regularization": pytest.approx(written(network(), penalty).item()), "strength": 0.3}
    for a, b, c in zip(plain.parameters(), in_loss.parameters(), as_gradient.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_proximal_step_follows_the_optimizers_with_the_rate_of_each_group(kind):
    plain, model = network(), network()

    def optimizer(of: nn.Sequential) -> Any:
        return kind([{"params": of[:3].parameters(), "lr": 0.2}, {"params": of[3:].parameters(), "lr": 0.05}])

    train(plain, [], 1, optimizer(plain))
    with torch.no_grad():
        for conv, rate in ((plain[0], 0.2), (plain[3], 0.05)):
            lengths = conv.weight.flatten(1).norm(dim=1)
            factor = (1 - rate * 0.4 * conv.weight[0].numel() ** 0.5 / lengths).clamp(min=0)
            conv.weight.mul_(factor.view(-1, 1, 1, 1))
    train(model, [regularizer(model, "filter", weight=0.4, penalty="group_lasso", how="proximal")], 1, optimizer(model))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_is_that_of_the_step_also_where_a_scheduler_comes_before_its_end():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.05))
    made = regularizer(model, "weight", weight=1.0, how="proximal")
    loop = Loop([made])
    loop.start(Fit(total_steps=1, model=model, optimizer=optimizer))
    before = copy.deepcopy(model[0].weight.detach())
    loop.before_step()
    optimizer.param_groups[0]["lr"].fill_(7.0)
    loop.after_step()
    torch.testing.assert_close(model[0].weight.detach(), F.softshrink(before, 0.05))


@pytest.mark.parametrize("how", ["gradient", "proximal"])
def test_of_several_optimizers_only_the_one_under_way_is_regularised(how):
    model = network()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model[:3], model[3:])]
    turn = [optimizers[0]]
    loop = Loop([regularizer(model, "weight", weight=1.0, how=how)])
    loop.start(Fit(total_steps=2, model=model, optimizer=optimizers, stepping=lambda: turn[-1]))
    before = [model[i].weight.detach().clone() for i in (0, 3)]

    def step() -> None:
        loop.after_backward()
        loop.before_step()
        turn[-1].step()
        loop.after_step()

    step()
    assert torch.equal(model[3].weight, before[1]) and model[3].weight.grad is None
    turn.append(optimizers[1])
    step()
    wanted = [F.softshrink(x, 0.1) if how == "proximal" else x - 0.1 * x.sign() for x in before]
    torch.testing.assert_close([model[0].weight.detach(), model[3].weight.detach()], wanted)


def test_the_loss_itself_is_left_as_it_is():
    model = network()
    made = regularizer(model, "weight", weight=0.5)
    loss = (F.cross_entropy(model(X), Y) + 1).sqrt()  # its backward pass reads its own result
    value = loss.item()
    changed = made.after_loss(loss, Batch())
    assert loss.item() == value and changed.item() == pytest.approx(value + 0.5 * made.get_norm().item())
    changed.backward()
    half = made.after_loss(loss.detach().bfloat16(), Batch())
    assert half.dtype == torch.bfloat16


def test_accumulated_batches_add_the_penalty_once():
    whole, halves = network().eval(), network().eval()
    for model, k in ((whole, 1), (halves, 2)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(optimizer, regularizer(model, weight=0.1, penalty="growing"), total_steps=1, model=model) as handle:
            for x, y in zip(X.chunk(k), Y.chunk(k), strict=True):
                (handle.loss(F.cross_entropy(model(x), y), x, y) / k).backward()
            optimizer.step()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_criteria_granularities_and_the_schedule_matter():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    names = ("large_final", "squared_final", "movement", "mov_large_final")
    made = {name: Regularizer(model, name) for name in names}
    both = Regularizer(model, ["large_final", "squared_final"], ["weight", "row"])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0]]))  # it has moved by 1.5 in both
    by_hand = [3.0, 5.0, 3.0, 2 * 1.5 + 1 * 1.5]
    assert [made[name].get_norm().item() for name in names] == by_hand
    assert both.get_norm().item() == 3 + 5 + 3 / 2 + 5 / 2
    half = Regularizer(model, weight=0.2, schedule="lin")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with attach(optimizer, half, total_steps=4, model=model) as handle:
        seen = []
        for _ in range(4):
            seen.append(handle.loss(torch.zeros(()), (), ()).item())
            optimizer.step()
            seen.append(half.metrics())
    assert seen[::2] == pytest.approx([3 * 0.2 * share for share in (0.25, 0.5, 0.75, 1)])
    assert seen[-1] == {"regularization": 3.0, "strength": 0.2}


def test_silent_channels_go_without_any_further_choice():
    model = network()
    made = regularizer(model, weight=0.05, schedule="lin", penalty="group_lasso", how="proximal")
    train(model, [made], 60)
    model.eval()
    zeros = {name: int((model[i].weight.flatten(1) == 0).all(1).sum()) for i, name in ((0, "0.weight"), (3, "3.weight"))}
    assert 0 < sum(zeros.values()) < 10
    before = model(X)
    result = remove(model, X[:2], measure=False)
    gone = {name: result.removed.get(name, (0, 0)) for name in zeros}
    assert {name: n - m for name, (n, m) in gone.items()} == zeros
    torch.testing.assert_close(model(X), before)
    assert made.effect[0]["zero"][-1] == pytest.approx(sum(zeros.values()) / 10)


RESUMED = [("loss", "l1", "movement"), ("proximal", "group_lasso", "large_final")]


@pytest.mark.parametrize(("how", "penalty", "criteria"), RESUMED)
def test_a_resumed_run_is_the_same_bit_for_bit(how, penalty, criteria):
    options = {"weight": 0.02, "schedule": "cos", "penalty": penalty, "how": how, "criteria": criteria}
    whole, first, second = network(), network(), network(seed=1)
    ours = regularizer(whole, **options)
    train(whole, [ours], 6)
    optimizer = torch.optim.SGD(first.parameters(), 0.1, momentum=0.9)
    handle = attach(optimizer, regularizer(first, **options), total_steps=6, model=first)
    go_on(first, optimizer, handle, 2)
    saved = pickle.loads(pickle.dumps({"m": first.state_dict(), "o": optimizer.state_dict(), "h": handle.state_dict()}))
    handle.remove(completed=False)
    other = torch.optim.SGD(second.parameters(), 0.1, momentum=0.9)
    theirs = regularizer(second, **options)
    handle = attach(other, theirs, total_steps=6, model=second)
    second.load_state_dict(saved["m"])
    other.load_state_dict(saved["o"])
    handle.load_state_dict(saved["h"])
    go_on(second, other, handle, 4)
    handle.remove()
    assert same(whole, second)
    assert theirs.metrics() == ours.metrics() and len(theirs.effect[0]["zero"]) == 7
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict()["notes"], theirs.state_dict()["notes"], strict=True))


def test_a_copy_goes_its_own_way_and_cuts_are_followed():
    model = network()
    made = regularizer(model, criteria="movement", granularity=["coupled", "weight"])
    train(model, [made], 2)
    twin, theirs = copy.deepcopy((model, made))
    Pruner(twin, 0.5, "local", "large_final", example_inputs=X[:2], round_to=1).prune_model()
    assert theirs.model is twin and tuple(theirs.terms[0].initial["3.weight"].shape) == (2, 3, 3, 3)
    fresh = sum((w - theirs.terms[1].initial[n]).abs().sum() for n, w in twin.named_parameters() if w.dim() > 1)
    assert theirs.terms[1].value().item() == pytest.approx(fresh.item(), rel=1e-5)
    assert theirs.terms[0].value().item() < made.terms[0].value().item()
    train(twin, [theirs], 1)
    train(model, [made], 1)


def test_it_trains_beside_a_pruner_and_a_sparsifier():
    model = network()
    pruner = GradualPruner(model, 0.5, "local", "large_final", "lin", example_inputs=X[:2], round_to=1)
    made = regularizer(model, weight=0.001, penalty="group_lasso", how="proximal")
    train(model, [pruner, made], 4)
    assert model[3].weight.shape == (2, 3, 3, 3) and made.get_norm().isfinite()
    other = network()
    sparsifier = Sparsifier(other, "filter", sparsity=0.5, schedule="lin", example_inputs=X[:2])
    train(other, [regularizer(other, "filter", weight=0.01, penalty="group_lasso"), sparsifier], 4)
    assert sparsifier.sparsity.overall == 0.5 and all(p.isfinite().all() for p in other.parameters())


def test_frozen_weights_are_left_alone_and_a_run_of_nothing_else_is_told():
    model = network()
    made = regularizer(model, "filter", weight=0.1, how="proximal", penalty="group_lasso")
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, [made], 1, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    assert torch.equal(model[0].weight, before)
    model[3].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"nothing was regularised in this run: every target was frozen \(0.weight"):
        train(model, [made], 1)
    with pytest.raises(ValueError, match="optimizer must train the regularizer's model"):
        attach(torch.optim.SGD(network().parameters(), 0.1), made, total_steps=1, model=model)


def test_its_effect_has_a_picture():
    model = network()
    made = regularizer(model, ["filter", "coupled"], weight=0.05)
    with pytest.raises(ValueError, match="plot must come after a run of training"):
        made.plot()
    train(model, [made], 3)
    noted = made.effect
    assert [list(one) for one in noted] == [["position", "strength", "zero", "q0.05", "q0.25", "q0.50", "q0.75", "q0.95"]] * 2
    assert noted[0]["position"] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and noted[0]["q0.50"][-1] < noted[0]["q0.50"][0]
    rows = torch.cat([model[i].weight.detach().flatten(1).square().mean(1).sqrt() for i in (0, 3)])
    assert noted[0]["q0.50"][-1] == pytest.approx(rows.median().item() if len(rows) % 2 else rows.quantile(0.5).item())
    axes = made.plot()
    assert (
        axes.get_title("left") == "Filters" and axes.get_xlabel() == "position of the training" and len(axes.figure.axes) == 4
    )
    assert "zero" in str(made) and "<table>" in made._repr_html_()
    assert repr(made).startswith("<Regularizer: L1(large_final) of filters + L1(large_final) of channels, weight 0.05, in")


def test_a_state_of_another_regularizer_is_refused_and_changes_nothing():
    model = network()
    made = regularizer(model, criteria="movement")
    state = made.state_dict()
    other = regularizer(network(), ["filter", "coupled"], criteria="movement").state_dict()
    short = {**state, "initial": [{n: w[:1] for n, w in state["initial"][0].items()}]}
    for bad, kind, message in (
        ({}, ValueError, "state must be what Regularizer.state_dict"),
        ({**state, "step": -1}, ValueError, "state's step must be at least 0, got -1"),
        ({**state, "notes": [[1]]}, TypeError, "state's notes's entries must be a tensor"),
        ({**state, "notes": [torch.zeros(2, 3)]}, ValueError, "state's notes must be rows of 8 numbers"),
        (other, ValueError, "state must be of 1 term, got 2 in its notes"),
        (short, ValueError, "state must have the initial weight of 0.weight"),
    ):
        with pytest.raises(kind, match=message):
            made.load_state_dict(bad)
    made.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"state is of a Regularizer with other arguments, .* weight was 0.01 and is 0.5"):
        regularizer(model, criteria="movement", weight=0.5).load_state_dict(state)
