"""Looks: a model that is looked at (graph, cost, times, sensitivity, sparsifier, pruner, files) is as it was.

Weights and buffers to the bit, gradients, modes, hooks, the identity of every attribute and of what it holds, the state of
all generators of random numbers, and torch's settings.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.analyze.comparison import compare
from fasterai.analyze.cost import cost
from fasterai.analyze.latency import latency
from fasterai.analyze.sensitivity import sensitivity
from fasterai.callbacks.plain import attach
from fasterai.core import criteria
from fasterai.export.all import export_onnx, export_program
from fasterai.graph.channels import channel_graph
from fasterai.prune.all import Pruner, save_small
from fasterai.prune.choice.budget import Budget
from fasterai.sparse.sparsifier import Sparsifier
from tests.attack import oracles
from tests.attack.networks import Net, random_net
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 100, 120


class Host(nn.Module):
    """A network with what networks of others have: shared lists, a layer under two names, a head for training, hooks."""

    def __init__(self, body: nn.Module, draw: random.Random) -> None:
        super().__init__()
        self.body = body
        self.notes: list[Any] = [1, {"a": [2]}, "text"]
        if draw.random() < 0.5:
            body.notes = self.notes  # type: ignore[assignment]
        if draw.random() < 0.5:
            self.layers = nn.ModuleList([next(m for m in body.modules() if not list(m.children()))])
        if draw.random() < 0.5:
            self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.table = {"body": 3, "list": [torch.ones(2)]}
        self.outputs: list[Tensor] = []
        self.is_counting = draw.random() < 0.3
        self.scale = nn.Parameter(torch.ones(1)) if draw.random() < 0.3 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.is_counting and hasattr(self, "calls"):
            self.calls += 1
        y = self.body(x)
        return y if self.scale is None else y * self.scale


def hooked(module: nn.Module, inputs: Any, output: Any) -> None:
    """Do nothing, as a hook."""


def random_host(draw: random.Random) -> tuple[nn.Module, Net]:
    """A network in a state by chance: modes, gradients, frozen parts, hooks."""
    net = random_net(draw)
    model = Host(net.model(), draw)
    net.loss(model, 0).backward()
    for module in model.modules():
        if draw.random() < 0.3:
            module.training = not module.training
        if draw.random() < 0.1:
            module.register_forward_hook(hooked)
    for parameter in model.parameters():
        if draw.random() < 0.15:
            parameter.requires_grad_(False)
        if draw.random() < 0.2:
            parameter.grad = None
    return model, net


LOOKS: dict[str, Callable[..., object]] = {
    "graph": lambda m, x, b, f, d: channel_graph(m, x),
    "cost": lambda m, x, b, f, d: cost(m, x),
    "latency": lambda m, x, b, f, d: latency(m, x, min_run_time=0.01, batch_sizes=None),
    "compare": lambda m, x, b, f, d: compare({"a": m, "b": m}, x, latency=False, batch_sizes=None),
    "sensitivity": lambda m, x, b, f, d: sensitivity(
        m, lambda one: float(F.cross_entropy(one(x), b[1]).detach()), sparsities=(0.5,), progress=False
    ),
    "sparsifier": lambda m, x, b, f, d: Sparsifier(
        m, d.choice(("weight", "filter", "row", "coupled")), d.choice(("local", "global")), d.choice(criteria.__all__),
        sparsity=0.5, data=[b], loss=F.cross_entropy, example_inputs=x,
    ).report(),
    "attached": lambda m, x, b, f, d: _attached(m, x, b, d),
    "pruner": lambda m, x, b, f, d: Pruner(m, 0.5, "local", "large_final", example_inputs=x),
    "budget": lambda m, x, b, f, d: Pruner(m, Budget(params=0.7), "global", "large_final", example_inputs=x),
    "save": lambda m, x, b, f, d: save_small(f / "small.safetensors", m),
    "onnx": lambda m, x, b, f, d: export_onnx(m, x, f / "m.onnx"),
    "program": lambda m, x, b, f, d: export_program(m, x, f / "m.pt2"),
}  # fmt: skip
RARE = ("onnx", "program", "latency")


def _attached(model: nn.Module, x: Tensor, batch: tuple[Tensor, Tensor], draw: random.Random) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(
        model, "weight", "local", draw.choice(criteria.__all__), sparsity=0.5, data=[batch], loss=F.cross_entropy,
        example_inputs=x,
    )  # fmt: skip
    attach(optimizer, sparsifier, total_steps=3, loss=F.cross_entropy).remove(completed=False)


def attack(draw: random.Random, folder: Path) -> str:
    """Look at a network in one way by chance, by everything that it may have moved."""
    model, net = random_host(draw)
    look = draw.choice([n for n in LOOKS if n not in RARE] * 3 + list(RARE))
    batch = net.batch(1, 4)
    seen = Snapshot(model)
    said = oracles.refusal(lambda: LOOKS[look](model, batch[0], batch, folder, draw))
    if differences := seen.differences(model):
        raise AssertionError(f"{look} of {net.kind} changed {'; '.join(differences[:4])} (refused: {said})")
    copy.deepcopy(model)
    return REFUSED if said else SURVIVED


class Snapshot:
    """Everything of a model and of the process that a look must leave as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {n: oracles.bytes_of(x) for n, x in _tensors(model)}
        self.marks = _marks(model)
        self.world = _world()
        self.kept = list(model.modules())  # so that no number of an object is given away again

    def differences(self, model: nn.Module) -> list[str]:
        """What is not as it was."""
        values, marks, world = {n: oracles.bytes_of(x) for n, x in _tensors(model)}, _marks(model), _world()
        found = [n for n in {**self.values, **values} if self.values.get(n) != values.get(n)]
        found += [
            f"{n} ({self.marks.get(n)} -> {marks.get(n)})" for n in {**self.marks, **marks} if self.marks.get(n) != marks.get(n)
        ]
        return found + [n for n in world if not oracles.equal(world[n], self.world[n])]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return found + [(f"{n}.grad", p.grad) for n, p in model.named_parameters() if p.grad is not None]


def _marks(model: nn.Module) -> dict[str, Any]:
    """The identity of every attribute, and of what lists and dicts hold."""
    marks: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if attribute == "_flat_weight_refs":  # torch's recurrent layers make it anew whenever a weight is set
                continue
            _mark(f"{name}.{attribute}", value, marks)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        marks[f"{name} grad"] = id(parameter.grad) if parameter.grad is not None else None
        marks[f"{name} trains"], marks[f"{name} data"] = parameter.requires_grad, parameter.data_ptr()
    return marks


def _mark(name: str, value: Any, marks: dict[str, Any]) -> None:
    marks[name] = (type(value).__name__, id(value)) if not isinstance(value, bool | int | float | str) else value
    if isinstance(value, dict):
        for key, inner in value.items():
            _mark(f"{name}[{key}]", inner, marks)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _mark(f"{name}[{i}]", inner, marks)


def _world() -> dict[str, Any]:
    return {
        "torch's random numbers": torch.get_rng_state(),
        "numpy's random numbers": [str(x) for x in np.random.get_state()],
        "Python's random numbers": hash(random.getstate()),
        "gradients": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
    }
