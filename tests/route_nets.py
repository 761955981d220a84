"""A student, a teacher and its anchors, and their trainings, for the tests of routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.distill.routes.result import RouteResult
from fasterai.distill.routes.route import Route

X, Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3


class Net(nn.Module):
    """Two layers and a norm; a student of width 6, or a teacher of another one."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.1, self.training))


def student(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def teacher(seed: int = 100) -> Net:
    torch.manual_seed(seed)
    return Net(8).eval()


def anchors(count: int = 4) -> list[dict[str, Tensor]]:
    """State dicts of so many teachers, all different."""
    return [{name: x.clone() for name, x in teacher(100 + i).state_dict().items()} for i in range(count)]


def train(model: nn.Module, participants: Sequence[Participant] = (), steps: int = 4, optimizer: Any = None) -> float:
    """Train on batches that the global generator draws, and return a figure of the model."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 0.05)
    model.train()
    with attach(optimizer, *(participants or [Participant()]), epochs=steps // 2, steps_per_epoch=2, model=model) as handle:
        for _ in range(steps):
            rows = torch.randperm(len(X))[:16]
            optimizer.zero_grad()
            outputs = model(X[rows])
            handle.loss(F.cross_entropy(outputs, Y[rows]), X[rows], Y[rows], outputs).backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(X), Y))


def route(count: int = 4) -> Route:
    return Route.from_checkpoints(anchors(count), teacher())


def distilled(
    folder: str | Path | None = None, train: Any = train, seed: int = 0, model: Any = None, **options: Any
) -> tuple[dict[str, Tensor], RouteResult]:
    """The student's tensors and the result of a whole call."""
    model, found = student() if model is None else model, route()
    torch.manual_seed(seed)
    result = found.distil(train, model, folder=folder, **options)
    return {name: x.detach().clone() for name, x in model.state_dict().items()}, result
