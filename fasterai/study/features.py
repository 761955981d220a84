"""Study of induced features: a small network on the features that another one has kept, and on those of other selectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.prune.features.induce import induce
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, train

__all__ = ["STUDY", "trial"]

TABLES = ("digits", "breast cancer", "wine")
#: Steps that a network is trained on a table at least, and the share of its rows that are for testing.
STEPS, TESTED = 400, 0.25
#: Training rows that the selectors of scikit-learn read at most: mutual information takes minutes for more images.
READ = 1_000


@dataclass(frozen=True, eq=False)
class Task:
    """Flat samples `(N, F)` with their classes, to train and to test on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def features(self) -> int:
        """Number of the features."""
        return self.train[0].shape[1]


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Choose a share of the features, and train a new small network on these alone."""
    task = _task(settings["data"], seed, data)
    count = max(1, round(settings["kept_share"] * task.features))
    keep, found = _choose(settings["method"], task, count, seed, size)
    less = replace(task, train=(task.train[0][:, keep], task.train[1]), test=(task.test[0][:, keep], task.test[1]))
    network = _trained(less, seed + 1000, size)
    parameters = sum(p.numel() for p in network.parameters())
    counted = {"features": float(count), "input_bytes": 4.0 * count, "parameters": float(parameters)}
    return {"accuracy": _accuracy(network, less), **found, **counted}


@cache
def _task(name: str, seed: int, data: Data) -> Task:
    """Read a table that comes with scikit-learn, split by the seed, or the images of the study, flat."""
    if name not in TABLES:
        (x, y), (test, wanted) = data.train, data.test
        return Task((x.flatten(1), y), (test.flatten(1), wanted), len(data.classes))
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    load = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}[name]
    x, y = load(return_X_y=True)
    parts = train_test_split(x, y, test_size=TESTED, random_state=seed, stratify=y)
    mean, scale = parts[0].mean(0), parts[0].std(0) + 1e-6
    device = data.train[0].device
    x, test = (torch.tensor((part - mean) / scale, dtype=torch.float32, device=device) for part in parts[:2])
    y, wanted = (torch.tensor(part, device=device) for part in parts[2:])
    return Task((x, y), (test, wanted), int(y.max()) + 1)


def _choose(method: str, task: Task, count: int, seed: int, size: Size) -> tuple[list[int], dict[str, float]]:
    """Return the features to keep, and what there is to tell of the network that has chosen them."""
    if method == "dense":
        return list(range(task.features)), {}
    if method == "random":
        chosen = torch.randperm(task.features, generator=torch.Generator().manual_seed(seed))[:count]
        return sorted(chosen.tolist()), {}
    if method.startswith("induced"):
        return _induced(method, task, count, seed, size)
    scores = _scores(method, task, seed)
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist()), {}


def _induced(method: str, task: Task, count: int, seed: int, size: Size) -> tuple[list[int], dict[str, float]]:
    """Choose by a network that has trained on all features, under masks that follow the one-cycle schedule or without."""
    share, inputs = 1 - count / task.features, task.train[0][:2]
    torch.manual_seed(seed)
    network = _network(task)
    participants = []
    if method == "induced, one cycle":
        goal: dict[str, Any] = {"sparsity": {"input.1": share}, "features": {"input": 1}, "schedule": "one_cycle"}
        participants = [Sparsifier(network, "coupled", "local", "large_final", example_inputs=inputs, **goal)]
    _train(network, task, seed, size, participants)
    result = induce(network, inputs, share, measure=False)
    return list(result.selector.keep), {"unretrained_accuracy": _accuracy(result.whole, task)}


@cache
def _scores(method: str, task: Task, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Score features by a selector of scikit-learn: the highest are those that it takes."""
    from sklearn.feature_selection import SelectFromModel, SelectKBest, mutual_info_classif

    rows = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(seed))[:READ].to(task.train[0].device)
    x, y = (part[rows].cpu().numpy() for part in task.train)
    if method == "mutual information":
        best = SelectKBest(lambda a, b: mutual_info_classif(a, b, random_state=seed), k=1).fit(x, y)
        return np.asarray(best.scores_, np.float64)
    chosen = SelectFromModel(_lasso(seed), max_features=1, threshold=-np.inf).fit(x, y)
    return np.asarray(np.abs(chosen.estimator_.coef_).sum(0), np.float64)


def _lasso(seed: int) -> Any:
    """Return scikit-learn's logistic regression with an L1 penalty, as its version spells it."""
    from sklearn.linear_model import LogisticRegression

    options: dict[str, Any] = {"C": 0.1, "solver": "saga", "tol": 1e-2, "max_iter": 200, "random_state": seed}
    spelled = {"l1_ratio": 1.0} if LogisticRegression().get_params()["penalty"] == "deprecated" else {"penalty": "l1"}
    return LogisticRegression(**options, **spelled)


def _network(task: Task) -> nn.Sequential:
    layers = [nn.Linear(task.features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, task.classes)]
    return nn.Sequential(*layers).to(task.train[0].device)


def _trained(task: Task, seed: int, size: Size) -> nn.Sequential:
    torch.manual_seed(seed)
    network = _network(task)
    _train(network, task, seed, size, [])
    return network


def _train(network: nn.Module, task: Task, seed: int, size: Size, participants: list[Sparsifier]) -> None:
    """Train a network; on the few rows of a table for more epochs, so that it takes as many steps."""
    batch = min(size.batch_size, max(2, len(task.train[0]) // 8))
    steps = max(1, len(task.train[0]) // batch)
    epochs = size.epochs if size.epochs == 1 else max(size.epochs, math.ceil(STEPS / steps))
    train(network, _flat(task), participants, epochs=epochs, lr=size.lr, seed=seed, batch_size=batch)


def _accuracy(network: nn.Module, task: Task) -> float:
    return accuracy(network, _flat(task))


def _flat(task: Task) -> Data:
    """Return flat samples as the workbench takes images; none is mirrored."""
    return Data(task.train, task.test, tuple(map(str, range(task.classes))), False, "", "")


METHODS = ["induced, one cycle", "induced, at once", "mutual information", "l1 logistic regression", "random"]
EVERY = {"data": [*TABLES, "images"]}
GRID: list[dict[str, list[Any]]] = [
    {**EVERY, "method": ["dense"], "kept_share": [1.0]},
    {**EVERY, "method": METHODS, "kept_share": [0.05, 0.1, 0.25, 0.5]},
]
SIZES = {
    "tiny": Size("tiny", 160, 80, 8, epochs=1, batch_size=32, lr=0.05),
    "small": Size("small", 6_000, 2_000, 16, epochs=10, lr=0.05),
    "full": Size("full", None, None, 32, epochs=30, batch_size=128, lr=0.05),
}
STUDY = Study(
    name="features",
    about="Features that a network keeps, beside other selectors",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    x="kept_share",
    lines="method",
    panels="data",
    reference={"method": "dense"},
    sizes=SIZES,
)
