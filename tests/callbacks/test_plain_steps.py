"""Steps of a loop of your own that are more than `optimizer.step()`: closures, fused optimizers with a scaler, none at all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.sparse.sparsifier import Sparsifier

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Notes(Participant):
    """Writes down events, and the norms of the gradients."""

    def __init__(self) -> None:
        self.seen = ""
        self.norms: list[float] = []

    def on_fit_start(self, fit) -> None:
        self.model = fit.model

    def after_loss(self, loss, batch) -> Tensor:
        self.seen += "l"
        return loss * 2

    def after_backward(self) -> None:
        self.seen += "b"
        self.norms.append(float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()))

    def before_step(self, position) -> None:
        self.seen += "s"

    def after_step(self, position) -> None:
        self.seen += "a"


class Trains(Notes):
    """Has a parameter of its own in the loss."""

    def on_setup(self, model):
        self.own = nn.Parameter(torch.zeros(3))
        return [self.own]

    def after_loss(self, loss, batch) -> Tensor:
        return super().after_loss(loss, batch) + (self.own - 1).square().sum()


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def loss_of(model, handle) -> Tensor:
    outputs = model(X)
    return handle.loss(F.cross_entropy(outputs, Y), X, Y, outputs)


def closure_of(model, optimizer, handle):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, handle)
        loss.backward()
        return loss

    return closure


def test_a_closure_s_gradients_are_complete_when_they_are_shown():
    model, alone = layer(), layer()
    optimizer, bare = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(alone.parameters(), 0.2)
    notes = Notes()
    with attach(optimizer, notes, total_steps=2, model=model) as handle:
        optimizer.step(closure_of(model, optimizer, handle))
        returned = optimizer.step(closure=closure_of(model, optimizer, handle))
    for _ in range(2):
        bare.zero_grad()
        F.cross_entropy(alone(X), Y).backward()
        norm = float(torch.cat([p.grad.flatten() for p in alone.parameters()]).norm())
        assert notes.norms.pop(0) == pytest.approx(2 * norm)
        bare.step()
    assert notes.seen == "lbsalbsa" and returned.item() > 0
    torch.testing.assert_close(model.weight, alone.weight)


def test_an_optimizer_may_call_its_closure_again():
    model, notes = layer(), Notes()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    with attach(optimizer, notes, total_steps=2, model=model) as handle:
        for _ in range(2):
            optimizer.step(closure_of(model, optimizer, handle))
    assert notes.seen == "lbslbslbsa" * 2


def test_a_step_too_many_is_refused_before_its_closure_is_called():
    model, notes = layer(), Notes()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, notes, total_steps=1, model=model)
    optimizer.step(closure_of(model, optimizer, handle))
    with pytest.raises(ValueError, match="total_steps must be at least the number of steps taken"):
        optimizer.step(closure_of(model, optimizer, handle))
    assert notes.seen == "lbsa"
    handle.remove()


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_skipped_steps_are_none(fused):
    model, notes = layer(), Trains()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with attach(optimizer, notes, total_steps=3, model=model) as handle:
        norms = []
        for factor in (1.0, float("inf"), 1.0):
            loss = loss_of(model, handle)
            norms.append(float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]).norm()))
            scaler.scale(loss_of(model, handle) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            if fused and factor > 1:
                assert notes.own.grad is None  # the loop need not know of it
            optimizer.zero_grad()
        assert handle.loop.step == 2
        handle.remove(completed=True)
    assert notes.seen == "llbsallllbsa"
    assert notes.norms == pytest.approx([norms[0], norms[2]], rel=1e-5)
    assert not torch.isnan(model.weight).any() and not torch.isnan(notes.own).any()


def test_a_run_that_never_steps_is_said():
    optimizer = torch.optim.SGD(layer().parameters(), 0.1)
    handle = attach(optimizer, Notes(), total_steps=2, model=layer())
    with pytest.warns(UserWarning, match=r"ends without a step of its optimizer.* base_optimizer"):
        handle.remove()


def test_an_error_of_the_loop_s_own_is_all_that_is_said():
    optimizer = torch.optim.SGD(layer().parameters(), 0.1)

    def fails():
        with attach(optimizer, Notes(), total_steps=2, model=layer()):
            raise KeyError("own")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(KeyError):
            fails()


def test_each_step_has_gradients_to_look_at_whoever_tells_of_them():
    """A loop that clips some of its steps only."""
    model, notes = layer(), Notes()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, notes, total_steps=3, model=model) as handle:
        for clips in (True, False, True):
            loss_of(model, handle).backward()
            if clips:
                handle.after_backward()
            optimizer.step()
            optimizer.zero_grad()
    assert notes.seen == "lbsa" * 3


# --- overflows at moves -------------------------------------------------------------------------------------------------


def overflowing(bad, total=6, criteria="taylor"):
    """Train with gradients that are infinite at some steps, which the optimizer leaves out of its step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, "weight", "global", criteria, sparsity=0.5, schedule="lin")
    reached = []
    with attach(optimizer, sparsifier, total_steps=total):
        for k in range(total):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).square().sum().backward()
            if k in bad:
                model.weight.grad[0, 0] = float("inf")
            optimizer.param_groups[0]["lr"] = 0.0 if k in bad else 0.1
            kept = model.weight.detach().clone()
            optimizer.step()
            if k in bad:  # 0 times infinity
                with torch.no_grad():
                    model.weight.copy_(kept)
                    sparsifier.apply_masks()
            reached.append(round(20 * sparsifier.sparsity.overall))
    return reached


def test_an_overflow_at_a_move_is_waited_out():
    assert overflowing(()) == [2, 3, 5, 7, 8, 10]
    assert overflowing((1, 3)) == [2, 2, 5, 5, 8, 10]


def test_an_overflow_that_never_ends_is_said_at_the_end():
    with pytest.warns(UserWarning, match=r"at sparsity 0\.0000 \(criteria needs finite gradients, and weight has one"):
        assert overflowing(range(6)) == [0] * 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_steps_does_not_end_the_run(fused):
    torch.manual_seed(0)
    model = nn.Linear(4, 5)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sparsifier = Sparsifier(model, "weight", "global", "taylor", sparsity=0.5, schedule="lin")
    with attach(optimizer, sparsifier, total_steps=6) as handle:
        for k in range(8):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 4)).square().sum() * (float("inf") if k in (2, 5) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert handle.loop.step == 6 and sparsifier.sparsity.overall == 0.5
