"""Random distillation: any student, teacher, losses and layers, in any company, trained some steps.

Nothing of the teacher changes, nothing is left behind at any kind of end or alive between two steps, a resumed run ends with
the same bits, validation is the student's alone, and a share of zero is no distillation at all.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.callbacks.plain import Handle, attach
from fasterai.core.participant import Participant
from fasterai.distill.all import Distiller, EMATeacher, Route, cache_teacher
from fasterai.distill.losses.given import known_losses
from fasterai.distill.losses.logits import SoftTarget
from fasterai.distill.losses.loss import FeatureLoss
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.hold import Hold
from fasterai.sparse.sparsifier import Sparsifier
from tests.attack import oracles, taught
from tests.attack.mutations import mutated
from tests.attack.pairs import Pair, logits_of, random_pair
from tests.attack.settings import OPTIMIZERS
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 200, 60
EVENTS = ("on_fit_start", "after_forward", "on_first_batch", "after_loss", "after_backward", "before_step", "after_step")
COMPANY = ("nobody", "nobody", "sparsifier", "sparsifier", "gradual", "hold")
TEACHERS = ("network", "network", "several", "average", "cached", "route", "copy")


@dataclass(frozen=True)
class Plan:
    """A run by chance, which can be made as often as one likes."""

    pair: Pair
    losses: tuple[Any, ...]
    layers: tuple[list[str], list[str]] | None
    teacher: str
    weight: float
    schedule: Any
    company: tuple[str, str, str, float]
    optimizer: str
    steps: int
    batches: int  # of a step
    clips: bool
    half: bool
    closure: bool
    folder: Path

    def words(self) -> str:
        """The run in words, for what fails."""
        names = "+".join(type(one).__name__ if not isinstance(one, str) else one for one in self.losses)
        odd = [name for name in ("clips", "half", "closure") if getattr(self, name)]
        odd += [f"{self.batches} batches a step"] if self.batches > 1 else []
        layers = " at " + ", ".join(f"{a}-{b}" for a, b in zip(*self.layers, strict=True)) if self.layers else ""
        return f"{self.pair.kind}, {names}{layers}, {self.teacher}, {self.company[0]}, weight {self.weight}, {odd}"


def random_plan(draw: random.Random, folder: Path) -> Plan:
    """Settings by chance."""
    pair = random_pair(draw)
    known = known_losses()
    names = draw.choices([*known], k=draw.choice((1, 1, 1, 2, 3)))
    losses = [replace(known[name](), scale=draw.choice((0.1, 1.0))) for name in names]
    if pair.kind != "words":
        losses = [SoftTarget() if type(one).__name__ == "Tokens" else one for one in losses]
    teacher = draw.choice(TEACHERS)
    if teacher == "cached" and draw.random() < 0.8:
        losses = [one if not isinstance(one, FeatureLoss) or one.on_outputs else SoftTarget() for one in losses]
    reading = [one for one in losses if isinstance(one, FeatureLoss)]
    layers = None
    if any(not one.on_outputs for one in reading) or (reading and teacher != "cached" and draw.random() < 0.5):
        layers = random_layers(draw, pair, teacher in ("average", "copy"))
    return Plan(
        pair, tuple(losses), layers, teacher, draw.choice((0.0, 0.0, 0.5, 0.9, 1.0)),
        draw.choice((None, None, "lin", "agp", "cos")),
        (draw.choice(COMPANY), draw.choice(("weight", "row", "coupled")), draw.choice(("large_final", "movement", "taylor")),
         draw.choice((0.3, 0.5))),
        draw.choice([*OPTIMIZERS]), draw.randint(3, 6), draw.choice((1, 1, 2)), draw.random() < 0.3, draw.random() < 0.25,
        draw.random() < 0.2, folder,
    )  # fmt: skip


def random_layers(draw: random.Random, pair: Pair, same: bool) -> tuple[list[str], list[str]]:
    """One pair of layers or two, mostly of features with as many dimensions."""
    networks = pair.student(), pair.student() if same else pair.teacher(2)
    dims = [_dims(one, pair) for one in networks]
    found: tuple[list[str], list[str]] = ([], [])
    for _ in range(draw.choice((1, 1, 2))):
        own = draw.choice([*dims[0]])
        alike = [name for name, dim in dims[1].items() if dim == dims[0][own]]
        found[0].append(own)
        found[1].append(draw.choice(alike if alike and draw.random() < 0.9 else [*dims[1]]))
    return found


def _dims(model: nn.Module, pair: Pair) -> dict[str, int]:
    """The numbers of dimensions of the layers' outputs, of those that run in eval mode."""
    found: dict[str, int] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                found[name] = out.dim()

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(noted(name))
    with torch.no_grad():
        model.eval()(*pair.batch(0)[0])
    return found


class Run:
    """A training by a plan, with a distiller or without."""

    def __init__(self, plan: Plan, *others: Participant, without: bool = False) -> None:
        self.plan, self.pair = plan, plan.pair
        self.model = self.pair.student()
        self.optimizer = OPTIMIZERS[plan.optimizer](self.model.parameters())
        self.networks: list[nn.Module] = []
        parts = [*self.company(), *others]
        if not without:
            teacher = self.made_teacher()
            layers = plan.layers or (None, None)
            self.distiller = Distiller(teacher, list(plan.losses), *layers, weight=plan.weight, schedule=plan.schedule)
            parts.append(self.distiller)
        self.was = [_state_of(one) for one in self.networks]
        self.parts = parts or [Participant()]
        self.handle: Handle | None = None
        self.alive: list[weakref.ref[Tensor]] = []

    def made_teacher(self) -> Any:
        """The teacher, in modes by chance, which are the same each time."""
        plan, pair = self.plan, self.pair
        if plan.teacher == "average":
            return EMATeacher(0.5)
        self.networks = [copy.deepcopy(self.model) if plan.teacher == "copy" else pair.teacher(2)]
        if plan.teacher in ("several", "route"):
            self.networks.append(pair.teacher(3))
        draw = random.Random(7)
        for one in self.networks:
            for module in one.modules():
                module.training = draw.random() < 0.5
        if plan.teacher == "cached":
            data = [(*pair.batch(i)[0], pair.batch(i)[1]) for i in range(plan.steps * plan.batches)]
            return cache_teacher(self.networks[0], data, plan.folder / "teacher.safetensors", dtype=torch.float32)
        if plan.teacher == "route":
            return Route.from_checkpoints(self.networks).one_stage()
        return self.networks if plan.teacher == "several" else self.networks[0]

    def company(self) -> list[Participant]:
        """Who takes part beside the distiller."""
        kind, granularity, criterion, share = self.plan.company
        example, labels = self.pair.batch(99)
        if kind == "nobody":
            return []
        torch.manual_seed(0)
        if kind == "gradual":
            return [GradualPruner(self.model, share, "local", criterion, "agp", example_inputs=example, round_to=1)]
        sparsifier = Sparsifier(
            self.model, granularity, "local", "large_final" if kind == "hold" else criterion, sparsity=share, schedule="agp",
            example_inputs=example, round_to=1, data=[(*example, labels)] if len(example) == 1 else None, loss=self.pair.task,
        )  # fmt: skip
        if kind == "sparsifier":
            return [sparsifier]
        sparsifier.sparsify_model(share)
        return [Hold(sparsifier._record)]

    def begin(self) -> Run:
        """Attach everybody."""
        total = {"total_steps": self.plan.steps}
        self.handle = attach(self.optimizer, *self.parts, **total, model=self.model, loss=self.pair.task)
        return self

    def loss(self, i: int) -> Tensor:
        """The loss of a batch, with a look at who keeps its tensors."""
        assert self.handle is not None
        x, y = self.pair.batch(i)
        torch.manual_seed(i)
        with torch.autocast("cpu", torch.bfloat16) if self.plan.half else nullcontext():
            outputs = self.model(*x)
            task = self.pair.task(outputs, y)
        self.alive.append(weakref.ref(logits_of(outputs)))
        return self.handle.loss(task, x, y, outputs)

    def backward(self, step: int) -> Tensor:
        """Make the gradients of a step."""
        assert self.handle is not None
        self.optimizer.zero_grad()
        k = self.plan.batches
        for i in range(step * k, step * k + k):
            loss = self.loss(i)
            assert bool(loss.isfinite()), f"the loss is {loss}"
            (loss / k).backward()
        if self.plan.clips:
            self.handle.after_backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        return loss.detach()

    def go(self, until: int, looks: bool = False) -> Run:
        """Train up to a step, with a validation after each or without."""
        assert self.handle is not None
        while self.handle.loop.step < until:
            step = int(self.handle.loop.step)
            if self.plan.closure:
                self.optimizer.step(lambda step=step: self.backward(step))
            else:
                self.backward(step)
                self.optimizer.step()
            kept = sum(one() is not None for one in self.alive)
            assert not kept, f"{kept} outputs of the student are kept after the step"
            self.alive = []
            if looks:
                self.validate()
                self.handle.metrics()
        return self

    @torch.no_grad()
    def validate(self) -> None:
        """Fail if the student answers otherwise than a copy of it without hooks."""
        alone = self.pair.student() if self.plan.company[0] != "gradual" else copy.deepcopy(self.model)
        alone.load_state_dict(self.model.state_dict())
        x, _ = self.pair.batch(55)
        mine, other = self.model.eval()(*x), alone.eval()(*x)
        self.model.train()
        assert oracles.equal(logits_of(mine), logits_of(other)), "a student in training validates otherwise"

    def saved(self) -> bytes:
        """The run as a file."""
        assert self.handle is not None
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.handle.state_dict()], file)
        return file.getvalue()

    def load(self, content: bytes) -> Run:
        """Go on from a file."""
        assert self.handle is not None
        model, optimizer, handle = torch.load(io.BytesIO(content), weights_only=True)
        self.handle.load_state_dict(handle)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return self

    def end(self, completed: bool | None = None) -> Run:
        """End the run, if it has begun, and see what is left of it."""
        if self.handle is not None:
            self.handle.remove(completed)
        self.check_left()
        return self

    def check_left(self) -> None:
        """Fail if something is left behind, or of a teacher is not as it was."""
        own = {id(p) for p in self.model.parameters()}
        theirs = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(own) == sorted(theirs), f"the optimizer has {len(theirs)} parameters, and the student {len(own)}"
        assert set(map(id, self.optimizer.state)) <= own, "the optimizer has states of parameters that are gone"
        assert not self.optimizer._optimizer_step_pre_hooks, "the optimizer has hooks"
        self.check_teacher()

    def check_teacher(self) -> None:
        """Fail if one of the networks has hooks, or a teacher is not as it was."""
        assert not (left := hooks_of(self.model)), f"the student has hooks at {left}"
        for one, was in zip(self.networks, self.was, strict=True):
            assert oracles.equal(_state_of(one), was), "the teacher is not as it was"
            assert not (left := hooks_of(one)), f"the teacher has hooks at {left}"
            assert all(p.grad is None for p in one.parameters()), "the teacher has gradients"

    def values(self) -> dict[str, Tensor]:
        """What the student has learned."""
        return oracles.copied(dict(self.model.state_dict()))


def hooks_of(model: nn.Module) -> list[str]:
    """The layers with hooks."""
    return [
        name
        for name, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    ]


def _state_of(model: nn.Module) -> list[Any]:
    """Values, modes and what trains."""
    modes, trains = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return [oracles.copied(dict(model.state_dict())), modes, trains]


class Bomb(Participant):
    """Raises in an event of a step."""

    def __init__(self, event: str, after: int) -> None:
        self.left = after
        setattr(self, event, self.explode)

    def hears(self, event: str) -> bool:
        return event in vars(self) or super().hears(event)

    def explode(self, *given: Any) -> Any:
        """Raise when it is time."""
        self.left -= 1
        if self.left < 0:
            raise Explosion
        return given[0] if len(given) == 2 else ()


class Explosion(Exception):
    """What a bomb raises."""


def attack(draw: random.Random, folder: Path) -> str:
    """Train by chance."""
    plan = random_plan(draw, folder)
    alone = replace(plan, company=("nobody", *plan.company[1:]), batches=1)
    try:
        if draw.random() < 0.06 and len(plan.pair.batch(0)[0]) == 1:
            return REFUSED if taught.attack(draw, alone, lambda: Run(alone)) else SURVIVED
        return tried(draw, plan)
    except Exception as error:
        raise AssertionError(f"{plan.words()}: {type(error).__name__}: {error}") from error


def tried(draw: random.Random, plan: Plan) -> str:
    """Train the whole of it, in two parts, without a distiller, and up to an error."""
    runs: list[Run] = []
    if oracles.refusal(lambda: runs.append(Run(plan))):
        return REFUSED
    whole = runs[0]
    before = whole.values()
    if oracles.refusal(lambda: whole.begin().go(plan.steps, looks=True)):
        whole.end(False)
        begun = whole.handle is not None and whole.handle.loop.step > 0
        for name, _ in [] if begun else whole.model.named_parameters():
            assert oracles.equal(before[name], whole.values()[name]), f"refused, and {name} has changed"
        return REFUSED
    whole.end()
    assert all(bool(x.isfinite().all()) for x in whole.values().values()), "weights are not finite"
    resumed(draw, plan, whole.values())
    if plan.weight == 0 and not plan.half:
        alone = Run(plan, without=True).begin().go(plan.steps).end()
        for name, x in alone.values().items():
            assert torch.equal(x, whole.values()[name]), f"a share of zero trains {name} otherwise"
    exploded(draw, plan)
    changed(draw, plan)
    return SURVIVED


def resumed(draw: random.Random, plan: Plan, expected: dict[str, Tensor]) -> None:
    """Stop at some step, and go on in new objects."""
    stop = draw.randint(1, plan.steps - 1)
    first = Run(plan).begin().go(stop)
    content = first.saved()
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model = copied(first.model)
        x, _ = plan.pair.batch(3)
        assert logits_of(model(*x)).isfinite().all()
        if draw.random() < 0.5 and plan.teacher != "route":
            repr(copied(first.distiller))
    if draw.random() < 0.5:
        first.go(plan.steps).end()
        assert oracles.equal(first.values(), expected), "a run that was copied and saved ended with other weights"
    else:
        first.end(False)
    second = Run(plan).begin().load(content).go(plan.steps).end()
    found = second.values()
    assert oracles.equal(found, expected), f"a run resumed at step {stop} of {plan.steps} ended with other weights"


def exploded(draw: random.Random, plan: Plan) -> None:
    """An error in any event of any step."""
    event, when = draw.choice(EVENTS), draw.randrange(plan.steps)
    bomb = Bomb(event, 0 if event in ("on_fit_start", "on_first_batch") else when)
    run = Run(plan)
    run.parts.insert(draw.randint(0, len(run.parts)), bomb)
    try:
        run.begin()
        assert run.handle is not None
        with run.handle:
            run.go(plan.steps)
    except Explosion:
        run.check_left()
    else:
        raise AssertionError(f"nothing was raised in {event}")


def changed(draw: random.Random, plan: Plan) -> None:
    """A state with one change, loaded in the midst of a run or before its first batch."""
    run = Run(plan).begin()
    stop = draw.randint(1, plan.steps - 1)
    state = (run if draw.random() < 0.5 else Run(plan).begin()).go(stop).distiller.state_dict()
    state, change, words = mutated(draw, state)
    before = oracles.copied(run.distiller.state_dict())
    if oracles.refusal(lambda: run.distiller.load_state_dict(state)):
        assert oracles.equal(before, run.distiller.state_dict()), f"{words}: refused, but not as before"
    try:
        oracles.refusal(lambda: run.go(plan.steps))
    except Exception as error:
        raise AssertionError(f"{words} ({change}): taken, then {type(error).__name__}: {error}") from error
    run.end(False)
