"""Study of retrieval: small networks whose embeddings find images of the same class, alone or taught by a larger one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.participant import Participant
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.embeddings import (
    EmbeddingCosine,
    EmbeddingLoss,
    EmbeddingRegression,
    Relational,
    RelativeTriplet,
    distances,
    l2_norm,
    mean_triplet,
)
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import draw_batches, make_residual, take_steps

__all__ = ["STUDY", "trial"]

#: Widths of the residual networks, and dimensions of the teacher's embedding.
TEACHER, STUDENT, DIMENSIONS = 24, 8, 64
MARGIN, WEIGHT = 0.3, 0.5
#: Method -> the loss of the distillation, and its weight.
LOSSES: dict[str, tuple[EmbeddingLoss, float]] = {
    "regression, batch norm": (EmbeddingRegression(), WEIGHT),
    "regression, l2": (EmbeddingRegression(norm="l2"), WEIGHT),
    "regression alone": (EmbeddingRegression(), 1.0),
    "cosine": (EmbeddingCosine(), WEIGHT),
    "relational": (Relational(), WEIGHT),
    "relational alone": (Relational(), 1.0),
    "relative triplet": (RelativeTriplet(MARGIN), WEIGHT),
}
#: Those that are tried with a narrower embedding than the teacher's.
FEWER = ["regression, batch norm", "regression alone", "relational alone", "relative triplet"]


class L2(nn.Module):
    """Embeddings of one length."""

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings `(B, D)` of length sqrt(D)."""
        return l2_norm(x)


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train an embedding by triplets, with or without a teacher, and look for each test image among the others."""
    method, norm = settings["method"], settings["norm"]
    if method == "teacher":
        return _found(_teacher(norm, seed, size, data), data)
    torch.manual_seed(seed)
    student = make_embedding(data, STUDENT, settings["dimensions"], norm)
    taught: list[Participant] = []
    if method != "alone":
        loss, weight = LOSSES[method]
        taught = [Distiller(_teacher("batch", seed, size, data), loss, weight=weight)]
    _train(student, data, taught, size, seed)
    return _found(student, data)


def make_embedding(data: Data, width: int, dimensions: int, norm: str) -> nn.Sequential:
    """Make a residual network that ends in an embedding, with a norm: `batch`, `l2` or `none`."""
    body = make_residual(data, width)[:-1]
    last = {"batch": nn.BatchNorm1d(dimensions, affine=False), "l2": L2(), "none": nn.Identity()}[norm]
    return nn.Sequential(*body, nn.Linear(4 * width, dimensions), last).to(data.train[0].device)


@cache
def _teacher(norm: str, seed: int, size: Size, data: Data) -> nn.Sequential:
    """Train the large network, for twice as many epochs."""
    torch.manual_seed(seed + 1000)
    network = make_embedding(data, TEACHER, DIMENSIONS, norm)
    _train(network, data, [], size, seed + 1000, 2)
    return network


def _train(network: nn.Module, data: Data, taught: Sequence[Participant], size: Size, seed: int, times: int = 1) -> None:
    """Train a network by the triplets of each batch."""
    per_epoch, batches = draw_batches(data, times * size.epochs, seed, size.batch_size)
    optimizer = torch.optim.SGD(network.parameters(), size.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = times * size.epochs * per_epoch
    take_steps(network, optimizer, batches, triplet, taught, lr=size.lr, steps=steps)


def triplet(x: Tensor, labels: Tensor) -> Tensor:
    """Return the triplet loss of embeddings `(B, D)`: the mean over all triplets, of distances over sqrt(D)."""
    return mean_triplet(distances(x) / math.sqrt(x.shape[1]), labels, MARGIN)


@torch.no_grad()
def _found(network: nn.Module, data: Data) -> dict[str, float]:
    """Look for each test image among the others, by the distance of embeddings."""
    network.eval()
    images, labels = data.test
    far = distances(torch.cat([network(x) for x in torch.split(images, 500)])).fill_diagonal_(math.inf)
    hits = labels[far.argsort(1)[:, :-1]] == labels[:, None]
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    average = (precision * hits).sum(1) / hits.sum(1).clamp(min=1)
    recall, parameters = int(hits[:, 0].sum()) / len(hits), sum(p.numel() for p in network.parameters())
    return {"recall": recall, "mean_precision": float(average.mean()), "parameters": float(parameters)}


GRID: list[dict[str, list[Any]]] = [
    {"method": ["teacher"], "norm": ["batch"], "dimensions": [DIMENSIONS]},
    {"method": ["alone"], "norm": ["batch", "l2", "none"], "dimensions": [DIMENSIONS]},
    {"method": list(LOSSES), "norm": ["batch"], "dimensions": [DIMENSIONS]},
    {"method": ["alone", *FEWER], "norm": ["batch"], "dimensions": [16]},
]
SIZES = {
    "tiny": Size("tiny", 160, 80, 8, epochs=1, batch_size=32, lr=0.05),
    "small": Size("small", 6_000, 2_000, 16, epochs=4, lr=0.05),
    "full": Size("full", None, None, 32, epochs=30, batch_size=128, lr=0.05),
}
STUDY = Study(
    name="retrieval",
    about="Embeddings that find images, alone or taught",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    x="method",
    y="recall",
    lines=("norm", "dimensions"),
    reference={"method": "teacher"},
    sizes=SIZES,
)
