"""Odd loops: what people do to a training without telling anybody.

Accumulation, skipped steps, the wrong optimizer, two steps in one, averages of weights, other layers in the midst of a run,
training on without a hold, compiled steps. Either the zeros are as many as were asked for, or a warning or an error says
why not.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.sparse.sparsifier import Sparsifier
from tests.attack import oracles
from tests.attack.networks import Net, random_net
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 150, 120


class Odd:
    """A network with a sparsifier and an optimizer, and what has been asked for."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.net: Net = random_net(draw, "perceptron", "convolutions", "residual")
        self.model = self.net.model()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.share = draw.choice((0.3, 0.5, 0.7))
        schedule = draw.choice(("one_cycle", "agp", "lin", "iterative", "cos"))
        criterion = draw.choice(("large_final", "movement", "random", "taylor"))
        self.sparsifier = Sparsifier(
            self.model, "weight", draw.choice(("local", "global")), criterion, sparsity=self.share, schedule=schedule,
            example_inputs=self.net.batch(99)[0],
        )  # fmt: skip
        self.batches = draw.randint(4, 12)

    def backward(self, step: int) -> None:
        """Make the gradients of a batch."""
        self.optimizer.zero_grad()
        self.net.loss(self.model, step).backward()

    def reached(self) -> float:
        """The share of the targets' weights that are zero, counted in the model that is there now."""
        parameters = dict(self.model.named_parameters())
        found = [parameters[t.name] for t in self.sparsifier.targets if t.name in parameters]
        return sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)

    def is_right(self) -> bool:
        """Tell if the zeros are as many as were asked for, within the rounding of each target."""
        return (
            abs(self.reached() - self.share)
            <= 0.5 * len(self.sparsifier.targets) / sum(t.parameter.numel() for t in self.sparsifier.targets) + 1e-9
            or self.reached() > self.share
        )


def accumulated(odd: Odd) -> None:
    """One step for several batches, with the number of batches as total_steps."""
    every = odd.draw.randint(2, 4)
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.backward(i)
        if i % every == 0:
            odd.optimizer.step()
    handle.remove()


def left_early(odd: Odd) -> None:
    """A loop that breaks off, inside of the context manager."""
    with attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches):
        for i in range(odd.draw.randint(1, odd.batches - 1)):
            odd.backward(i)
            odd.optimizer.step()


def another_optimizer(odd: Odd) -> None:
    """An optimizer that is attached to and one that steps."""
    other = torch.optim.SGD(odd.model.parameters(), 0.05)
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.backward(i)
        other.step()
    handle.remove()


def foreign_parameters(odd: Odd) -> None:
    """An optimizer of another model."""
    other = odd.net.model(1)
    optimizer = torch.optim.SGD(other.parameters(), 0.05)
    handle = attach(optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.net.loss(other, i).backward()
        optimizer.step()
    handle.remove()


class Sam(torch.optim.Optimizer):
    """Two steps in one, whose own `step` is never called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer = base

    @torch.no_grad()
    def first_step(self) -> None:
        self.old = [p.clone() for g in self.param_groups for p in g["params"]]
        for p in (p for g in self.param_groups for p in g["params"]):
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in zip((p for g in self.param_groups for p in g["params"]), self.old, strict=True):
            p.copy_(old)
        self.base_optimizer.step()

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        raise RuntimeError("by first_step and second_step")


def two_steps(odd: Odd) -> None:
    """SAM, attached to the outer optimizer or to the inner one."""
    sam = Sam(odd.optimizer)
    handle = attach(sam if odd.draw.random() < 0.5 else odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.backward(i)
        sam.first_step()
        odd.backward(i)
        sam.second_step()
    handle.remove()


def skipped(odd: Odd) -> None:
    """Steps that are left out, as at an overflow."""
    gone = odd.draw.sample(range(odd.batches), odd.draw.randint(1, odd.batches))
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.backward(i)
        if i not in gone:
            odd.optimizer.step()
    handle.remove()


def averaged(odd: Odd) -> None:
    """Weights that an average takes the place of at the end, or every few steps."""
    average = torch.optim.swa_utils.AveragedModel(odd.model)
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    every = odd.draw.choice((1, 2, odd.batches))
    for i in range(odd.batches):
        odd.backward(i)
        odd.optimizer.step()
        average.update_parameters(odd.model)
        if (i + 1) % every == 0:
            odd.model.load_state_dict(average.module.state_dict())
    handle.remove()


def replaced_layer(odd: Odd) -> None:
    """A layer that another one takes the place of in the midst of the run."""
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    when = odd.draw.randrange(odd.batches)
    for i in range(odd.batches):
        if i == when:
            name = odd.draw.choice([t.name.rpartition(".")[0] for t in odd.sparsifier.targets])
            fresh = copy.deepcopy(odd.model.get_submodule(name))
            for p in fresh.parameters():
                nn.init.uniform_(p, 0.5, 1.0)
            odd.model.set_submodule(name, fresh)
            odd.optimizer.add_param_group({"params": list(fresh.parameters())})
        odd.backward(i)
        odd.optimizer.step()
    handle.remove()


def trained_on(odd: Odd) -> None:
    """A second training by another optimizer, with the masks held or not."""
    with attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches):
        for i in range(odd.batches):
            odd.backward(i)
            odd.optimizer.step()
    later = torch.optim.SGD(odd.model.parameters(), 0.05)
    if odd.draw.random() < 0.7:
        odd.sparsifier.hold(later)
    for i in range(3):
        odd.net.loss(odd.model, i).backward()
        later.step()
    odd.sparsifier.report()
    str(odd.sparsifier.sparsity.overall)
    odd.sparsifier.finalize() if odd.draw.random() < 0.5 else odd.sparsifier.apply_masks()


def with_closure(odd: Odd) -> None:
    """An optimizer that calls a closure, more than once in a step."""
    odd.optimizer = torch.optim.LBFGS(odd.model.parameters(), 0.05, max_iter=2)
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):

        def closure(step: int = i) -> torch.Tensor:
            odd.optimizer.zero_grad()
            loss = odd.net.loss(odd.model, step)
            loss.backward()
            return loss

        odd.optimizer.step(closure)
    handle.remove()


def compiled(odd: Odd) -> None:
    """A compiled step of the optimizer, by torch's eager backend."""
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    step = torch.compile(odd.optimizer.step, backend="eager")
    for i in range(odd.batches):
        odd.backward(i)
        step()
    handle.remove()


def pickled(odd: Odd) -> None:
    """Everything through a pickle in the midst of the run."""
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    when = odd.draw.randrange(1, odd.batches)
    for i in range(odd.batches):
        if i == when:
            together = pickle.dumps((odd.model, odd.optimizer, odd.sparsifier, handle))
            odd.model, odd.optimizer, odd.sparsifier, handle = pickle.loads(together)
        odd.backward(i)
        odd.optimizer.step()
    handle.remove()


def interrupted(odd: Odd) -> None:
    """An error in the midst of the loop, and a second run in a new handle."""
    first = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.draw.randint(0, odd.batches - 1)):
        odd.backward(i)
        odd.optimizer.step()
    if odd.draw.random() < 0.5:
        first.remove()
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        odd.backward(i)
        odd.optimizer.step()
        oracles.zeros(odd.model, odd.sparsifier.masks)
    handle.remove()


def one_too_many(odd: Odd) -> None:
    """A step beyond the end."""
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches + 1):
        odd.backward(i)
        odd.optimizer.step()
    handle.remove()


def moved(odd: Odd) -> None:
    """Weights of another precision from some step on."""
    handle = attach(odd.optimizer, odd.sparsifier, total_steps=odd.batches)
    for i in range(odd.batches):
        if i == 2:
            odd.model.double()
        odd.optimizer.zero_grad()
        x, y = odd.net.batch(i)
        F.cross_entropy(odd.model(x.to(next(odd.model.parameters()).dtype)), y).backward()
        for group in odd.optimizer.param_groups:
            for p in group["params"]:
                odd.optimizer.state[p] = {}
        odd.optimizer.step()
    handle.remove()


LOOPS = (
    *(accumulated, left_early, another_optimizer, foreign_parameters, two_steps, skipped, averaged, replaced_layer, trained_on),
    *(with_closure, pickled, interrupted, one_too_many, moved),
)


def attack(draw: random.Random, folder: Path) -> str:
    """Run an odd loop by chance."""
    odd = Odd(draw)
    loop = compiled if draw.random() < 0.03 else draw.choice(LOOPS)
    with oracles.heard() as said:
        refused = oracles.refusal(lambda: loop(odd))
    if refused:
        return REFUSED
    if not odd.is_right() and not said:
        raise AssertionError(f"{loop.__name__}: {odd.reached():.4f} of {odd.share} are zero, and nothing said so")
    return SURVIVED
