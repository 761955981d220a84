"""Study of criteria: which weights a schedule takes, by their size, their way in the training, and data."""

from __future__ import annotations

from typing import Any

import torch

from fasterai.core import criteria
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.sizes import HALF
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network to a sparsity by a criterion; weights compete within their layer, on one_cycle."""
    torch.manual_seed(seed)
    network = make_residual(data)
    participants = []
    if settings["criterion"] != "dense":
        examples = data.train[0][: size.batch_size]  # synflow reads their shape
        participants = [
            Sparsifier(
                network, criteria=settings["criterion"], sparsity=settings["sparsity"], context="local", example_inputs=examples
            )
        ]
    train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return {"accuracy": accuracy(network, data)}


def _grid(names: list[str], sparsities: list[float]) -> list[dict[str, list[Any]]]:
    dense: dict[str, list[Any]] = {"criterion": ["dense"], "sparsity": [0.0]}
    return [dense, {"sparsity": sparsities, "criterion": names}]


FEW = ["random", "large_final", "large_init", "magnitude_increase", "movement", "updating_movement", "taylor", "wanda"]
STUDY = Study(
    name="criteria",
    about="Criteria at 90 and 97 % of the weights",
    trial=trial,
    grids={
        "tiny": _grid(["large_final", "updating_movement", "taylor", "wanda"], [0.9]),
        "small": _grid(FEW, [0.9, 0.97]),
        "full": _grid([name for name in criteria.__all__ if name != "fpgm"], [0.8, 0.9, 0.95, 0.97, 0.99]),
    },
    x="criterion",
    lines="sparsity",
    sizes=HALF,
    reference={"criterion": "dense"},
)
