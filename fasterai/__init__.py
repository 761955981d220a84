"""fasterai makes PyTorch networks sparse, then small, with one line in the training loop.

Importing it loads torch and nothing heavier; everything below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401 - what everything here works on

if TYPE_CHECKING:
    from fasterai.callbacks.plain import attach
    from fasterai.core.criteria import Criterion
    from fasterai.core.granularities import Block as Block
    from fasterai.core.granularities import Keep
    from fasterai.core.schedules import Schedule
    from fasterai.distill.distiller import Distiller
    from fasterai.model.layouts import register_axes
    from fasterai.prune.pruner import Pruner as Pruner
    from fasterai.sparse.sparsifier import Sparsifier
    from fasterai.sparse.tickets.lottery import LotteryTicket

__version__ = "0.1.0"

_HOMES = {
    "Block": "fasterai.core.granularities",
    "Criterion": "fasterai.core.criteria",
    "Distiller": "fasterai.distill.distiller",
    "Keep": "fasterai.core.granularities",
    "LotteryTicket": "fasterai.sparse.tickets.lottery",
    "Pruner": "fasterai.prune.pruner",
    "Schedule": "fasterai.core.schedules",
    "Sparsifier": "fasterai.sparse.sparsifier",
    "attach": "fasterai.callbacks.plain",
    "register_axes": "fasterai.model.layouts",
}

# `Block` is torch's as well, and any network's own: `from fasterai import Block`, and no part of the star import.
# Nor is `Pruner`, which is slow to load.
__all__ = [
    "Criterion",
    "Distiller",
    "Keep",
    "LotteryTicket",
    "Schedule",
    "Sparsifier",
    "attach",
    "register_axes",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fasterai' has no attribute {name!r}; it has {', '.join(_HOMES)}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
