"""Study of blended experts: weights, hidden units and whole experts removed, beside fewer experts from the start."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.core.criteria import large_final
from fasterai.core.granularities import Granularity, Keep, weight
from fasterai.core.participant import Participant
from fasterai.core.schedules import one_cycle
from fasterai.prune.choice.budget import Budget
from fasterai.prune.experts import remove_experts
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.description import Settings, Size, Study
from fasterai.study.mixtures import OSCILLATORS, BlendedLayer, BlendedMixture, Samples, make_frames, train_samples

__all__ = ["STUDY", "macs_of", "trial"]

EXPERTS = 8
GRANULARITIES: dict[str, Granularity] = {"weights": weight, "shared weights": Keep("out", "in")}
#: Seeds of the frames that are tested on are as far from those trained on.
TEST = 10_000


def trial(settings: Settings, seed: int, size: Size, data: object) -> dict[str, float]:
    """Train a mixture to predict the next frame of oscillators, with less of it left by one of the ways.

    Weights and hidden units go while it trains, on the one-cycle schedule, by magnitude. Experts go half way, those that the
    gate uses least. Fewer experts train from the start.
    """
    torch.manual_seed(seed)
    train, test = make_frames(size.images or 1, seed), make_frames(size.test_images or 1, seed + TEST)
    first = train.inputs[:8]
    network = _fewer(first, settings["sparsity"] if settings["way"] == "fewer experts" else 0.0)

    def remove(optimizer: torch.optim.Optimizer) -> None:
        usage, count = [(train.inputs[:1000], train.outputs[:1000])], round(EXPERTS * settings["sparsity"])
        remove_experts(network, first, count, data=usage, optimizer=optimizer, measure=False)

    half_way = remove if settings["way"] == "experts" else None
    participants = _participants(network, settings, first)
    train_samples(network, train, F.mse_loss, participants, size=size, seed=seed, half_way=half_way)
    return measured(network, test)


def _participants(network: BlendedMixture, settings: Settings, first: Tensor) -> list[Participant]:
    """Return what removes weights or hidden units while the network trains, until as many are left as fewer experts have."""
    stacks = {n: p.numel() for n, p in network.named_parameters() if p.dim() == 3}
    whole, stacked = (sum(numbers) for numbers in ([p.numel() for p in network.parameters()], stacks.values()))
    left = sum(p.numel() for p in _fewer(first, settings["sparsity"]).parameters())
    if settings["way"] in GRANULARITIES:
        options: dict[str, Any] = {"sparsity": (whole - left) / stacked, "schedule": one_cycle, "targets": [*stacks]}
        return [Sparsifier(network, GRANULARITIES[settings["way"]], "global", large_final, **options)]
    if settings["way"] == "hidden units":
        budget = Budget(params=left / whole)
        return [GradualPruner(network, budget, "global", large_final, one_cycle, ["gate.0"], first)]
    return []


def _fewer(frames: Tensor, sparsity: float) -> BlendedMixture:
    """Make a mixture of as many experts as a share leaves."""
    return BlendedMixture(frames.shape[1], 2 * OSCILLATORS, round(EXPERTS * (1 - sparsity)))


@torch.no_grad()
def measured(network: BlendedMixture, test: Samples) -> dict[str, float]:
    """Return the share of the variance that is explained, the error, the weights that are not zero, and MACs a frame."""
    network.eval()
    error = float(F.mse_loss(network(test.inputs), test.outputs))
    explained = 1 - error / float((test.outputs - test.outputs.mean(0)).square().mean())
    weights = sum(int(p.count_nonzero()) for p in network.parameters())
    return {"explained": explained, "error": error, "parameters": float(weights), "macs": float(macs_of(network))}


def macs_of(network: BlendedMixture) -> int:
    """Count the multiply-accumulates of a frame, less those by weights that are zero.

    A stack's weights are each multiplied by a share of the gate. A blended weight is multiplied by an input; it is zero where
    those of all experts are.
    """
    gate = sum(int(m.weight.count_nonzero()) for m in network.gate if isinstance(m, nn.Linear))
    layers = [m for m in network.layers if isinstance(m, BlendedLayer)]
    blending = sum(int(p.count_nonzero()) for layer in layers for p in layer.parameters())
    return gate + blending + sum(int(layer.weight.any(0).sum()) for layer in layers)


SPARSITIES = [0.5, 0.75, 0.875]
GRID: list[dict[str, list[Any]]] = [
    {"way": ["dense"], "sparsity": [0.0]},
    {"way": ["fewer experts", "weights", "shared weights", "hidden units", "experts"], "sparsity": SPARSITIES},
]
STUDY = Study(
    name="experts",
    about="Blended experts: weights, hidden units and whole experts removed, beside fewer experts",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    sizes={
        "tiny": Size("tiny", 100, 50, None, epochs=1, batch_size=32, lr=3e-3),
        "small": Size("small", 4_000, 2_000, None, epochs=12, lr=5e-3),
        "full": Size("full", 40_000, 10_000, None, epochs=60, lr=5e-3),
    },
    x="parameters",
    y="explained",
    lines="way",
    reference={"way": "dense"},
    load=None,
)
