"""Keeping masks in later training."""

from __future__ import annotations

from fasterai.core.loop import Fit, Participant
from fasterai.model.cuts import note_optimizer
from fasterai.sparse.counting import count_reached
from fasterai.sparse.doubts import AFTERWARDS, tell_of_averages, warn_of_filled, warn_without_masks
from fasterai.sparse.record import MaskRecord

__all__ = ["Hold"]


class Hold(Participant):
    """A participant that applies a record's masks after every step and does nothing else."""

    def __init__(self, record: MaskRecord) -> None:
        self.record = record

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run, with a warning if there is no mask to apply.

        Raises:
            ValueError: The run trains another model, or a weight is no plain tensor any more, as a sharded one is.
        """
        self.record.check_trained(fit)
        warn_without_masks(self.record)
        note_optimizer(self.record.model, fit.optimizer)
        tell_of_averages(fit)
        self.record.watch.take_up(fit)

    def after_step(self, position: float) -> None:
        """Apply the masks."""
        self.record.apply_()

    def on_fit_end(self, completed: bool) -> None:
        """Apply the masks once more, in case a step was interrupted."""
        if completed:
            warn_of_filled(self.record, "at the end of the run, which sets them to zero")
        self.record.apply_()
        self.record.watch.let_go()
        self.record.look_on()

    def look_back(self) -> None:
        """Warn if masked weights are not zero any more."""
        warn_of_filled(self.record, AFTERWARDS)

    def metrics(self) -> dict[str, float]:
        """Return the share of units that the masks prune, in [0, 1]."""
        return {"sparsity": count_reached(self.record).overall}
