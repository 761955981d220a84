"""Study of dynamic sparse training: sparse from the first step on, in phases, or by learned thresholds, beside schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.participant import Participant
from fasterai.model.targets import find_targets
from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

#: Sparsity to come near to -> the decay of the thresholds' s; the sparsity is what comes of it.
DECAYS = {0.9: 0.022, 0.95: 0.029}
#: Moves in a training, of which three quarters come before RigL and SET stop.
MOVES = 20

Make = Callable[[nn.Module, float, int], Participant]
METHODS: dict[str, Make] = {
    "agp": lambda network, sparsity, dt: Sparsifier(network, context="erk", sparsity=sparsity, schedule="agp"),
    "one_cycle": lambda network, sparsity, dt: Sparsifier(network, context="erk", sparsity=sparsity),
    "static": lambda network, sparsity, dt: StaticSparse(network, sparsity),
    "SET": lambda network, sparsity, dt: SET(network, sparsity, dt=dt),
    "RigL": lambda network, sparsity, dt: RigL(network, sparsity, dt=dt),
    "RigL, uniform": lambda network, sparsity, dt: RigL(network, sparsity, dt=dt, distribution="uniform"),
    "AC/DC": lambda network, sparsity, dt: ACDC(network, sparsity, context="erk"),
    "STR": lambda network, sparsity, dt: STR(network, s_init=-8.0, decay=DECAYS[sparsity]),
}


class Ever(Participant):
    """Notes which weights were other than zero after any step."""

    def __init__(self, network: nn.Module) -> None:
        self._targets = find_targets(network, fits=lambda t: None, coarse=False).targets
        self._seen: list[Tensor] = [torch.zeros_like(t.parameter, dtype=torch.bool) for t in self._targets]

    def after_step(self, position: float) -> None:
        """Note the weights that are not zero."""
        for seen, target in zip(self._seen, self._targets, strict=True):
            seen |= target.parameter.detach() != 0

    @property
    def share(self) -> float:
        """The share of the weights that were ever other than zero."""
        return sum(int(seen.sum()) for seen in self._seen) / sum(seen.numel() for seen in self._seen)

    @property
    def zeros(self) -> float:
        """The share of the weights that are zero now."""
        zeros = sum(int((t.parameter == 0).sum()) for t in self._targets)
        return zeros / sum(seen.numel() for seen in self._seen)


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a residual network by a method; `reached` is counted from its zeros, `ever` is the share that was ever active."""
    torch.manual_seed(seed)
    network = make_residual(data)
    steps = size.epochs * max(1, len(data.train[0]) // size.batch_size)
    ever = Ever(network)
    participants: list[Participant] = [ever]
    if settings["method"] != "dense":
        participants.insert(0, METHODS[settings["method"]](network, settings["sparsity"], max(1, steps // MOVES)))
    train(network, data, participants, epochs=size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return {"accuracy": accuracy(network, data), "reached": ever.zeros, "ever": ever.share}


GRID: list[dict[str, Sequence[Any]]] = [
    {"method": ["dense"], "sparsity": [0.0]},
    {"method": list(METHODS), "sparsity": list(DECAYS)},
]
#: What moves, beside what does not, in a training of three times as many steps.
LONG: dict[str, Sequence[Any]] = {"method": ["static", "SET", "RigL"], "sparsity": [0.95]}
STUDY = Study(
    name="dynamic",
    about="Dynamic sparse training beside schedules, at 90 and 95 % of the weights",
    trial=trial,
    grids={"small": GRID, "long": LONG, "full": GRID},
    seeds={"full": range(5)},
    x="reached",
    lines="method",
    reference={"method": "dense"},
    sizes={
        **SIZES,
        "small": Size("small", 3_000, 2_000, 16, epochs=5),
        "long": Size("long", 3_000, 2_000, 16, epochs=15),
    },
)
