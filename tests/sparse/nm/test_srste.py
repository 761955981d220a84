"""SR-STE and STE make the published update, whatever the optimizer: by hand, and beside the same written in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.sparse.nm.srste import SRSTE, STE


def layer(*weights: float) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int = 1) -> None:
    """One step on the sum of the weights, whose gradient is 1 for each."""
    optimizer.zero_grad()
    for _ in range(parts):
        (model(torch.ones(1, 4)).sum() / parts).backward()
    optimizer.step()


def test_two_steps_with_momentum_by_hand():
    """lr 0.1, decay 0.5, momentum 0.9: the gradient of a pruned w is 1 + 0.5 w, and velocities keep what decayed before.

    Step 1: 3 and -4 are shown; velocities (1, 0.5, 1.5, 1), weights (2.9, -1.05, 0.85, -4.1).
    Step 2: gradients (1, 0.475, 1.425, 1), velocities (1.9, 0.925, 2.775, 1.9).
    """
    model = layer(3.0, -1.0, 1.0, -4.0)
    training = SRSTE(model, 2, 4, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with attach(optimizer, training, total_steps=2, model=model):
        assert model.weight.tolist() == [[3.0, 0.0, 0.0, -4.0]]
        step(model, optimizer)
        torch.testing.assert_close(training.latent["weight"], torch.tensor([[2.9, -1.05, 0.85, -4.1]]))
        torch.testing.assert_close(model.weight.data, torch.tensor([[2.9, 0.0, 0.0, -4.1]]))
        step(model, optimizer)
    torch.testing.assert_close(training.latent["weight"], torch.tensor([[2.71, -1.1425, 0.5725, -4.29]]))


def test_one_step_by_hand_with_sgd_adam_and_adamw():
    """lr 0.1, decay 0.5; 3 and 1 are pruned, with gradients 1 + 1.5 and 1 + 0.5.

    Adam's first step is lr times the gradient's sign; AdamW shrinks by lr x 0.2 before.
    """
    start = (3.0, -4.0, 1.0, -8.0)
    for optimizer_of, wanted in (
        (lambda p: torch.optim.SGD(p, 0.1), (2.75, -4.1, 0.85, -8.1)),
        (lambda p: torch.optim.Adam(p, 0.1, eps=0.0), (2.9, -4.1, 0.9, -8.1)),
        (lambda p: torch.optim.AdamW(p, 0.1, eps=0.0, weight_decay=0.2), (2.84, -4.02, 0.88, -7.94)),
    ):
        model = layer(*start)
        training = SRSTE(model, 2, 4, decay=0.5)
        with attach(optimizer := optimizer_of(model.parameters()), training, total_steps=1, model=model):
            step(model, optimizer)
        torch.testing.assert_close(training.latent["weight"], torch.tensor([wanted]))


def test_the_decay_turns_an_adam_step_around():
    """A pruned -4 beside 5 and 6 has the gradient 1 - 0.5 x 4 = -1, so that Adam moves it up; STE's goes down."""
    found = []
    for make in (lambda m: SRSTE(m, 2, 4, decay=0.5), lambda m: STE(m, 2, 4)):
        model = layer(5.0, -4.0, 0.0, 6.0)
        optimizer = torch.optim.Adam(model.parameters(), 0.1, eps=0.0)
        with attach(optimizer, training := make(model), total_steps=1, model=model):
            step(model, optimizer)
        found.append(float(training.latent["weight"][0, 1]))
    assert found == pytest.approx([-3.9, -4.1])


class Oracle:
    """The update in numpy, in float64: W <- W - lr * direction(g(E * W) + decay (1 - E) * W)."""

    def __init__(self, weight: np.ndarray, kind: str, decay: float) -> None:
        self.weight, self.kind, self.decay = weight.astype(np.float64), kind, decay
        self.first, self.second, self.steps = np.zeros_like(self.weight), np.zeros_like(self.weight), 0

    def mask(self, n: int, m: int) -> np.ndarray:
        groups = np.abs(self.weight).reshape(-1, m)
        return (groups >= np.sort(groups, 1)[:, m - n, None]).reshape(self.weight.shape)

    def step(self, x: np.ndarray, n: int, m: int) -> None:
        keep = self.mask(n, m)
        gradient = 2 * (x @ (self.weight * keep).T).T @ x / len(x)  # of the mean over rows of the squared outputs
        gradient = gradient + self.decay * ~keep * self.weight
        self.steps += 1
        lr, wd = 0.05, 0.1
        if self.kind in ("sgd", "momentum"):
            gradient = gradient + wd * self.weight
            self.first = gradient if self.kind == "sgd" else 0.9 * self.first + gradient
            self.weight = self.weight - lr * self.first
            return
        if self.kind == "adam":
            gradient = gradient + wd * self.weight
        else:
            self.weight = self.weight * (1 - lr * wd)
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        self.weight = self.weight - lr * first / (np.sqrt(second) + 1e-8)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twelve_steps_are_those_of_the_formula(kind):
    """Beside numpy, with weight decay of the optimizer's own; the masks move meanwhile."""
    torch.manual_seed(0)
    model = nn.Linear(16, 6, bias=False).double()
    oracle = Oracle(model.weight.detach().numpy().copy(), kind, decay=0.3)
    training = SRSTE(model, 1, 4, decay=0.3)
    optimizer = OPTIMIZERS[kind](model.parameters())
    masks = []
    with attach(optimizer, training, total_steps=12, model=model):
        for _ in range(12):
            masks.append(oracle.mask(1, 4))
            assert np.array_equal(training.masks["weight"].numpy(), masks[-1])
            x = torch.randn(8, 16, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).pow(2).sum(1).mean().backward()
            optimizer.step()
            oracle.step(x.numpy(), 1, 4)
            np.testing.assert_allclose(training.latent["weight"].numpy(), oracle.weight, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(model.weight.detach().numpy(), oracle.weight * oracle.mask(1, 4), atol=1e-12)
    assert sum((a != b).sum() for a, b in itertools.pairwise(masks)) > 3


def test_accumulated_gradients_have_the_decay_once_and_clipping_reaches_it():
    model, whole = layer(3.0, -1.0, 1.0, -4.0), layer(3.0, -1.0, 1.0, -4.0)
    found = []
    for one, parts in ((model, 4), (whole, 1)):
        optimizer = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        with attach(optimizer, training := SRSTE(one, 2, 4, decay=0.5), total_steps=2, model=one):
            step(one, optimizer, parts)
            step(one, optimizer, parts)
        found.append(training.latent["weight"])
    torch.testing.assert_close(found[0], found[1])
    training = SRSTE(layer(0.0, 0.0, 100.0, 200.0), 1, 4, decay=1.0)  # the decay alone is 100
    optimizer = torch.optim.SGD(training.model.parameters(), 1.0)
    with attach(optimizer, training, total_steps=1, model=training.model) as handle:
        training.model.weight.grad = torch.zeros(1, 4)
        handle.loop.after_backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        assert training.model.weight.grad.tolist() == [[0.0, 0.0, pytest.approx(1.0), 0.0]]
        handle.remove(completed=False)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((5, 4), {}, ValueError, "n must be at most m, got n=5, m=4"),
        ((0, 4), {}, ValueError, "n must be at least 1, got 0"),
        ((2, 4.0), {}, TypeError, "m must be a whole number"),
        ((2, 4), {"decay": -1.0}, ValueError, "decay must be a number of at least 0, got -1.0"),
        ((2, 4), {"decay": "2e-4"}, TypeError, "decay must be a number of at least 0, got '2e-4'"),
        ((2, 4), {"decay": float("nan")}, ValueError, "decay must be a number of at least 0, got nan"),
        ((2, 4), {"looks": -1}, ValueError, "looks must be at least 0, got -1"),
        ((2, 4), {"schedule": "agb"}, ValueError, "schedule must be"),
    ],
)
def test_bad_settings_are_refused_with_a_model_and_without(arguments, options, kind, words):
    from fasterai.callbacks.from_the_start import SRSTEMethod

    with pytest.raises(kind, match=words):
        SRSTE(nn.Linear(8, 8), *arguments, **options)
    bound = {"n": arguments[0], "m": arguments[1], "decay": 2e-4, "schedule": None, "looks": 50, **options}
    with pytest.raises(kind, match=words):
        SRSTEMethod.makes.check_settings(**bound)
    if "decay" not in options:
        with pytest.raises(kind, match=words):
            STE(nn.Linear(8, 8), *arguments, **options)
        with pytest.raises(kind, match=words):
            STE.check_settings(**{name: value for name, value in bound.items() if name != "decay"})


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 'resnet18' \(str\)"):
        SRSTE("resnet18")
