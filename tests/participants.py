"""Every participant of the library that trains: how to make one for a small network. A new one is a line here.

The shared checks run over this table: resuming after any step, copies, traces, two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fasterai.core.loop import Participant
from fasterai.core.schedules import OneShot
from fasterai.distill.distiller import Distiller
from fasterai.misc.ternary.training import TernaryTraining
from fasterai.prune.gradual import GradualPruner
from fasterai.regularize.regularizer import Regularizer
from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR
from fasterai.sparse.nm.srste import SRSTE, STE
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from fasterai.units.rules import DropAndGrow, Free

Make = Callable[[nn.Module], Participant | Iterable[Participant]]


def teacher() -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def held(model: nn.Module) -> Participant:
    sparsifier = Sparsifier(model, "weight", "local", "large_final")
    sparsifier.sparsify_model(0.5)
    return sparsifier.hold()


def ticket(model: nn.Module) -> list[Participant]:
    sparsifier = masks(model, schedule="iterative")
    return [sparsifier, LotteryTicket(sparsifier, rewind_epoch=0)]


def masks(model: nn.Module, granularity: str = "weight", criteria: Any = "large_final", **options: Any) -> Sparsifier:
    return Sparsifier(model, granularity, "local", criteria, **{"sparsity": 0.5, "schedule": "agp", **options})


#: Name -> how to make it for a model.
PARTICIPANTS: dict[str, Make] = {
    "Sparsifier": masks,
    "Sparsifier, movement of rows": lambda model: masks(model, "row", "movement"),
    "Sparsifier, free": lambda model: masks(model, rule=Free(), schedule=OneShot(0)),
    "Sparsifier, drop and grow": lambda model: masks(model, rule=DropAndGrow(every=2, fraction=0.3), schedule=OneShot(0)),
    "Hold": held,
    "LotteryTicket": ticket,
    "GradualPruner": lambda model: GradualPruner(
        model, 0.5, "local", "large_final", "lin", example_inputs=torch.zeros(2, 8), round_to=1, max_updates=2
    ),
    "Distiller": lambda model: Distiller(teacher(), ["SoftTarget", "FitNet"], ["0"], ["0"]),
    "SRSTE": SRSTE,
    "SRSTE, falling": lambda model: SRSTE(model, 2, 4, 0.01, schedule="lin"),
    "STE": STE,
    "RigL": lambda model: RigL(model, 0.5, dt=2),
    "SET": lambda model: SET(model, 0.5, dt=2),
    "StaticSparse": lambda model: StaticSparse(model, 0.5),
    "ACDC": lambda model: ACDC(model, 0.5),
    "STR": lambda model: STR(model, s_init=-3.0, decay=0.01),
    "TernaryTraining": lambda model: TernaryTraining(model, 4),
    "Regularizer, loss": lambda model: Regularizer(model, "large_final", "row", 0.1),
    "Regularizer, proximal": lambda model: Regularizer(
        model, "large_final", "row", 0.1, "lin", penalty="group_lasso", how="proximal"
    ),
}
