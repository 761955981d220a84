"""Mutated states, given to everything that has a `load_state_dict`.

A state is refused in words, and then nothing has changed; or it is taken, and then the run ends where it was to end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import Handle, attach
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from tests.attack import oracles
from tests.attack.looks import Snapshot
from tests.attack.mutations import UNSEEN, mutated
from tests.attack.networks import Net, random_net
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 250, 120
STEPS, HALF = 8, 4


class Halfway:
    """A run that has come half of its way, by masks, tickets or removal."""

    def __init__(self, net: Net, kind: str, axes: dict[str, Any]) -> None:
        self.net, self.model = net, net.model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        x, y = net.batch(99)
        self.loaded: Any
        if kind == "gradual":
            self.loaded = GradualPruner(self.model, 0.5, "local", "movement", "agp", example_inputs=x, round_to=1)
            parts = [self.loaded]
        else:
            sparsifier = Sparsifier(
                self.model, **axes, sparsity=0.5, data=[(x, y)], loss=F.cross_entropy, example_inputs=x, round_to=1
            )
            ticket = LotteryTicket(sparsifier)
            parts = [sparsifier, ticket] if kind in ("ticket", "loop") else [sparsifier]
            self.loaded = ticket if kind == "ticket" else sparsifier
            self.sparsifier = sparsifier
        self.handle: Handle = attach(self.optimizer, *parts, total_steps=STEPS, loss=F.cross_entropy)
        if kind == "loop":
            self.loaded = self.handle
        self.go(HALF)

    def go(self, until: int) -> None:
        """Train up to a step."""
        for _ in range(2 * STEPS):
            if self.handle.loop.step >= until:
                return
            self.optimizer.zero_grad()
            self.net.loss(self.model, int(self.handle.loop.step)).backward()
            self.optimizer.step()


def attack(draw: random.Random, folder: Path) -> str:
    """Change one state in one place, load it, and train on."""
    if draw.random() < 0.04:
        return learner(draw, folder)
    kind = draw.choice(("sparsifier", "sparsifier", "loop", "ticket", "gradual"))
    net = random_net(draw, "perceptron", "convolutions", "residual")
    axes = {
        "granularity": draw.choice(("weight", "row", "coupled")),
        "criteria": draw.choice(("large_final", "movement", "updating_movement", "taylor")),
        "schedule": draw.choice(("agp", "iterative", "one_cycle")),
    }
    try:
        run = Halfway(net, kind, axes)
    except ValueError as error:
        oracles.check_clear(error)
        return REFUSED
    state, change, words = mutated(draw, run.loaded.state_dict())
    given, before, model = oracles.copied(state), oracles.copied(run.loaded.state_dict()), Snapshot(run.model)
    said = oracles.refusal(lambda: run.loaded.load_state_dict(state))
    assert oracles.equal(given, state), f"{kind}: {words}: the caller's state has changed"
    if said:
        assert oracles.equal(before, run.loaded.state_dict()), f"{kind}: {words}: refused, but not as before"
        assert not (differences := model.differences(run.model)), f"{kind}: {words}: refused, but {differences[:3]}"
        return REFUSED
    try:
        finish(run, kind, axes, oracles.refusal if change in UNSEEN else call)
    except Exception as error:
        raise AssertionError(f"{kind}: {words}: accepted, then {type(error).__name__}: {error}") from error
    return SURVIVED


def call(function: Callable[[], object]) -> None:
    """Call a function."""
    function()


def finish(run: Halfway, kind: str, axes: dict[str, Any], go: Callable[[Callable[[], object]], object]) -> None:
    """Train to the end, and see that it is the one that was asked for."""
    if go(lambda: run.go(STEPS)):
        return
    run.handle.remove()
    assert run.handle.loop.step == STEPS, f"the run ended at step {run.handle.loop.step} of {STEPS}"
    if kind == "gradual":
        check_removed(run.loaded)
        return
    oracles.zeros(run.model, run.sparsifier.masks)
    counts = [(row.pruned, row.units) for row in run.sparsifier.report().rows]
    assert all(gone == round(0.5 * units) for gone, units in counts), f"pruned {counts} for half"


def check_removed(pruner: GradualPruner) -> None:
    """Fail if a group has not lost the half of its channels, apart from those that the check has refused."""
    refused = pruner.removal.refused if pruner.removal else {}
    for name, (first, now) in pruner.channels.items():
        assert name in refused or first - now == round(0.5 * first), f"{name}: {first} -> {now}, asked half"


# --- in a framework ------------------------------------------------------------------------------------------------------


def learner(draw: random.Random, folder: Path) -> str:
    """The same in fastai, which hands the state over when the next fit begins."""
    from fastai.basics import DataLoader, DataLoaders, Learner

    from fasterai.callbacks.fastai import SparsifyCallback

    net = random_net(draw, "perceptron")
    data = [(net.batch(i, 1)[0][0], net.batch(i, 1)[1][0]) for i in range(8)]

    def made() -> tuple[Any, SparsifyCallback]:
        loaders = DataLoaders(DataLoader(data, bs=4, shuffle=False), DataLoader(data, bs=4))
        learn = Learner(loaders, net.model(), loss_func=nn.CrossEntropyLoss(), path=folder, cbs=[])
        return learn, SparsifyCallback(0.5, "weight", "local", "movement", "agp")

    learn, callback = made()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=callback)
    state, change, words = mutated(draw, callback.state_dict())
    learn, callback = made()
    model = Snapshot(learn.model)

    def resumed() -> None:
        callback.load_state_dict(state)
        with learn.no_bar(), learn.no_logging():
            learn.fit(4, start_epoch=2, cbs=callback)

    try:
        said = oracles.refusal(resumed)
    except Exception as error:
        raise AssertionError(f"fastai: {words}: {type(error).__name__}: {error}") from error
    if said:
        changed = [one for one in model.differences(learn.model) if ".training" not in one and "random" not in one]
        assert change in UNSEEN or not changed, f"fastai: {words}: refused, but {changed[:3]}"
        return REFUSED
    assert change in UNSEEN or abs(callback.sparsifier.sparsity.overall - 0.5) < 0.05, f"fastai: {words}: accepted"
    return SURVIVED
