"""A network with all that going back may forget, and its training, for the tests of tickets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant

X, Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3


class Net(nn.Module):
    """72 + 24 weights, a norm's statistics, a raw parameter, a PReLU, and two buffers, one of which no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.PReLU()
        self.inner = nn.Linear(8, 8, bias=False)
        self.raw = nn.Parameter(torch.ones(8))
        self.last = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.full((4,), float("inf")), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.mean = x.detach().mean(0)
        return self.last(self.inner(self.act(self.norm(self.first(x)))) * self.raw)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():  # as after an earlier training
        model.norm.running_mean.fill_(3.0)
        model.norm.weight.uniform_(1.0, 2.0)
    return model


def train(model: nn.Module, participants: Sequence[Participant] = (), steps: int = 6) -> float:
    """Train on batches that the global generator draws, and return the accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    model.train()
    with attach(optimizer, *participants, total_steps=steps):
        for _ in range(steps):
            step(model, optimizer)
    return float((model.eval()(X).argmax(1) == Y).float().mean())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rows = torch.randperm(len(X))[:16]
    optimizer.zero_grad()
    F.cross_entropy(model(X[rows]), Y[rows]).backward()
    optimizer.step()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by torch's own walk."""
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
