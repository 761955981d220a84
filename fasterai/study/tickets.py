"""Study of lottery tickets: the ticket beside its controls, and beside tickets that one training finds on a schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from fasterai.core.participant import Participant
from fasterai.sparse.ticket import Ticket
from fasterai.sparse.ticket_rounds import find_ticket
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

#: Each round leaves half of the weights, so that five trainings give tickets of five sparsities.
ROUNDS = 5
SPARSITIES = [1 - 0.5**k for k in range(1, ROUNDS + 1)]
DENSE, FOUND, ONE_SHOT, ONE_CYCLE = "dense", "ticket, in rounds", "ticket, one_shot", "ticket, one_cycle"
RANDOM, OTHERS = "random mask", "mask on other weights"


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train the ticket of a sparsity, or what it is held against, by magnitude over all layers; rewound to the first weights.

    In rounds, a ticket of 97 % costs five trainings to find; the tickets of one_shot and one_cycle cost one.
    """
    what, sparsity = settings["what"], settings["sparsity"]
    if what == DENSE:
        return {"accuracy": _trained(seed, size, data), "trainings": 1}
    k = SPARSITIES.index(sparsity)
    if what in (ONE_SHOT, ONE_CYCLE):
        schedule = "one_cycle" if what == ONE_CYCLE else None
        ticket = find_ticket(_training(seed, size, data), _network(seed, data), sparsity, schedule=schedule, rounds=1)
        return {"accuracy": _trained(seed, size, data, ticket), "trainings": 2}
    ticket = _rounds(seed, size, data)[k]
    if what == RANDOM:
        ticket = ticket.random(seed)
    elif what == OTHERS:
        ticket = ticket.reinitialised(_network(seed + 1000, data))
    return {"accuracy": _trained(seed, size, data, ticket), "trainings": k + 2}


def _network(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    return make_residual(data)


def _training(seed: int, size: Size, data: Data) -> Callable[[nn.Module, list[Participant]], None]:
    def once(network: nn.Module, participants: list[Participant]) -> None:
        train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)

    return once


def _trained(seed: int, size: Size, data: Data, ticket: Ticket | None = None) -> float:
    """Train a ticket, or the dense network, and return its accuracy."""
    network = _network(seed, data)
    _training(seed, size, data)(network, [] if ticket is None else [ticket.apply(network)])
    return accuracy(network, data)


@lru_cache(maxsize=2)
def _rounds(seed: int, size: Size, data: Data) -> tuple[Ticket, ...]:
    """Find the tickets of all sparsities; three kinds of runs share them."""
    with tempfile.TemporaryDirectory() as folder:
        find_ticket(_training(seed, size, data), _network(seed, data), SPARSITIES[-1], rounds=ROUNDS, folder=folder)
        return tuple(Ticket.load(path) for path in sorted(Path(folder).glob("round_*.safetensors")))


GRID = [
    {"what": [DENSE], "sparsity": [0.0]},
    {"what": [FOUND, ONE_SHOT, ONE_CYCLE, RANDOM, OTHERS], "sparsity": SPARSITIES},
]
STUDY = Study(
    name="tickets",
    about="lottery tickets, and what they are held against",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="sparsity",
    lines="what",
    reference={"what": DENSE},
)
