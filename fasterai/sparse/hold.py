"""Keeping masks in later training."""

from __future__ import annotations

from fasterai.core.checks import warn
from fasterai.core.joined import innermost
from fasterai.core.loop import Fit, Participant
from fasterai.model.cuts import note_optimizer
from fasterai.sparse.counting import count_reached, warn_of_filled
from fasterai.sparse.record import MaskRecord

__all__ = ["AFTERWARDS", "Hold", "tell_of_averages"]

#: When masked weights are counted that the framework has brought back after the run, and the repair.
AFTERWARDS = "after the run, which left them zero (sparsifier.apply_masks() does so again)"


def tell_of_averages(fit: Fit) -> None:
    """Warn of optimizers that put averaged weights in the place of those that are trained, as schedule-free ones do."""
    for one in map(innermost, fit.optimizers):
        if callable(getattr(one, "eval", None)) and callable(getattr(one, "train", None)):
            warn(
                f"optimizer {type(one).__name__} puts averaged weights into the model in its eval(), where masked weights are not "
                "zero: call sparsifier.apply_masks() after each optimizer.eval()"
            )


class Hold(Participant):
    """A participant that applies a record's masks after every step and does nothing else."""

    def __init__(self, record: MaskRecord) -> None:
        self.record = record

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run.

        Raises:
            ValueError: The run trains another model, or a weight is no plain tensor any more, as a sharded one is.
        """
        self.record.check_trained(fit)
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
