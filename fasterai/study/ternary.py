"""Study of ternary groups: the exact optimum beside the usual threshold, for groups of several sizes.

Each network is ternarised as it is, with its norms measured anew, and fine-tuned straight through for a quarter of its
training. The abstract of Mellempudi et al. (2017, https://arxiv.org/abs/1705.01462) says of large networks on ImageNet that
groups of 4 lose few points without retraining, and that groups of 64 need fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.misc.ternary.norms import measure_norms_
from fasterai.misc.ternary.report import TernaryReport
from fasterai.misc.ternary.ternarize import find_ternary, ternarize
from fasterai.misc.ternary.training import TernaryTraining
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

#: Inputs of the network's layers are 32 to 128, so that groups of 64 differ from whole rows.
WIDTH = 32
KEPT, ANEW, TUNED = "norms as they were", "norms measured anew", "fine-tuned"
#: Share of the training that fine-tuning takes on top, and of its highest learning rate.
LONGER, LOWER = 1 / 4, 1 / 10
#: Images that norms are measured on, in batches of 100.
MEASURED, BATCH = 2_000, 100


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network, make its weights ternary, and say what is left of accuracy, multiplications and bytes."""
    network = copy.deepcopy(_dense(seed, size, data))
    kind, stage = settings["weights"], settings["stage"]
    example = data.train[0][:1]
    report = None
    if kind == "dense":
        if stage == TUNED:
            _tune(network, [], seed, size, data)
    else:
        options: dict[str, Any] = {"rule": kind.partition(",")[0], "example_inputs": example}
        group = _group(settings["group"])
        if stage == TUNED:
            training = TernaryTraining(network, group, **options)
            _tune(network, [training], seed, size, data)
            report = training.report(example)
        else:
            options["scale_dtype"] = torch.float16 if "half" in kind else None
            report = find_ternary(network, group, **options)
            network = ternarize(network, group, **options)
    if stage == ANEW:
        measure_norms_(network, _batches(data))
    return {"accuracy": accuracy(network, data), **_figures(report, network, example)}


def _group(given: str) -> int | str:
    return int(given) if given.isdigit() else given


@lru_cache(maxsize=3)
def _dense(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the dense network of a seed, once for all settings."""
    torch.manual_seed(seed)
    network = make_residual(data, WIDTH)
    train(network, data, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network


def _tune(network: nn.Module, participants: list[Any], seed: int, size: Size, data: Data) -> None:
    epochs = max(1, round(LONGER * size.epochs))
    train(network, data, participants, epochs=epochs, lr=LOWER * size.lr, seed=seed + 1000, batch_size=size.batch_size)


def _batches(data: Data) -> Iterator[Tensor]:
    yield from torch.split(data.train[0][:MEASURED], BATCH)


def _figures(report: TernaryReport | None, network: nn.Module, example: Tensor) -> dict[str, float]:
    """Return the distance of all ternary weights, the share of zeros, and what is left of multiplications and bytes."""
    if report is None or report.macs is None or report.multiplications is None:
        return {"error": 0.0, "zeros": 0.0, "multiplications": 1.0, "bytes": 1.0}
    layers, whole = report.layers.values(), cost(network, example).file_bytes
    return {
        "error": sum(layer.error for layer in layers) / len(report.layers),
        "zeros": sum(layer.zeros * layer.weights for layer in layers) / sum(layer.weights for layer in layers),
        "multiplications": report.multiplications / report.macs,
        "bytes": 1 - (report.dense_bytes - report.packed_bytes) / whole,
    }


def _grid(stages: list[str], kinds: dict[str, list[str]]) -> list[dict[str, list[Any]]]:
    return [{"stage": stages, "weights": [kind], "group": groups} for kind, groups in kinds.items()]


GROUPS = ["4", "16", "64"]
KINDS = {"dense": ["-"], "exact": GROUPS, "threshold": [*GROUPS, "filter", "tensor"]}
GRID = [
    *_grid([ANEW, TUNED], KINDS),
    *_grid([ANEW], {"exact, half scales": GROUPS}),
    *_grid([KEPT], {"dense": ["-"], "exact": GROUPS, "threshold": GROUPS}),
]
STUDY = Study(
    name="ternary",
    about="Ternary weights in groups, without retraining and fine-tuned",
    trial=trial,
    grids={
        "tiny": _grid([ANEW, TUNED], {"dense": ["-"], "exact": ["4"], "threshold": ["16"]}),
        "small": GRID,
        "full": GRID,
    },
    sizes={**SIZES, "small": replace(SIZES["small"], images=4_000, epochs=8)},
    x="group",
    lines="weights",
    panels="stage",
    reference={"weights": "dense"},
)
