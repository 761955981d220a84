"""Straight-through training: the network computes with ternary weights, the optimizer trains the dense ones behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.misc.ternary.files import load_ternary, save_ternary
from fasterai.misc.ternary.ternarize import find_ternary, ternarize
from fasterai.misc.ternary.training import TernaryTraining


def vector() -> nn.Linear:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 1.0, 0.5]]))
    return model


def test_two_steps_with_momentum_by_hand():
    """Shown (3.5, -3.5, 0, 0); gradients (1, 1, 1, 8); lr 0.25: velocities (1, 1, 1, 8), then (1.5, 1.5, 1.5, 12)."""
    model, x = vector(), torch.tensor([[1.0, 1.0, 1.0, 8.0]])
    optimizer = torch.optim.SGD(model.parameters(), 0.25, momentum=0.5)
    training = TernaryTraining(model, targets="weight")
    outputs = []
    with attach(optimizer, training, total_steps=2, model=model):
        for _ in range(2):
            optimizer.zero_grad()
            outputs.append(model(x).sum())
            outputs[-1].backward()
            optimizer.step()
    # After one step (3.75, -3.25, 0.75, -1.5): P^2 / k is 14.1, 24.5, 24.1, 21.4.
    assert [one.item() for one in outputs] == [0.0, 0.0]
    torch.testing.assert_close(training.latent["weight"], torch.tensor([[3.375, -3.625, 0.375, -4.5]]))
    scale = (3.375 + 3.625 + 4.5) / 3  # 20.25, 33.0, 44.1, 35.3
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[scale, -scale, 0.0, -scale]]))


class Reference(nn.Module):
    """The same network written with autograd: `w + (ternary(w) - w).detach()`."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        stem, norm, body, head = self.model[0], self.model[1], self.model[3], self.model[6]
        found = find(body)
        weight = body.weight + (found - body.weight).detach()
        x = F.conv2d(F.relu(norm(stem(x))), weight, body.bias)
        return head(x.mean((2, 3)))


def find(layer: nn.Conv2d) -> Tensor:
    """Ternary groups of four inputs, by a loop over the number that is kept."""
    w = layer.weight.detach().movedim(1, -1).reshape(-1, 4)
    best, error = torch.zeros_like(w), (w**2).sum(1)
    for k in range(1, 5):
        scale, places = w.abs().topk(k, dim=1)
        values = torch.zeros_like(w).scatter(1, places, scale.mean(1, keepdim=True).expand(-1, k)) * w.sign()
        better = ((w - values) ** 2).sum(1) < error
        best[better], error[better] = values[better], ((w - values) ** 2).sum(1)[better]
    return best.reshape(layer.weight.movedim(1, -1).shape).movedim(-1, 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 2, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_a_network_with_the_estimator_written_out(name):
    model, other = network(), Reference(network())
    ours, theirs = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    training = TernaryTraining(model)
    with attach(ours, training, total_steps=5, model=model):
        for x, y in batches(5):
            step(model, ours, x, y)
            step(other, theirs, x, y)
    torch.testing.assert_close(training.latent["3.weight"], other.model[3].weight.detach(), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(model[0].weight, other.model[0].weight, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(model[3].weight.detach(), find(other.model[3]), atol=2e-6, rtol=1e-4)


def run(model: nn.Module, training: TernaryTraining, start: int, stop: int, state: dict[str, Any] | None = None) -> Any:
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    handle = attach(optimizer, training, total_steps=6, model=model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["handle"])
    for x, y in batches(6)[start:stop]:
        step(model, optimizer, x, y)
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    found = copy.deepcopy(parts)
    handle.remove(completed=True)
    return found


@pytest.mark.parametrize("options", [{}, {"group": "filter", "rule": "threshold"}], ids=["exact", "threshold"])
def test_a_resumed_run_is_the_same_bit_for_bit(options, tmp_path):
    whole, half, resumed = network(), network(), network()
    trainings = [TernaryTraining(m, **options) for m in (whole, half, resumed)]
    run(whole, trainings[0], 0, 6)
    torch.save(run(half, trainings[1], 0, 3), tmp_path / "half.pt")
    run(resumed, trainings[2], 3, 6, torch.load(tmp_path / "half.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(trainings[0].latent["3.weight"], trainings[2].latent["3.weight"])


def test_what_is_seen_between_steps_is_ternary_and_is_saved_packed(tmp_path):
    model = network()
    training = TernaryTraining(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with attach(optimizer, training, total_steps=3, model=model):
        for x, y in batches(3):
            assert find_ternary(model).layers["3.weight"].error < 1e-6
            step(model, optimizer, x, y)
            copied = copy.deepcopy(model)
            assert torch.equal(copied[3].weight, model[3].weight)
    assert training.metrics() == {"zeros": int((model[3].weight == 0).sum()) / 576}
    latent, report = training.latent["3.weight"], training.report(batches(1)[0][0])
    shown = model[3].weight.detach()
    assert report.layers["3.weight"].error == pytest.approx(float((latent - shown).norm() / latent.norm()))
    assert report.layers["3.weight"].macs == 576 * 16 * 8
    save_ternary(tmp_path / "a", model)
    assert torch.equal(load_ternary(tmp_path / "a", network())[3].weight, shown)


def test_the_first_step_begins_at_what_ternarize_makes_and_a_second_run_goes_on():
    model = network()
    training = TernaryTraining(model)
    expected = ternarize(model)[3].weight
    run(model, training, 0, 0)
    assert torch.equal(model[3].weight, expected)
    latent = training.latent["3.weight"]
    run(model, training, 0, 0)
    assert torch.equal(training.latent["3.weight"], latent)


def test_a_copy_of_both_trains_alone():
    model = network()
    training = TernaryTraining(model)
    run(model, training, 0, 2)
    other, its = copy.deepcopy((model, training))
    before = model[3].weight.clone()
    run(other, its, 2, 4)
    assert torch.equal(model[3].weight, before) and not torch.equal(other[3].weight, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": 0}, ValueError, "group must be at least 1, got 0"),
        ({"rule": "best"}, ValueError, "rule must be one of exact, threshold"),
        ({"targets": "nothing"}, ValueError, "targets must be the name of"),
        ({"ignored_layers": "3"}, ValueError, "targets must leave a weight besides the first and the last layer, got none"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TernaryTraining(network(), **options)
