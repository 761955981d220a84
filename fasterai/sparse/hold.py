"""L3. Keeping masks in later training."""

from __future__ import annotations

from fasterai.core.cuts import note_optimizer
from fasterai.core.loop import Fit, Participant
from fasterai.sparse.keeper import Keeper

__all__ = ["Hold"]


class Hold(Participant):
    """A participant that applies a keeper's masks after every step and does nothing else."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run.

        Raises:
            ValueError: The run trains another model.
        """
        self.keeper.check_trained(fit)
        note_optimizer(self.keeper.model, fit.optimizer)

    def after_step(self, position: float) -> None:
        """Apply the masks."""
        self.keeper.apply_()

    def on_fit_end(self, completed: bool) -> None:
        """Apply the masks once more, in case a step was interrupted."""
        self.keeper.apply_()
