"""Study of pruning from scratch: widths found on random weights, beside other widths of the same cost, and beside pruning."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.model.progress import keep_random_state, put_random_state_
from fasterai.prune.choice.budget import Budget
from fasterai.prune.pruner import Pruner
from fasterai.prune.scratch.renewal import renewed
from fasterai.prune.scratch.search import search_from_scratch
from fasterai.prune.scratch.structure import Structure, choose_channels, cut_, find_structure
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, draw_batches, make_residual, train

__all__ = ["STUDY", "trial"]

DENSE, FOUND, WIDER, UNIFORM, RANDOM, PRUNED = "dense", "found", "found, 1.25 wide", "uniform", "random", "pruned"
ONCE, COST = "equal epochs", "equal cost"
#: The part of a dense training that the search takes, in epochs.
SEARCHED = 0.5
#: What a pruned network is fine-tuned at, as a share of the highest learning rate.
LOWER = 0.5


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a network of a share of the MACs, with widths found, uniform or random, or prune a trained one and fine-tune it.

    `dense_epochs` is the cost of it all, in epochs of the dense network: the search, or the training before the pruning, and
    the training of the small one. By equal epochs a small network trains as long as the dense one; by equal cost all get what
    the dense one and the search take together.
    """
    what, share = settings["what"], settings["macs"]
    search = max(1, round(SEARCHED * size.epochs))
    if what == DENSE:
        return _figures(_dense(seed, size, data), 1.0, float(size.epochs), data)
    found = what in (FOUND, WIDER)
    spent = {PRUNED: float(size.epochs)}.get(what, search * (_WIDER_COST if what == WIDER else 1.0) if found else 0.0)
    whole = size.epochs + search
    network, lr = _small(what, share, seed, size, data, search), size.lr
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    left = _macs(network, data) / _macs(_new(seed, data), data)
    epochs = size.epochs
    if settings["training"] == COST:
        epochs = max(1, round((whole - spent) / left))
    if what == PRUNED:
        lr *= LOWER
    train(network, data, epochs=epochs, lr=lr, seed=seed + 1000, batch_size=size.batch_size)
    return _figures(network, left, spent + epochs * left, data)


#: Cost of a pass through the wider network, as a share of the dense one's.
_WIDER_COST = 1.25**2


def _figures(network: nn.Module, left: float, spent: float, data: Data) -> dict[str, float]:
    parameters = float(sum(p.numel() for p in network.parameters()))
    return {"accuracy": accuracy(network, data), "left": left, "parameters": parameters, "dense_epochs": spent}


def _small(what: str, share: float, seed: int, size: Size, data: Data, search: int) -> nn.Module:
    inputs = data.train[0][:2]
    if what == PRUNED:
        network = copy.deepcopy(_dense(seed, size, data))
        Pruner(network, Budget(macs=share), "global", "large_final", example_inputs=inputs).prune_model(measure=False)
        return network
    if what in (UNIFORM, RANDOM):
        structure = find_structure(_new(seed, data), (inputs,), (), True)
        kept = choose_channels(structure, *_shares(structure, what, seed), Budget(macs=share), _new(seed, data), 1)
        cut_(structure, kept)
        return renewed(structure.model, None, seed)
    factor = 1.25 if what == WIDER else 1.0
    return copy.deepcopy(_search(seed, size, data, search, factor, share))


def _shares(structure: Structure, what: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return scores that keep the same share of each group, or of each a random one, whatever the budget is."""
    generator = torch.Generator().manual_seed(seed)
    counts = list(structure.counts.values())
    shares = torch.ones(len(counts)) if what == UNIFORM else 0.1 + 0.9 * torch.rand(len(counts), generator=generator)
    scores = torch.cat([s * n / torch.arange(1, n + 1) for s, n in zip(shares.tolist(), counts, strict=True)])
    return scores.double(), torch.zeros(len(scores), dtype=torch.float64)


@lru_cache(maxsize=12)
def _search(seed: int, size: Size, data: Data, epochs: int, factor: float, share: float) -> nn.Module:
    _, batches = draw_batches(data, epochs, seed + 2000, size.batch_size)
    before = keep_random_state()
    found = search_from_scratch(
        _new(seed, data), list(batches), Budget(macs=share), epochs=1, expand=factor, seed=seed, progress=False
    )
    put_random_state_(before)
    return found.model


def _macs(network: nn.Module, data: Data) -> int:
    return cost(network, data.train[0][:1]).macs


def _new(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    return make_residual(data)


@lru_cache(maxsize=4)
def _dense(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the dense network, which is the reference, and which is pruned."""
    network = _new(seed, data)
    train(network, data, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network


HOW = [ONCE, COST]
GRID: list[dict[str, list[Any]]] = [
    {"what": [DENSE], "training": HOW, "macs": [1.0]},
    {"what": [FOUND, WIDER, UNIFORM, RANDOM, PRUNED], "training": HOW, "macs": [0.5, 0.25]},
]
TINY: list[dict[str, list[Any]]] = [GRID[0], {"what": [FOUND, UNIFORM], "training": [ONCE], "macs": [0.5]}]
SIZES = {
    "tiny": Size("tiny", 160, 80, 8, epochs=1, batch_size=32),
    "small": Size("small", 1_500, 2_000, 16, epochs=8, batch_size=32, lr=0.05),
    "full": Size("full", None, None, 32, epochs=30, batch_size=128),
}
STUDY = Study(
    name="scratch",
    about="Pruning from scratch, beside other widths and beside pruning a trained network",
    trial=trial,
    grids={"tiny": TINY, "small": GRID, "full": GRID},
    x="macs",
    lines="what",
    panels="training",
    reference={"what": DENSE},
    sizes=SIZES,
)
