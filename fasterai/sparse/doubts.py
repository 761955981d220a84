"""Warnings of masks that the model does not obey, or would not: filled weights, averages, layers that were replaced."""

from __future__ import annotations

from fasterai.core.checks import warn
from fasterai.core.joined import innermost
from fasterai.core.loop import Fit
from fasterai.model.names import unwrap
from fasterai.sparse.counting import count_filled, count_masked, count_zeros
from fasterai.sparse.record import MaskRecord

__all__ = ["AFTERWARDS", "tell_of_averages", "warn_of_filled", "warn_of_replaced", "warn_without_masks"]

#: When masked weights are counted that the framework has brought back after the run, and the repair.
AFTERWARDS = "after the run, which left them zero (sparsifier.apply_masks() does so again)"


def tell_of_averages(fit: Fit) -> None:
    """Warn of optimizers that put averaged weights in the place of those that are trained, as schedule-free ones do."""
    for one in map(innermost, fit.optimizers):
        if callable(getattr(one, "eval", None)) and callable(getattr(one, "train", None)):
            warn(
                f"optimizer {type(one).__name__} puts averaged weights into the model in its eval(), where masked weights are "
                "not zero: call sparsifier.apply_masks() after each optimizer.eval()"
            )


def warn_of_filled(record: MaskRecord, what: str) -> None:
    """Warn if masked weights are not zero where they should be.

    Args:
        record: The masks.
        what: When it is, and what becomes of the weights.
    """
    filled = count_filled(record)
    if filled:
        warn(
            f"{what}: {filled:,} of {count_masked(record):,} masked weights were not zero. An optimizer that averages weights "
            "(schedule-free's eval(), Lookahead), a moving average, or a callback that loads other weights has put them back"
        )


def warn_of_replaced(record: MaskRecord) -> None:
    """Warn once of layers that have been put in the place of targets, which masks do not reach."""
    here = {id(m) for m in unwrap(record.model).modules()}
    gone = sorted({t.name for t in record.targets if id(t.module) not in here} - record.missed)
    record.missed |= set(gone)
    if gone:
        warn(
            f"the layer of {', '.join(gone[:5])} is not in the model any more, and what was put in its place is dense, "
            "though the sparsity counts it: make a new Sparsifier after the model is as it stays"
        )


def warn_without_masks(record: MaskRecord) -> None:
    """Warn if there is no mask to hold, as in a new process that has loaded sparse weights alone."""
    if any(record.pruned(pool) for pool in record.pools):
        return
    zeros, weights = count_zeros(record), sum(t.parameter.numel() for t in record.targets)
    found = f"{zeros:,} of the {weights:,} weights of its targets are zero, and will train" if zeros else "nothing is pruned"
    repair = "sparsifier.mask_zeros() takes the zeros for its masks, and " if zeros else ""
    warn(
        f"the sparsifier that is held has no masks ({found}): {repair}sparsifier.load_state_dict(...) loads masks that were "
        "saved; call it before the hold"
    )
