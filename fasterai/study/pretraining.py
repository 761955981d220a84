"""Study of pre-training: the same network from scratch and fine-tuned from a checkpoint, pruned over a range of sparsities.

Ours, after the abstract of Hubens et al. (2020, https://arxiv.org/abs/2112.08227), whose protocol we have not read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.cli.errors import UsageError
from fasterai.cli.weights import read_weights
from fasterai.core.checks import check_fraction
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.engine import run
from fasterai.study.result import Result
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "fit_checkpoint_", "pretraining", "trial"]

SCRATCH, TUNED = "from scratch", "pre-trained"
#: The task that a network is fine-tuned and pruned on, and what it was pre-trained on.
CLASSES, ROTATIONS = "the last classes, after the others", "all classes, after rotations"
SPARSITIES = [0.0, 0.8, 0.9, 0.95, 0.98]
#: Share of the images that have a class for the network pre-trained on rotations, which need none.
LABELLED = 1 / 6
#: Share of the highest learning rate at which pruning trains on.
LOWER = 0.5
MOST_PROBLEMS = 3
Make = Callable[[int], nn.Module]


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Prune a network from scratch or a fine-tuned one, by magnitude in each layer, while it trains for as long again."""
    task, start = settings["task"], settings["start"]
    _, target = _tasks(task, data)
    return _pruned(_dense(task, start, seed, size, data), settings["sparsity"], seed, size, target)


@lru_cache(maxsize=2)
def _tasks(task: str, data: Data) -> tuple[Data, Data]:
    """Return the images to pre-train on, and those to fine-tune on."""
    if task == CLASSES:
        if len(data.classes) < 4:
            raise ValueError(f"data must have at least 4 classes, of which two are kept back, got {len(data.classes)}")
        first = len(data.classes) - max(2, len(data.classes) // 5)
        return _of_classes(data, range(first)), _of_classes(data, range(first, len(data.classes)))
    rows = torch.arange(max(2, round(LABELLED * len(data.train[1]))))
    return _rotated(data), replace(data, train=(data.train[0][rows], data.train[1][rows]))


def _of_classes(data: Data, classes: range) -> Data:
    def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = (labels >= classes.start) & (labels < classes.stop)
        return images[rows], labels[rows] - classes.start

    return replace(data, train=part(*data.train), test=part(*data.test), classes=data.classes[classes.start : classes.stop])


def _rotated(data: Data) -> Data:
    """Turn each image by a random multiple of 90 degrees, which is its class."""

    def part(images: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(0)).to(images.device)
        turned = torch.empty_like(images)
        for k in range(4):
            turned[turns == k] = torch.rot90(images[turns == k], k, (2, 3))
        return turned, turns

    degrees = tuple(f"{90 * k} degrees" for k in range(4))
    return replace(data, train=part(data.train[0]), test=part(data.test[0]), classes=degrees, flip=False)


@lru_cache(maxsize=2)
def _checkpoint(task: str, size: Size, data: Data) -> Mapping[str, Tensor]:
    """Train the network of which all seeds are fine-tuned."""
    torch.manual_seed(0)
    before, _ = _tasks(task, data)
    network = make_residual(before)
    train(network, before, epochs=size.epochs, lr=size.lr, seed=0, batch_size=size.batch_size)
    return network.state_dict()


@lru_cache(maxsize=4)
def _dense(task: str, start: str, seed: int, size: Size, data: Data) -> nn.Module:
    """Train the network that all sparsities of a seed begin with."""
    torch.manual_seed(seed)
    _, target = _tasks(task, data)
    network = make_residual(target)
    if start == TUNED:
        fit_checkpoint_(network, _checkpoint(task, size, data))
    train(network, target, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network


def _pruned(dense: nn.Module, sparsity: float, seed: int, size: Size, data: Data) -> dict[str, float]:
    network = copy.deepcopy(dense)
    participants = [Sparsifier(network, sparsity=sparsity, context="local", schedule="one_cycle")] if sparsity else []
    lower = LOWER * size.lr
    train(network, data, participants, epochs=size.epochs, lr=lower, seed=seed + 1000, batch_size=size.batch_size)
    return {"accuracy": accuracy(network, data), "unpruned_accuracy": accuracy(copy.deepcopy(dense), data)}


# --- a checkpoint of one's own ------------------------------------------------------------------------------------------


def pretraining(
    network: Make,
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    sparsities: Sequence[float] = tuple(SPARSITIES),
    size: str = "small",
    sizes: Mapping[str, Size] = SIZES,
    **options: Any,
) -> Result:
    """Run the study with a network and a checkpoint of your own.

    Args:
        network: A function that makes the network for a number of classes.
        checkpoint: Its pre-trained weights: a state dict of `torch.save`, or safetensors. The last layer's are left out.
        data: A folder of images, one sub-folder a class; None for scikit-learn's digits.
        sparsities: Shares of the weights of each layer to prune, in [0, 1].
        size: `tiny`, `small` or `full`.
        sizes: Size -> what a run of it trains.
        **options: Of `run`: `folder`, `storage`, `seeds`, `device` and others.

    Returns:
        The results; the same call goes on where it was interrupted.

    Raises:
        TypeError, ValueError: An argument is refused, the checkpoint does not fit the network, or the storage holds the study
            with other settings or another checkpoint.
    """
    if not callable(network) or isinstance(network, nn.Module):
        raise TypeError(f"network must be a function that makes one for a number of classes, got a {type(network).__name__}")
    shares = [check_fraction("sparsities", share) for share in sparsities]
    path = Path(checkpoint)
    tensors = _read(path)
    fresh = network(2)
    fit_checkpoint_(fresh, tensors, str(path))
    seen = hashlib.sha256(path.read_bytes() + repr([(n, tuple(x.shape)) for n, x in fresh.named_parameters()]).encode())
    starts = {SCRATCH: None, f"{path.name} ({seen.hexdigest()[:8]})": tensors}
    study = Study(
        name="pretraining",
        about="A network from scratch and from a checkpoint, pruned",
        trial=partial(_own_trial, network, starts),
        grids={key: {"start": list(starts), "sparsity": shares} for key in sizes},
        x="sparsity",
        lines="start",
        sizes=sizes,
    )
    return run(study, data, size=size, **options)


def _own_trial(
    make: Make, starts: Mapping[str, Mapping[str, Tensor] | None], settings: Settings, seed: int, size: Size, data: Data
) -> dict[str, float]:
    torch.manual_seed(seed)
    network = make(len(data.classes)).to(data.train[0].device)
    tensors = starts[settings["start"]]
    if tensors is not None:
        fit_checkpoint_(network, tensors)
    train(network, data, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return _pruned(network, settings["sparsity"], seed, size, data)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return read_weights(path, "checkpoint").tensors
    except UsageError as error:
        raise ValueError(str(error)) from error


@torch.no_grad()
def fit_checkpoint_(network: nn.Module, tensors: Mapping[str, Tensor], name: str = "other weights") -> None:
    """Copy a checkpoint into a network, in place; its last layer, which is of other classes, stays as it is initialised.

    Args:
        network: The network.
        tensors: Name -> parameter or buffer, of the same network with any number of classes.
        name: What the checkpoint is, for the message.

    Raises:
        ValueError: It is of another network. Nothing is changed then.
    """
    head = [prefix for prefix, module in network.named_modules() if module._parameters][-1]
    own = {n: x for n, x in network.state_dict().items() if n.rpartition(".")[0] != head}
    wanted = {n for n in own if not n.endswith("num_batches_tracked")}
    problems = [f"{n} is missing" for n in sorted(wanted - tensors.keys())]
    strange = (n for n in tensors if n not in own and n.rpartition(".")[0] != head)
    problems += [f"{n} is none of its tensors" for n in strange]
    problems += [
        f"{n} is {tuple(tensors[n].shape)} and not {tuple(x.shape)}"
        for n, x in own.items()
        if n in tensors and tensors[n].shape != x.shape
    ]
    if problems:
        more = f", and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ValueError(
            f"checkpoint must be of the same network, less its last layer, got {name}, where "
            f"{', '.join(problems[:MOST_PROBLEMS])}{more}"
        )
    for n, x in own.items():
        if n in tensors:
            x.copy_(tensors[n])


GRID: list[dict[str, list[Any]]] = [
    {"task": [ROTATIONS, CLASSES], "start": [SCRATCH, TUNED], "sparsity": SPARSITIES},
]
STUDY = Study(
    name="pretraining",
    about="A network from scratch and a fine-tuned one, pruned",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="sparsity",
    lines="start",
    panels="task",
    sizes={**SIZES, "small": Size("small", 6_000, 2_000, 16, epochs=4, batch_size=32, lr=0.05)},
)
