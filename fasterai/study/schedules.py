"""Study of schedules: the One-Cycle claim, that a schedule which begins and ends slowly loses least at high sparsity."""

from __future__ import annotations

from typing import Any

import torch

from fasterai.core.schedules import OneCycle, Schedule, agp, iterative, one_shot
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

SCHEDULES: dict[str, Schedule] = {
    "one_shot": one_shot,
    "iterative": iterative,
    "agp": agp,
    "one_cycle, beta 5": OneCycle(beta=5),
    "one_cycle, beta 6": OneCycle(beta=6),
}


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network to a sparsity on a schedule; weights compete within their layer, by magnitude."""
    torch.manual_seed(seed)
    network = make_residual(data)
    participants = []
    if settings["schedule"] != "dense":
        schedule = SCHEDULES[settings["schedule"]]
        participants = [Sparsifier(network, sparsity=settings["sparsity"], context="local", schedule=schedule)]
    train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return {"accuracy": accuracy(network, data)}


GRID: list[dict[str, list[Any]]] = [
    {"schedule": ["dense"], "sparsity": [0.0]},
    {"schedule": list(SCHEDULES), "sparsity": [0.8, 0.9, 0.95, 0.97]},
]
STUDY = Study(
    name="schedules",
    about="Schedules from 80 to 97 % of the weights",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="sparsity",
    lines="schedule",
    reference={"schedule": "dense"},
)
