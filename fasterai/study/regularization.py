"""Study of regularisation: units of other sizes at the same strength, and channels driven to silence beside magnitude."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fasterai.analyze.cost import cost
from fasterai.core.participant import Participant
from fasterai.core.schedules import Piecewise
from fasterai.prune.choice.budget import Budget
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.removal import remove
from fasterai.regularize.penalties import GroupLasso
from fasterai.regularize.regularizer import Regularizer
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.sizes import SIZES
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

LOSS, REMOVAL = "l1 in the loss", "exact removal"
LASSO, MAGNITUDE, DENSE = "group lasso", "magnitude", "dense"
#: Share of the highest learning rate at which a trained network loses its channels, and images in a step then.
LOWER, FEWER = 0.5, 2
#: Grows from 0 to the strength, and is a tenth of it afterwards: what is zero stays so, and the rest recovers.
GROWING = Piecewise(((0.0, 0.0), (0.6, 1.0), (0.6, 0.1)))
#: For many short runs: half as many images as for other studies.
QUARTER = {**SIZES, "small": replace(SIZES["small"], images=3_000, epochs=3)}


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a new network with a penalty on its weights or filters, or take channels out of a trained one.

    Channels go by group lasso, proximal and growing, and the exact removal of what is silent; or by magnitude, gradually, down
    to the multiply-accumulates that group lasso has reached with the same seed and strength.
    """
    method, strength = settings["method"], float(settings["strength"])
    if settings["part"] == LOSS:
        network = _new(seed, data)
        made = [] if method == DENSE else [Regularizer(network, "large_final", method, strength, layer_type=nn.Conv2d)]
        train(network, data, made, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
        return {"accuracy": accuracy(network, data), "macs_share": 1.0}
    if method == MAGNITUDE:
        macs = _small(LASSO, strength, seed, size, data)["macs_share"]
        return _small(MAGNITUDE, macs, seed, size, data)
    return _small(method, strength, seed, size, data)


def _new(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    return make_residual(data)


@lru_cache(maxsize=8)
def _dense(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the network that all runs of a seed begin with."""
    network = _new(seed, data)
    train(network, data, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network


@lru_cache(maxsize=16)
def _small(method: str, amount: float, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train the dense network on, and remove channels; the amount is a strength, or a share of the multiply-accumulates."""
    network = copy.deepcopy(_dense(seed, size, data))
    inputs = data.train[0][:2]
    before = cost(network.eval(), inputs).macs
    participants: list[Participant] = []
    if method == LASSO:
        options: dict[str, Any] = {"penalty": GroupLasso(alpha=6), "how": "proximal", "example_inputs": inputs}
        participants.append(Regularizer(network, "large_final", "coupled", amount, GROWING, **options))
    elif method == MAGNITUDE and amount < 1:
        options = {"example_inputs": inputs, "max_updates": 5}
        participants.append(GradualPruner(network, Budget(macs=amount), "global", "large_final", "one_cycle", **options))
    batch_size, lr = max(2, size.batch_size // FEWER), LOWER * size.lr
    train(network, data, participants, epochs=size.epochs, lr=lr, seed=seed + 1000, batch_size=batch_size)
    network.eval()
    if method == LASSO:
        remove(network, inputs, measure=False)
    return {"accuracy": accuracy(network, data), "macs_share": cost(network, inputs).macs / before}


GRID: list[dict[str, list[Any]]] = [
    {"part": [REMOVAL], "method": [LASSO, MAGNITUDE], "strength": ["0.001", "0.002"]},
    {"part": [REMOVAL, LOSS], "method": [DENSE], "strength": ["0"]},
    {"part": [LOSS], "method": ["weight", "filter"], "strength": ["1e-3", "1e-1"]},
]
TINY: list[dict[str, list[Any]]] = [
    {"part": [REMOVAL], "method": [LASSO, MAGNITUDE], "strength": ["0.002"]},
    {"part": [LOSS], "method": ["filter"], "strength": ["1e-3"]},
]
STUDY = Study(
    name="regularization",
    about="Penalties on weights and filters, and group lasso with exact removal beside magnitude",
    trial=trial,
    grids={"tiny": TINY, "small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="strength",
    lines="method",
    panels="part",
    sizes=QUARTER,
    reference={"method": DENSE},
)
