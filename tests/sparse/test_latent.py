"""Latent weights: the optimizer has them during its step, everybody else sees those that follow from them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Fit, Loop, Participant
from fasterai.core.types import Target
from fasterai.model.targets import all_targets
from fasterai.sparse.latent import LatentWeights


class Rounded(LatentWeights):
    """Shows weights rounded to whole numbers; gradients of weights that show 0 are doubled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.targets = model, tuple(all_targets(model))

    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        latent = weight.clone() if kept is None else kept.copy_(weight)
        weight.round_()
        return latent

    def pull_(self, target: Target, gradient: Tensor, kept: Tensor) -> None:
        gradient[kept.round() == 0] *= 2


def layer() -> nn.Linear:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, 1.2]]))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on the sum of both weights' products with (1, 2), whose gradient is (1, 2)."""
    optimizer.zero_grad()
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()


def test_two_steps_with_momentum_by_hand():
    """Shown (0, 1), gradients (2, 2): velocities (2, 2), then 0.5 (2, 2) + (2, 2) = (3, 3); lr 0.25."""
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.25, momentum=0.5)
    rounded = Rounded(model)
    handle = attach(optimizer, rounded, total_steps=2, model=model)
    step(model, optimizer)
    torch.testing.assert_close(rounded.latent["weight"], torch.tensor([[-0.2, 0.7]]))
    assert model.weight.tolist() == [[-0.0, 1.0]]
    step(model, optimizer)  # -0.2 shows 0 still: gradients (2, 2), velocities (3, 3)
    torch.testing.assert_close(rounded.latent["weight"], torch.tensor([[-0.95, -0.05]]))
    assert model.weight.tolist() == [[-1.0, -0.0]]
    handle.remove()


def test_the_model_shows_what_follows_between_two_steps_and_holds_latent_weights_within():
    model = layer()
    rounded = Rounded(model)
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    assert model.weight.tolist() == [[0.0, 1.0]]
    model.weight.grad = torch.zeros(1, 2)
    rounded.before_step(1.0)
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.3, 1.2]]))
    torch.testing.assert_close(rounded.latent["weight"], model.weight.data)
    rounded.on_fit_end(completed=False)  # the step has failed
    assert model.weight.tolist() == [[0.0, 1.0]]


def test_a_weight_without_gradient_is_shown_and_left_alone():
    model = layer()
    rounded = Rounded(model)
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    rounded.before_step(1.0)
    assert model.weight.tolist() == [[0.0, 1.0]]


def test_a_second_run_goes_on_from_the_latent_weights_and_forgets_those_of_other_weights():
    model = layer()
    rounded = Rounded(model)
    for _ in range(2):
        rounded.on_fit_start(Fit(total_steps=1, model=model))
        torch.testing.assert_close(rounded.latent["weight"], torch.tensor([[0.3, 1.2]]))
        rounded.on_fit_end(completed=True)
    with torch.no_grad():
        model.weight.fill_(2.4)
    with pytest.warns(UserWarning, match="other weights than it showed last"):
        rounded.on_fit_start(Fit(total_steps=1, model=model))
    torch.testing.assert_close(rounded.latent["weight"], torch.full((1, 2), 2.4))
    rounded.forget_latent()
    assert rounded.latent == {} and model.weight.tolist() == [[2.0, 2.0]]


def test_a_saved_state_brings_both_back_and_goes_on_bit_for_bit():
    def run(steps: int, state: dict | None = None) -> tuple[nn.Linear, Rounded, dict]:
        model = layer()
        optimizer = torch.optim.Adam(model.parameters(), 0.4)
        rounded = Rounded(model)
        handle = attach(optimizer, rounded, total_steps=4, model=model)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            handle.load_state_dict(state["handle"])
            torch.testing.assert_close(model.weight.data, state["model"]["weight"], rtol=0, atol=0)
        for _ in range(steps):
            step(model, optimizer)
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
        return model, rounded, copy.deepcopy(parts)

    whole, latent, _ = run(4)
    _, _, half = run(2)
    resumed, again, _ = run(2, half)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(latent.latent["weight"], again.latent["weight"])


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "without latent"),
        ({"latent": {"weight": torch.zeros(1, 3)}}, r"weight of shape \(1, 3\), here \(1, 2\)"),
        ({"latent": {"other": torch.zeros(1, 2)}}, "weight of shape missing"),
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(saved: dict, message: str):
    model = layer()
    rounded = Rounded(model)
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    with pytest.raises(ValueError, match=message):
        rounded.load_state_dict(saved)
    torch.testing.assert_close(rounded.latent["weight"], torch.tensor([[0.3, 1.2]]))


def test_latent_weights_follow_a_cut():
    model = nn.Linear(3, 2, bias=False)
    rounded = Rounded(model)
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    latent = rounded.latent["weight"]
    kept = [0, 2]
    model.weight.data = model.weight.data[:, kept]
    rounded.after_cut({("weight", 1): torch.tensor(kept).numpy()})
    torch.testing.assert_close(rounded.latent["weight"], latent[:, kept])


def begun(model: nn.Module, steps: int = 1, **options) -> Rounded:
    rounded = Rounded(model)
    rounded.on_fit_start(Fit(total_steps=steps, model=model, **options))
    return rounded


def close(tensor: Tensor, *rows: list[float]) -> None:
    torch.testing.assert_close(tensor.detach(), torch.tensor(rows))


def test_two_methods_with_latent_weights_of_one_parameter_are_refused_before_anything_changes():
    model = nn.Sequential(layer(), nn.Linear(1, 1))
    first, second, apart = Rounded(model), Rounded(model), Rounded(model)
    second.targets, apart.targets = first.targets[:1], first.targets[1:]
    first.targets = first.targets[:1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"targets must be others than those of Rounded, .* got 0\.weight in Rounded too"):
        attach(optimizer, first, second, total_steps=1)
    close(model[0].weight, [0.3, 1.2])
    handle = attach(optimizer, first, apart, total_steps=1)
    with pytest.raises(ValueError, match="or end the other run"):
        attach(torch.optim.SGD(model.parameters(), 0.1), second, total_steps=1)
    handle.remove(completed=False)
    attach(optimizer, second, total_steps=1).remove(completed=False)


@pytest.mark.parametrize("order", ["before", "behind", "in another loop"])
def test_after_a_step_every_participant_sees_the_shown_weights(order):
    """The gradient is (2, 2) and the rate 0.25: latent (-0.2, 0.7), shown (0, 1)."""

    class Looks(Participant):
        seen: Any = None

        def after_step(self, position: float) -> None:
            self.seen = model.weight.tolist()

    model = layer()
    optimizer, looks, rounded = torch.optim.SGD(model.parameters(), 0.25), Looks(), Rounded(model)
    first = Loop([looks] if order == "in another loop" else [looks, rounded] if order == "before" else [rounded, looks])
    loops = [first, *([Loop([rounded])] if order == "in another loop" else [])]
    for loop in loops:
        loop.start(Fit(total_steps=1, model=model, optimizer=optimizer))
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    for event in ("after_backward", "before_step"):
        for loop in loops:
            getattr(loop, event)()
    optimizer.step()
    for loop in loops:
        loop.after_step()
    assert looks.seen == [[-0.0, 1.0]]
    close(rounded.latent["weight"], [-0.2, 0.7])
    for loop in loops:
        loop.end(completed=True)


def test_what_others_write_between_two_steps_is_latent_where_it_changes_something():
    """A second weight that others set to 3.4, and that shows 3 from then on; the first one goes on from 0.3."""
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    rounded = Rounded(model)
    with attach(optimizer, rounded, total_steps=2):
        step(model, optimizer)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.0, 3.4]]))
        close(rounded.latent["weight"], [0.3, 3.4])
        assert model.weight.tolist() == [[0.0, 3.0]]
        with torch.no_grad():
            model.weight[0, 0] = 1.9
        step(model, optimizer)
        close(rounded.latent["weight"], [1.9, 3.4])
    assert model.weight.tolist() == [[2.0, 3.0]]


def test_weights_that_are_swapped_and_put_back_leave_the_latent_ones_alone():
    model = layer()
    rounded = begun(model)
    with torch.no_grad():
        before = model.weight.clone()
        model.weight.fill_(7.0)
        model.weight.copy_(before)
    close(rounded.latent["weight"], [0.3, 1.2])


def test_what_others_write_at_the_last_step_is_shown_as_well():
    model = layer()
    rounded = begun(model)
    with torch.no_grad():
        model.weight[0, 0] = 5.3
    rounded.on_fit_end(completed=True)
    assert model.weight.tolist() == [[5.0, 1.0]]


def test_a_run_that_takes_no_step_leaves_the_weights_of_before():
    model = layer()
    begun(model).on_fit_end(completed=False)
    close(model.weight, [0.3, 1.2])
    rounded = begun(model)
    rounded.on_fit_end(completed=True)  # a run without steps that is said to be complete
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    rounded.on_fit_end(completed=False)  # nor does a second one undo the first
    assert model.weight.tolist() == [[0.0, 1.0]]


def test_a_run_that_another_participant_refuses_leaves_the_weights_of_before():
    class Refuses(Participant):
        def on_fit_start(self, fit: Fit) -> None:
            raise ValueError("no")

    model = layer()
    with pytest.raises(ValueError, match="no"):
        attach(torch.optim.SGD(model.parameters(), 0.1), Rounded(model), Refuses(), total_steps=1)
    close(model.weight, [0.3, 1.2])


def test_a_start_that_fails_in_the_middle_leaves_all_weights_as_they_were():
    class Fails(Rounded):
        def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
            if target.name == "1.weight":
                raise ValueError("not this one")
            return super().show_(target, weight, kept)

    model = nn.Sequential(layer(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="not this one"):
        Fails(model).on_fit_start(Fit(total_steps=1, model=model))
    close(model[0].weight, [0.3, 1.2])


def test_latent_weights_go_along_to_another_precision():
    model = layer()
    rounded = begun(model)
    rounded.on_fit_end(completed=True)
    model.double()
    rounded.on_fit_start(Fit(total_steps=1, model=model))
    assert rounded.latent["weight"].dtype is torch.float64
    close(rounded.latent["weight"].float(), [0.3, 1.2])


def test_a_layer_that_another_one_has_replaced_is_refused():
    model = nn.Sequential(layer())
    rounded = Rounded(model)
    model[0] = layer()
    with pytest.raises(ValueError, match=r"model must hold the weights that Rounded was made for, got another 0\.weight"):
        rounded.on_fit_start(Fit(total_steps=1, model=model))
    close(model[0].weight, [0.3, 1.2])


def test_of_several_optimizers_the_one_under_way_has_its_own_latent_weights_and_gradients():
    model = nn.Sequential(layer(), nn.Linear(1, 1, bias=False))
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in model]
    turn = []
    rounded = begun(model, optimizer=optimizers, stepping=lambda: turn[-1])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    turn.append(optimizers[0])
    rounded.after_backward()
    rounded.before_step(1.0)
    close(model[0].weight, [0.3, 1.2])
    assert model[0].weight.grad.tolist() == [[2.0, 1.0]] and model[1].weight.grad.tolist() == [[1.0]]
    assert torch.equal(model[1].weight, model[1].weight.round())
    rounded.after_step(1.0)
    turn.append(optimizers[1])
    rounded.after_backward()
    assert model[0].weight.grad.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_midst_of_a_run_is_of_its_own_model(again):
    model = layer()
    rounded = begun(model, stepping=lambda: None)
    other = again(rounded)
    close(other.latent["weight"], [0.3, 1.2])
    other.forget_latent()
    close(rounded.latent["weight"], [0.3, 1.2])


def test_an_optimizer_of_another_model_is_refused():
    rounded, other = Rounded(layer()), layer()
    with pytest.raises(ValueError, match="optimizer must train the targets of the model"):
        rounded.on_fit_start(Fit(total_steps=1, optimizer=torch.optim.SGD(other.parameters(), 0.1)))
