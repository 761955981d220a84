"""Weights that come back start afresh: at 0, with nothing of theirs left in the optimizer."""

from __future__ import annotations

from typing import Any

import torch

from fasterai.core.loop import Fit
from fasterai.core.types import Move
from fasterai.display import counted
from fasterai.model.cuts import follow, noted_optimizers
from fasterai.model.optimizers import clear_entries_
from fasterai.sparse.sparsifier import Sparsifier

__all__ = ["Restarting"]


class Restarting(Sparsifier):
    """A sparsifier whose returning weights have no past: their momentum and moments are 0 as they are."""

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run."""
        super().on_fit_start(fit)
        follow(self.model, self)  # a loop that names no model does not do it

    @torch.no_grad()
    def after_move(self, move: Move) -> None:
        """Forget what the optimizers keep for weights that come back."""
        if not self.made(move):
            return
        places = []
        for pool in self._record.pools:
            if pool.name in move.after:
                returned = move.after[pool.name] & ~move.before[pool.name]
                shapes = {t.name: t.parameter for t in pool.targets}
                for name, where in pool.masks(returned):
                    places.append((shapes[name], where.expand(pool.tensor(name).shape).reshape(shapes[name].shape)))
        clear_entries_(noted_optimizers(self.model), places)

    def _how(self) -> str:
        """Return the settings in a few words."""
        return ""

    def _line(self) -> str:
        reached = self.sparsity
        done = f"{reached.overall:.1%} of the weights pruned in {counted(len(reached), 'target')}"
        return f"<{self.name}: {done}; {self._how()}>"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows its own model."""
        super().__setstate__(state)
        follow(self.model, self)
