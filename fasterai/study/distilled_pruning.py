"""Study of pruning with a teacher: the network as it was, dense, teaches the one that loses its weights or channels."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fasterai.core.participant import Participant
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.sizes import HALF
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

PLAIN, DISTILLED, DISTILLED_SCRATCH, SCRATCH = "alone", "distilled", "from scratch, distilled", "from scratch"
#: Share of the highest learning rate at which a trained network is pruned.
LOWER = 0.5
#: How many times as long as the pruning the dense network is trained.
LONGER = 4


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Prune a network on the one-cycle schedule, by magnitude in each layer, while it trains, and remove coupled channels.

    It is the dense network that was trained before or, from scratch, a new one. The trained one teaches, and stays dense.
    """
    how, granularity, sparsity = settings["training"], settings["granularity"], settings["sparsity"]
    dense = _dense(seed, size, data)
    scratch = how in (SCRATCH, DISTILLED_SCRATCH)
    network = _new(seed + 2000, data) if scratch else copy.deepcopy(dense)
    inputs = data.train[0][:2]
    participants: list[Participant] = []
    if sparsity:
        options: dict[str, Any] = {"schedule": "one_cycle", "example_inputs": inputs}
        participants.append(Sparsifier(network, granularity, "local", "large_final", sparsity=sparsity, **options))
    if how in (DISTILLED, DISTILLED_SCRATCH):
        participants.append(Distiller(copy.deepcopy(dense), SoftTarget(T=4), weight=0.9))
    lr = size.lr if scratch else LOWER * size.lr
    train(network, data, participants, epochs=size.epochs, lr=lr, seed=seed + 1000, batch_size=size.batch_size)
    if granularity == "coupled":
        network.eval()
        remove(network, inputs, measure=False)
    parameters = sum(int(p.count_nonzero()) for p in network.parameters())
    unpruned = accuracy(copy.deepcopy(dense), data)
    return {"accuracy": accuracy(network, data), "unpruned_accuracy": unpruned, "parameters": float(parameters)}


def _new(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    return make_residual(data)


@lru_cache(maxsize=2)
def _dense(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the network that all runs of a seed begin with, or learn from."""
    network = _new(seed, data)
    train(network, data, epochs=LONGER * size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network


HOW = [PLAIN, DISTILLED]
GRID: list[dict[str, list[Any]]] = [
    {"training": HOW, "granularity": ["weight"], "sparsity": [0.0, 0.8, 0.95]},
    {"training": HOW, "granularity": ["coupled"], "sparsity": [0.5, 0.75]},
]
FROM_SCRATCH: list[dict[str, list[Any]]] = [
    {"training": [SCRATCH, DISTILLED_SCRATCH], "granularity": ["weight"], "sparsity": [0.8, 0.95]},
    {"training": [SCRATCH, DISTILLED_SCRATCH], "granularity": ["coupled"], "sparsity": [0.5, 0.75]},
]
STUDY = Study(
    name="distilled_pruning",
    about="Pruning with and without the dense network as a teacher",
    trial=trial,
    grids={"small": GRID, "full": [*GRID, *FROM_SCRATCH]},
    seeds={"full": range(5)},
    x="sparsity",
    lines="training",
    panels="granularity",
    sizes=HALF,
)
