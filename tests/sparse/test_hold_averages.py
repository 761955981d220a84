"""Optimizers and averages that put other weights into the model: what they bring back is said, and set to zero at the end."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fasterai.callbacks.plain import attach
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import perceptron

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


class ScheduleFree(torch.optim.Optimizer):
    """The way of Defazio et al. 2024: gradients are taken at y, between the steps z and their average x; eval() shows x."""

    def __init__(self, parameters, lr=0.1, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta})
        self.steps, self.is_training = 0, True

    def _each(self):
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p, self.state[p].setdefault("z", p.detach().clone())

    @torch.no_grad()
    def _turn(self, is_training):
        if is_training != self.is_training:
            for group, p, z in self._each():
                p.lerp_(z, 1 - group["beta"] if is_training else 1 - 1 / group["beta"])
        self.is_training = is_training

    def eval(self):
        self._turn(False)

    def train(self):
        self._turn(True)

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group, p, z in self._each():
            x = p.lerp(z, 1 - 1 / group["beta"])
            z -= group["lr"] * p.grad
            x.lerp_(z, 1 / self.steps)
            p.copy_(x.lerp(z, 1 - group["beta"]))


class Lookahead:
    """The way of Zhang et al. 2019: every k steps the weights go half of the way from those of k steps ago."""

    def __init__(self, optimizer, k=5):
        self.optimizer, self.k, self.steps = optimizer, k, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            for slow, p in zip(self.slow, (p for g in self.optimizer.param_groups for p in g["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def make(sparsity=0.7):
    model = perceptron(6, 10, 4)
    return model, Sparsifier(model, "weight", "global", sparsity=sparsity, schedule="lin")


def train(model, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        after()


def zeros(model):
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


def test_a_schedule_free_optimizer_is_said_at_the_start_and_its_average_at_the_end():
    model, sparsifier = make()
    optimizer = ScheduleFree(model.parameters())
    with pytest.warns(
        UserWarning, match=r"ScheduleFree puts averaged weights .*sparsifier\.apply_masks\(\) after each .*eval\(\)"
    ):
        handle = attach(optimizer, sparsifier, total_steps=10)
    train(model, optimizer, 10)
    optimizer.eval()
    assert zeros(model) < 70 and sparsifier.sparsity.overall == 0.7
    with pytest.warns(
        UserWarning, match=r"at the end of the run, which sets them to zero: [\d]+ of 70 masked weights were not zero"
    ):
        handle.remove()
    assert zeros(model) == 70


def test_the_repair_of_a_schedule_free_optimizer_is_one():
    model, sparsifier = make()
    optimizer = ScheduleFree(model.parameters())
    with pytest.warns(UserWarning, match="averaged weights"), attach(optimizer, sparsifier, total_steps=10):
        train(model, optimizer, 10)
    optimizer.eval()
    sparsifier.apply_masks()
    assert zeros(model) == 70 and sparsifier.report().together.disobeying == 0
    hold = sparsifier.hold(optimizer)
    optimizer.train()
    train(model, optimizer, 2)
    assert zeros(model) == 70
    hold.remove()


@pytest.mark.filterwarnings("ignore:.*averaged weights")
def test_the_real_one():
    schedulefree = pytest.importorskip("schedulefree")
    model, sparsifier = make()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    handle = attach(optimizer, sparsifier, total_steps=10)
    train(model, optimizer, 10)
    optimizer.eval()
    assert zeros(model) < 70
    with pytest.warns(UserWarning, match="of 70 masked weights were not zero"):
        handle.remove()
    assert zeros(model) == 70


def test_a_last_step_of_lookahead_is_said_and_taken_back():
    model, sparsifier = make()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1))
    handle = attach(optimizer, sparsifier, total_steps=10)
    train(model, optimizer, 10)
    assert zeros(model) < 70
    with pytest.warns(UserWarning, match=r"of 70 masked weights were not zero\. An optimizer that averages weights"):
        handle.remove()
    assert zeros(model) == 70


def test_a_hold_says_it_too():
    model, sparsifier = make()
    sparsifier.sparsify_model()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1), k=2)
    optimizer.slow = [torch.ones_like(slow) for slow in optimizer.slow]
    handle = attach(optimizer, sparsifier.hold(), total_steps=4)
    train(model, optimizer, 4)
    with pytest.warns(UserWarning, match=r"70 of 70 masked weights were not zero"):
        handle.remove()
    assert zeros(model) == 70


def test_a_run_that_was_broken_off_leaves_other_weights_and_says_it():
    model, sparsifier = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, sparsifier, total_steps=10)
    train(model, optimizer, 5)
    model.load_state_dict(perceptron(6, 10, 4, seed=5).state_dict())
    with pytest.warns(UserWarning, match=r"which leaves them so \(sparsifier\.apply_masks\(\) sets them to zero\): 35 of 35"):
        handle.remove(completed=False)
    assert zeros(model) == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.ASGD])
def test_usual_optimizers_say_nothing(kind):
    model, sparsifier = make()
    optimizer = kind(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attach(optimizer, sparsifier, total_steps=10):
            train(model, optimizer, 10)


# --- averages beside the model ------------------------------------------------------------------------------------------


def test_masks_are_applied_to_an_average_of_the_weights():
    model, sparsifier = make()
    average, own = AveragedModel(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, sparsifier, total_steps=10):
        train(model, optimizer, 10, lambda: average.update_parameters(model))
    before = copy.deepcopy(model.state_dict())
    assert zeros(average.module) < 70
    sparsifier.apply_masks(average)
    assert zeros(average.module) == 70
    for name, mask in sparsifier.masks.items():
        assert not average.module.get_parameter(name)[~mask].any() and average.module.get_parameter(name)[mask].all()
    sparsifier.apply_masks(own)
    assert zeros(own) == 70
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())


def test_masks_of_another_view_than_the_parameter_are_applied_to_an_average():
    model = nn.MultiheadAttention(4, 2)
    sparsifier = Sparsifier(model, "weight", "global")
    average = copy.deepcopy(model)
    sparsifier.sparsify_model(0.5)
    sparsifier.apply_masks(average)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(average.get_parameter(name) == 0, ~mask)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(6, 10)), r"got one where 2\.weight is missing, here \(4, 10\)"),
        (perceptron(6, 11, 4), r"got one where 0\.weight is \(11, 6\), here \(10, 6\)"),
    ],
)
def test_a_model_that_is_no_copy_is_refused(other, message):
    _model, sparsifier = make()
    sparsifier.sparsify_model()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"model must be a copy of the sparsifier's, " + message):
        sparsifier.apply_masks(other)
    assert all(torch.equal(before[n], x) for n, x in other.state_dict().items())
