"""Study of N:M: sparse from the first step (SR-STE, STE, with N falling), and dense training cut once, at equal epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fasterai.core.contexts import NM
from fasterai.sparse.nm.sad import sad
from fasterai.sparse.nm.srste import SRSTE, STE
from fasterai.sparse.nm.training import NMTraining
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

METHODS = ("SR-STE", "SR-STE, N falling", "STE", "one-shot")


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network at N:M, and count the flips of its masks; "one-shot" is dense for half of the epochs.

    One-shot is the peer's recipe (ASP) at equal total epochs: half of them dense, then N:M by magnitude at once, then the other
    half with these masks held, under the same learning rates over again.
    """
    torch.manual_seed(seed)
    network = make_residual(data)
    options: dict[str, Any] = {"lr": size.lr, "batch_size": size.batch_size}
    flips = 0.0
    if settings["method"] == "dense":
        train(network, data, epochs=size.epochs, seed=seed, **options)
    elif settings["method"] == "one-shot":
        first = (size.epochs + 1) // 2
        train(network, data, epochs=first, seed=seed, **options)
        n, m = read_pattern(settings["pattern"])
        sparsifier = Sparsifier(network, context=NM(n, m))
        sparsifier.sparsify_model(1 - n / m)
        train(network, data, [sparsifier.hold()], epochs=max(1, size.epochs - first), seed=1_000 + seed, **options)
    else:
        training = make_training(settings["method"], network, *read_pattern(settings["pattern"]))
        train(network, data, [training], epochs=size.epochs, seed=seed, **options)
        found = sad(training)
        flips = found.overall / sum(found.weights.values())
    return {"accuracy": accuracy(network, data), "flips per weight": flips}


def read_pattern(pattern: str) -> tuple[int, int]:
    """Return N and M.

    >>> read_pattern("2:4")
    (2, 4)
    """
    n, m = pattern.split(":")
    return int(n), int(m)


def make_training(method: str, network: nn.Module, n: int, m: int) -> NMTraining:
    """Make the participant of a method."""
    if method == "STE":
        return STE(network, n, m)
    return SRSTE(network, n, m, schedule="one_cycle" if "falling" in method else None)


GRID: list[dict[str, list[Any]]] = [
    {"method": ["dense"], "pattern": ["1:1"]},
    {"method": list(METHODS), "pattern": ["2:4", "1:4", "2:8"]},
]
STUDY = Study(
    name="nm",
    about="N:M from the first step, and at once",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    x="pattern",
    lines="method",
    reference={"method": "dense"},
)
