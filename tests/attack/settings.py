"""Random settings: any network, granularity, context, criterion, schedule and rule, trained some steps.

Counts are exact, masks hold after every step, a run that is stopped, saved and loaded in new objects ends with the same bits,
and what is silent can be taken out without the outputs moving.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import Handle, attach
from fasterai.core import criteria, granularities, schedules
from fasterai.prune.all import GradualPruner, remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow
from tests.attack import oracles
from tests.attack.networks import Net, random_net
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 200, 60
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, 0.01),
    "rms": lambda p: torch.optim.RMSprop(p, 0.01),
}


def attack(draw: random.Random, folder: Path) -> str:
    """Train with settings by chance."""
    return gradual(draw) if draw.random() < 0.15 else masked(draw)


def masked(draw: random.Random) -> str:
    """Train with masks."""
    net, axes, steps = random_net(draw), random_axes(draw), draw.randint(3, 9)
    optimizer, stop = draw.choice(tuple(OPTIMIZERS)), draw.randint(1, steps - 1)
    if oracles.refusal(lambda: sparsifier_of(net.model(), net, axes)):
        return REFUSED
    whole = Run(net, axes, optimizer, steps)
    if oracles.refusal(lambda: whole.go(steps)):  # such as a criterion without anything to read
        return REFUSED
    whole.handle.remove()
    check_counts(whole.sparsifier, axes)
    first = Run(net, axes, optimizer, steps)
    first.go(stop)
    second = Run(net, axes, optimizer, steps)
    second.load(first.saved())
    second.go(steps)
    second.handle.remove()
    assert oracles.equal(whole.model.state_dict(), second.model.state_dict()), "a resumed run ended with other weights"
    assert oracles.equal(whole.sparsifier.masks, second.sparsifier.masks), "a resumed run ended with other masks"
    if axes["granularity"] in ("coupled", "filter"):
        check_removal(whole.model, net)
    return SURVIVED


def random_axes(draw: random.Random) -> dict[str, Any]:
    """The settings of a sparsifier, by chance."""
    context = draw.choice(("local", "global", "erk", "lamp", "local", "global", "two_four"))
    rule = draw.choice(("nested", "nested", "nested", "free", "grow"))
    names = [*granularities.__all__, "coupled", "weight", "weight", "filter"]
    axes: dict[str, Any] = {
        "granularity": draw.choice(
            [n for n in names if isinstance(getattr(granularities, n, None), granularities.Granularity)]
        ),
        "context": context,
        "criteria": draw.choice(criteria.__all__),
        "sparsity": draw.choice((0.0, 0.1, 0.5, 0.5, 0.9, 1.0, round(draw.random(), 3))) if context != "two_four" else 0.5,
        "schedule": draw.choice(schedules.__all__),
        "rule": DropAndGrow(every=2, fraction=0.3) if rule == "grow" else rule,
        "max_updates": draw.choice((1, 3, 50)),
    }
    if draw.random() < 0.2:
        axes["min_keep"] = draw.randint(0, 3)
    if axes["granularity"] == "coupled":
        axes["round_to"] = 1
    return axes


def sparsifier_of(model: nn.Module, net: Net, axes: dict[str, Any]) -> Sparsifier:
    """A sparsifier with all evidence that there is."""
    x, y = net.batch(99)
    return Sparsifier(model, **axes, data=[(x, y)], loss=F.cross_entropy, example_inputs=x)


class Run:
    """A training with masks, which can be stopped, saved, loaded and gone on with."""

    def __init__(self, net: Net, axes: dict[str, Any], optimizer: str, steps: int) -> None:
        self.net, self.model = net, net.model()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier = sparsifier_of(self.model, net, axes)
        self.handle: Handle = attach(self.optimizer, self.sparsifier, total_steps=steps, loss=F.cross_entropy)

    def go(self, until: int) -> None:
        """Train up to a step, with a look at the masks after each."""
        while self.handle.loop.step < until:
            step = self.handle.loop.step
            x, y = self.net.batch(step)
            self.optimizer.zero_grad()
            output = self.model(x)
            loss = self.handle.loss(F.cross_entropy(output, y), x, y, output)
            loss.backward()
            torch.manual_seed(step)
            self.optimizer.step()
            oracles.zeros(self.model, self.sparsifier.masks)

    def saved(self) -> bytes:
        """The run as a file."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.handle.state_dict()], file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        """Go on from a file."""
        model, optimizer, handle = torch.load(io.BytesIO(content), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.handle.load_state_dict(handle)


#: The units of a weight, worked out from its shape alone; a matrix has no kernel.
UNITS = {
    "weight": lambda s: s.numel(),
    "kernel": lambda s: s[0] * s[1],
    "filter": lambda s: s[0],
    "row": lambda s: s[0] * (s[1] * s[2] if len(s) > 2 else 1),
    "layer": lambda s: 1,
}


def check_counts(sparsifier: Sparsifier, axes: dict[str, Any]) -> None:
    """Fail if not exactly as many units are pruned as were asked for, by counts that the library has no part in."""
    name, context, share = axes["granularity"], axes["context"], axes["sparsity"]
    floor = 0 if name == "layer" else axes.get("min_keep", 1)
    if axes["schedule"] == "dsd":
        share = 0.0
    if name not in UNITS or (context in ("erk", "lamp") and floor > 1):
        return
    counts, gone = {}, {}
    grouped = {n for n, m in sparsifier.model.named_modules() if getattr(m, "groups", 1) > 1}
    for target, mask in sparsifier.masks.items():
        if target.rpartition(".")[0] in grouped and name != "weight":
            return
        counts[target] = int(UNITS[name](mask.shape))
        gone[target] = counts[target] - int(_units(mask, counts[target]))
    if context in ("local", "two_four"):
        expected = {n: min(round(share * c), max(0, c - floor)) for n, c in counts.items()}
        assert gone == expected, f"{axes}: pruned {gone}, asked {expected} of {counts}"
    else:
        most = sum(max(0, c - floor) for c in counts.values())
        expected_sum = min(round(share * sum(counts.values())), most)
        assert sum(gone.values()) == expected_sum, f"{axes}: pruned {sum(gone.values())}, asked {expected_sum} of {counts}"


def _units(mask: Tensor, count: int) -> Tensor:
    """The number of kept units; each is kept or gone as a whole."""
    units = mask.reshape(count, -1)
    assert bool((units.all(1) == units.any(1)).all()), "a unit is pruned in part"
    return units.all(1).sum()


@torch.no_grad()
def check_removal(model: nn.Module, net: Net) -> None:
    """Fail if taking out what is silent moves the outputs."""
    x, _ = net.batch(7)
    before = model.eval()(x)
    if oracles.refusal(lambda: remove(model, x)) is None:
        oracles.close(before, model(x), 1e-4)
        other = net.batch(8, 3)[0]
        assert bool(torch.isfinite(model(other)).all())


def gradual(draw: random.Random) -> str:
    """Train with channels taken out on the way, and again from half of the way."""
    net, steps, share = random_net(draw), draw.randint(3, 8), draw.choice((0.0, 0.25, 0.5, 0.8))
    axes = (share, draw.choice(("local", "global")), draw.choice(("large_final", "movement", "random", "taylor")))
    schedule, stop, kind = (
        draw.choice(("lin", "agp", "one_cycle", "iterative")),
        draw.randint(1, steps - 1),
        draw.choice([*OPTIMIZERS]),
    )

    def made() -> tuple[nn.Module, torch.optim.Optimizer, GradualPruner, Handle]:
        model = net.model()
        optimizer = OPTIMIZERS[kind](model.parameters())
        pruner = GradualPruner(model, *axes, schedule, example_inputs=net.batch(99)[0], round_to=1)
        return model, optimizer, pruner, attach(optimizer, pruner, total_steps=steps, loss=F.cross_entropy)

    if oracles.refusal(made):
        return REFUSED
    runs = [made(), made(), made()]

    def go(which: int, begin: int, end: int) -> None:
        model, optimizer, _, _ = runs[which]
        for step in range(begin, end):
            optimizer.zero_grad()
            net.loss(model, step).backward()
            torch.manual_seed(step)
            optimizer.step()

    go(0, 0, steps)
    go(1, 0, stop)
    saved = io.BytesIO()
    torch.save([runs[1][0].state_dict(), runs[1][1].state_dict(), runs[1][3].state_dict()], saved)
    saved.seek(0)
    weights, optimizers, handle = torch.load(saved, weights_only=True)
    runs[2][3].load_state_dict(handle)
    runs[2][0].load_state_dict(weights)
    runs[2][1].load_state_dict(optimizers)
    go(2, stop, steps)
    for _, _, _, one in runs:
        one.remove(completed=one is not runs[1][3])
    assert oracles.equal(runs[0][0].state_dict(), runs[2][0].state_dict()), "a resumed removal ended with other weights"
    refused = runs[0][2].removal.refused if runs[0][2].removal else {}
    if axes[1] == "local" and not refused:
        for name, (first, now) in runs[0][2].channels.items():
            assert first - now == min(round(share * first), first - 1), f"{name}: {first} -> {now}, asked {share}"
    return SURVIVED
