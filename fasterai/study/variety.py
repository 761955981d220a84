"""Study of filter variety: three criteria alone and with variety, from scratch and as tickets."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.core import criteria
from fasterai.core.criteria import Criterion, variety
from fasterai.core.participant import Participant
from fasterai.core.schedules import OneCycle
from fasterai.core.variety import similarities
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

#: Batches of training images by whose gradients `taylor` makes a ticket.
BATCHES = 4


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network to a share of its filters, layer by layer, or find a ticket of it and train that.

    From scratch, filters go on the one-cycle schedule. A ticket is the initial network with the mask of the trained one.
    """
    torch.manual_seed(seed)
    network = make_residual(data)
    if settings["way"] == "dense":
        _train(network, data, size, seed)
    elif settings["way"] == "scratch":
        _train(network, data, size, seed, _sparsifier(network, settings, data, size, given=False))
    else:
        _ticket(network, settings, seed, size, data)
    return {"accuracy": accuracy(network, data), "alike": _alike(network)}


def _alike(network: nn.Module) -> float:
    """Return the cosine of a filter that is left to the one most like it in its layer, on the mean."""
    nearest = []
    for _, convolution in _named_convolutions(network):
        filters = convolution.weight.detach().flatten(1)
        filters = filters[filters.any(1)]
        if len(filters) > 1:
            nearest.append(similarities(filters).fill_diagonal_(-1.0).amax(1))
    return float(torch.cat(nearest).mean())


def _train(network: nn.Module, data: Data, size: Size, seed: int, *participants: Participant) -> None:
    train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)


def _sparsifier(network: nn.Module, settings: Settings, data: Data, size: Size, given: bool) -> Sparsifier:
    """Make the sparsifier of a run; `given` that it masks at once, so that it needs batches of its own."""
    batches = _batches(data, BATCHES, size.batch_size) if given else None
    by: Criterion = getattr(criteria, settings["criteria"])
    by = variety(by) if settings["variety"] else by
    return Sparsifier(
        network,
        "filter",
        "local",
        by,
        sparsity=settings["sparsity"],
        schedule=OneCycle(beta=6),
        targets=[name for name, _ in _named_convolutions(network)],
        data=batches,
        loss=F.cross_entropy if given else None,
        example_inputs=data.train[0][:2],
    )


def _batches(data: Data, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data.train
    starts = range(0, min(count * size, len(images)), size)
    return [(images[i : i + size], labels[i : i + size]) for i in starts]


def _named_convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]


def _ticket(network: nn.Module, settings: Settings, seed: int, size: Size, data: Data) -> None:
    """Train, mask by the trained weights, go back to the first ones and train these under the mask."""
    first = copy.deepcopy(network.state_dict())
    sparsifier = _sparsifier(network, settings, data, size, given=True)
    _train(network, data, size, seed)
    sparsifier.sparsify_model()
    network.load_state_dict(first)
    sparsifier.apply_masks()
    _train(network, data, size, seed, sparsifier.hold())


GRID: list[dict[str, list[Any]]] = [
    {"way": ["dense"], "criteria": ["large_final"], "variety": [False], "sparsity": [0.0]},
    {
        "way": ["scratch", "ticket"],
        "criteria": ["large_final", "movement", "taylor"],
        "variety": [False, True],
        "sparsity": [0.5, 0.7, 0.9],
    },
]
STUDY = Study(
    name="variety",
    about="Criteria alone and with variety, at 50, 70 and 90 % of the filters",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="sparsity",
    lines=("way", "criteria", "variety"),
    reference={"way": "dense"},
    sizes={**SIZES, "small": Size("small", 3_000, 2_000, 16, epochs=4)},
)
