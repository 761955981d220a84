"""Study of granularities: what it costs that weights go together, at equal shares of zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.sizes import HALF
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network to a share of units; those of a convolution compete, by magnitude, on one_cycle.

    `weight_sparsity` is the share of zeros in the weights of all convolutions: coupled channels take more with them than
    their own share.
    """
    torch.manual_seed(seed)
    network = make_residual(data)
    participants = []
    if settings["granularity"] != "dense":
        sparsifier = Sparsifier(
            network,
            settings["granularity"],
            sparsity=settings["sparsity"],
            context="local",
            layer_type=nn.Conv2d,
            example_inputs=data.train[0][:2],
            round_to=1,
        )
        participants = [sparsifier]
    train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {"accuracy": accuracy(network, data), "weight_sparsity": zeros}


def _grid(names: list[str], sparsities: list[float]) -> list[dict[str, list[Any]]]:
    dense: dict[str, list[Any]] = {"granularity": ["dense"], "sparsity": [0.0]}
    return [dense, {"granularity": names, "sparsity": sparsities}]


FEW = ["weight", "kernel", "channel", "filter", "coupled"]
MORE = ["weight", "row", "column", "kernel", "channel", "shared_weight", "vertical_slice", "horizontal_slice"]
STUDY = Study(
    name="granularities",
    about="Granularities at 50 and 80 % of the units",
    trial=trial,
    grids={
        "small": _grid(FEW, [0.5, 0.8]),
        "full": _grid([*MORE, "shared_kernel", "filter", "coupled"], [0.3, 0.5, 0.7, 0.8, 0.9]),
    },
    x="weight_sparsity",
    lines="granularity",
    sizes=HALF,
    reference={"granularity": "dense"},
)
