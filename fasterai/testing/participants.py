"""Checks of participants: what takes part in a training has to go on after any step, and to leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.methods import made
from fasterai.callbacks.plain import Handle, attach
from fasterai.core.loop import Participant
from fasterai.testing.promises import attempt, require

__all__ = ["check_participant"]

#: A function of the model that makes a participant, or several that belong together.
Make = Callable[[nn.Module], Participant | Iterable[Participant]]
CLASSES, BATCH = 4, 8
NOTES = {"_shapes_before_cuts"}  # what a smaller model is told apart by


def check_participant(make: Make, network: Callable[[], nn.Module] | None = None, *, steps: int = 6) -> None:
    """Check the promises of a participant, or of several that belong together, in a loop of one's own.

    Its state holds tensors, numbers and text only, as copies; a run that is broken off after any step and goes on in fresh
    objects ends with the same weights, states and optimizer, bit for bit; a copy of model, optimizer and participant in the
    midst of a run is of its own model; an optimizer that fails in its step leaves a model that can be trained on; a run without
    a step changes no weight; figures are finite, and have the same names before and after; hooks, graphs, outputs and
    attributes do not stay, and the optimizer has its own parameters afterwards.

    Args:
        make: Makes it for a model; called anew for each run.
        network: Makes the model, each time the same, which returns logits of 4 classes. It gets batches of the shape of its
            attribute `example`, or of (8, 8). A small network of linear layers by default.
        steps: Steps of a run, at least 2.

    Raises:
        AssertionError: A promise is broken.
    """
    trial = _Trial(make, network or _small, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = _check_run(trial)
        for step in range(1, steps):
            _check_resume(trial, step, saved[step], saved[-1])
        _check_copies(trial)
        _check_no_step(trial)
        _check_failure(trial)


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@dataclass(frozen=True)
class _Trial:
    """A participant on trial: how its runs begin."""

    make: Make
    network: Callable[[], nn.Module]
    steps: int

    def begin(self) -> _Run:
        """Make everything as at first."""
        model = self.network()
        torch.manual_seed(1)
        given = made([self.make], model)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        before = [p.detach().clone() for p in model.parameters()]
        handle = attempt("a run must begin", lambda: attach(optimizer, *given, total_steps=self.steps, model=model))
        return _Run(model, given, optimizer, handle, before)


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    participants: Sequence[Participant]
    optimizer: torch.optim.Optimizer
    handle: Handle
    before: Sequence[Tensor]

    def step(self, number: int) -> weakref.ref[Tensor]:
        """Take a step with its own batch and random numbers; return a weak reference to the outputs."""
        torch.manual_seed(100 + number)
        x = getattr(self.model, "example", torch.zeros(BATCH, 8))
        x, y = torch.randn(x.shape), torch.arange(len(x)) % CLASSES
        outputs = self.model(x)
        self.handle.loss(F.cross_entropy(outputs, y), x, y, outputs).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return weakref.ref(outputs)

    def saved(self) -> bytes:
        """Return what a file of the run would hold."""
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "run": self.handle.state_dict()}
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from a file; where the model has got smaller its weights come last."""
        state = _read(saved)
        own, shapes = self.model.state_dict(), state["model"]
        fits = all(own[name].shape == shapes[name].shape for name in own)
        if not fits:
            self.handle.load_state_dict(state["run"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if fits:
            self.handle.load_state_dict(state["run"])


def _read(saved: bytes) -> dict[str, Any]:
    state: dict[str, Any] = attempt(
        "a state must hold tensors, numbers and text only", lambda: torch.load(io.BytesIO(saved), weights_only=True)
    )
    return state


def _check_run(trial: _Trial) -> list[bytes]:
    """Check a whole run; return what its files hold, before the first step and after each."""
    marks = {name: set(vars(module)) for name, module in trial.network().named_modules()}
    run = trial.begin()
    figures = list(run.handle.metrics())
    saved, held = [run.saved()], run.handle.state_dict()
    _read(saved[0])
    graphs = [where for where, x in _tensors(held) if x.requires_grad]
    require(not graphs, f"a state must be detached, got {', '.join(graphs)}")
    kept = copy.deepcopy(held)
    for number in range(trial.steps):
        outputs = run.step(number)
        saved.append(run.saved())
    if outputs() is not None:
        gc.collect()  # slow
    require(outputs() is None, "outputs of a step must not be kept after it")
    require(_alike(held, kept), "a state must be a copy: one that was taken has changed in later steps")
    run.handle.remove()
    _check_traces(run, marks)
    saved.append(run.saved())
    require(_figures(run) == figures, f"figures must have the same names before and after a run, got {figures} at first")
    return saved


def _figures(run: _Run) -> list[str]:
    found = run.handle.metrics()
    for name, value in found.items():
        require(
            isinstance(value, float | int) and math.isfinite(value), f"figures must be finite numbers, got {name}: {value!r}"
        )
    return list(found)


def _check_traces(run: _Run, marks: Mapping[str, set[str]]) -> None:
    """Check that nothing stays on the model and the optimizer."""
    for name, module in run.model.named_modules():
        hooks = [k for k, v in vars(module).items() if k.endswith("_hooks") and v]
        require(not hooks, f"{name or 'the model'} must have no hooks after a run, got {', '.join(hooks)}")
        more = {key for key in vars(module).keys() - marks.get(name, vars(module).keys()) if key not in NOTES}
        require(
            not more, f"{name or 'the model'} must have its own attributes alone after a run, got {', '.join(sorted(more))}"
        )
    for name, p in run.model.named_parameters():
        require(p.is_leaf, f"{name} must be a leaf after a run")
    for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        require(not getattr(run.optimizer, kind), "the optimizer must have no hooks after a run")
    trained = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    require(trained == [id(p) for p in run.model.parameters()], "the optimizer must have the model's parameters after a run")


def _check_resume(trial: _Trial, step: int, saved: bytes, end: bytes) -> None:
    """Check that a run goes on after a step, in fresh objects, as if nothing had happened."""
    run = trial.begin()
    state = _read(saved)
    attempt(f"a state of step {step} must load", lambda: run.load(saved))
    require(run.handle.loop.step == step, f"a run must go on at step {step}, got {run.handle.loop.step}")
    again = _read(run.saved())
    differs = _difference(state, again)
    require(not differs, f"a state of step {step} must be the same when it was loaded and is saved again, got other {differs}")
    for number in range(step, trial.steps):
        run.step(number)
    run.handle.remove()
    differs = _difference(_read(end), _read(run.saved()))
    require(not differs, f"a run that goes on after step {step} must end as one that was not broken off, got other {differs}")


def _check_copies(trial: _Trial) -> None:
    """Check that copies in the midst of a run are of their own model."""
    run = trial.begin()
    first = [participant.state_dict() for participant in run.participants]
    run.step(0)
    before = _read(run.saved())
    pair = attempt("model and participants must deepcopy", lambda: copy.deepcopy((run.model, list(run.participants))))
    states = [participant.state_dict() for participant in pair[1]]
    own = [participant.state_dict() for participant in run.participants]
    require(_alike(states, own), "the state of a copy must be that of the original")
    for participant, state in zip(pair[1], first, strict=True):
        participant.load_state_dict(state)
    with torch.no_grad():
        for p in pair[0].parameters():
            p.fill_(1.0)
    require(not _difference(before, _read(run.saved())), "a copy must share no weight or state with the original")
    run.handle.remove(completed=False)


def _check_no_step(trial: _Trial) -> None:
    """Check that a run that ends before its first step leaves the weights of before."""
    run = trial.begin()
    run.handle.remove(completed=False)
    pairs = zip(run.before, run.model.parameters(), strict=True)
    require(all(torch.equal(a, b) for a, b in pairs), "a run without a step must leave the weights as they were")


def _check_failure(trial: _Trial) -> None:
    """Check that a step that fails ends in a state that can be saved, loaded and trained on."""
    run = trial.begin()
    run.step(0)
    hook = run.optimizer.register_step_pre_hook(_fail)
    with contextlib.suppress(MemoryError):
        run.step(1)
    hook.remove()
    run.optimizer.zero_grad()
    run.handle.remove(completed=False)
    marks = {name: set(vars(module)) for name, module in run.model.named_modules()}
    _check_traces(run, marks)
    state = [participant.state_dict() for participant in run.participants]
    handle = attempt(
        "a run must begin after one that failed",
        lambda: attach(run.optimizer, *run.participants, total_steps=trial.steps, model=run.model),
    )
    own = [participant.state_dict() for participant in run.participants]
    require(all(a.keys() == b.keys() for a, b in zip(state, own, strict=True)), "a state must have the same parts in each run")
    _Run(run.model, run.participants, run.optimizer, handle, run.before).step(2)
    handle.remove(completed=False)
    require(all(p.isfinite().all() for p in run.model.parameters()), "weights must be finite after a step that failed")


def _fail(*_: Any) -> None:
    raise MemoryError


def _tensors(state: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk over the tensors of a state with their places."""
    if isinstance(state, Tensor):
        yield where, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{where}.{key}".lstrip("."))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _tensors(value, f"{where}[{i}]")


def _difference(a: Any, b: Any, where: str = "") -> str:
    """Return the first place where two states differ, empty if they are equal bit for bit."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return where or "keys"
        return next((found for key in a if (found := _difference(a[key], b[key], f"{where}.{key}".lstrip(".")))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return where
        return next(
            (found for i, (x, y) in enumerate(zip(a, b, strict=True)) if (found := _difference(x, y, f"{where}[{i}]"))), ""
        )
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return "" if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else where or "value"
    return "" if type(a) is type(b) and (a == b or repr(a) == repr(b) == "nan") else where or "value"


def _alike(a: Any, b: Any) -> bool:
    return not _difference(a, b)
