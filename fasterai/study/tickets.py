"""Study of lottery tickets: the ticket beside its controls, and beside tickets that one training finds on a schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.participant import Participant
from fasterai.model.snapshots import put_back_, take_snapshot
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.rounds import find_ticket
from fasterai.sparse.tickets.ticket import Ticket
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

#: Each round leaves half of the weights, so that five trainings give tickets of five sparsities.
ROUNDS = 5
SPARSITIES: list[float] = [1 - 0.5**k for k in range(1, ROUNDS + 1)]
DENSE, FOUND, ONE_SHOT, ONE_CYCLE = "dense", "ticket, in rounds", "ticket, one_shot", "ticket, one_cycle"
RANDOM, OTHERS = "random mask", "mask on other weights"


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train the ticket of a sparsity, or what it is held against, by magnitude over all layers; rewound to the first weights.

    `trainings` counts those of finding it, and its own: a ticket of 97 % costs five to find in rounds, and one on a schedule.
    """
    what, found = settings["what"], _search(seed, size, data)
    if what == DENSE:
        return {"accuracy": found.results[0], "trainings": 1}
    k = SPARSITIES.index(settings["sparsity"])
    if what == FOUND and k + 1 < ROUNDS:  # the next round has trained it
        return {"accuracy": found.results[k + 1], "trainings": k + 2}
    ticket = _ticket(what, k, found, seed, size, data)
    network = _network(seed, data)
    accuracy = _training(seed, size, data)(network, [ticket.apply(network)])
    return {"accuracy": accuracy, "trainings": 2 if what in (ONE_SHOT, ONE_CYCLE) else k + 2}


def _ticket(what: str, k: int, found: Found, seed: int, size: Size, data: Data) -> Ticket:
    network = _network(seed, data)
    if what == ONE_CYCLE:
        return find_ticket(_training(seed, size, data), network, SPARSITIES[k], schedule="one_cycle", rounds=1)
    if what == ONE_SHOT:
        put_back_(network, found.trained)
        sparsifier = Sparsifier(network, context="global")
        sparsifier.sparsify_model(SPARSITIES[k])
        return Ticket.of(sparsifier, found.tickets[0].weights)
    ticket = found.tickets[k]
    if what == RANDOM:
        return ticket.random(seed)
    return ticket.reinitialised(_network(seed + 1000, data)) if what == OTHERS else ticket


def _network(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    return make_residual(data)


def _training(seed: int, size: Size, data: Data) -> Callable[[nn.Module, list[Participant]], float]:
    def once(network: nn.Module, participants: list[Participant]) -> float:
        train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
        return accuracy(network, data)

    return once


@dataclass(frozen=True)
class Found:
    """Tickets of all sparsities, of one search.

    Attributes:
        tickets: The ticket of each round.
        results: The accuracy at the end of each round's training: of the dense network, then of the ticket of the round before.
        trained: The tensors of the dense network at the end of its training.
    """

    tickets: tuple[Ticket, ...]
    results: tuple[float, ...]
    trained: Mapping[str, Tensor]


@lru_cache(maxsize=2)
def _search(seed: int, size: Size, data: Data) -> Found:
    """Find tickets in rounds; all runs of a seed share them."""
    trained: list[Mapping[str, Tensor]] = []

    def once(network: nn.Module, participants: list[Participant]) -> float:
        result = _training(seed, size, data)(network, participants)
        trained.append(take_snapshot(network))
        return result

    with tempfile.TemporaryDirectory() as folder:
        last = find_ticket(once, _network(seed, data), SPARSITIES[-1], rounds=ROUNDS, folder=folder)
        tickets = tuple(Ticket.load(path) for path in sorted(Path(folder).glob("round_*.safetensors")))
    return Found(tickets, tuple(float(one or 0.0) for one in last.results), trained[0])


GRID: list[dict[str, Sequence[Any]]] = [
    {"what": [DENSE], "sparsity": [0.0]},
    {"what": [FOUND, ONE_SHOT, ONE_CYCLE, RANDOM, OTHERS], "sparsity": SPARSITIES},
]
STUDY = Study(
    name="tickets",
    about="Lottery tickets, and what they are held against",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="sparsity",
    lines="what",
    reference={"what": DENSE},
    sizes={**SIZES, "small": Size("small", 3_000, 2_000, 16, epochs=4)},
)
