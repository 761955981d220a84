"""Sparsity and report, counted from the masks that a record holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from fasterai.core.selection import count_true
from fasterai.core.types import Target
from fasterai.model.names import unwrap
from fasterai.sparse.report import Reached, Row, SparsityReport
from fasterai.units.pool import Pool

if TYPE_CHECKING:
    from fasterai.sparse.record import MaskRecord

__all__ = ["count_filled", "count_masked", "count_reached", "count_zeros", "write_report"]


def count_reached(record: MaskRecord) -> Reached:
    """Return the sparsity, counted from the masks."""
    units = {p.name: p.count for p in record.pools}
    pruned = {p.name: record.pruned(p) for p in record.pools}
    weights = sum(t.parameter.numel() for t in record.targets)
    per_pool = {n: pruned[n] / units[n] if units[n] else 0.0 for n in units}
    return Reached(sum(pruned.values()) / max(1, sum(units.values())), count_masked(record) / max(1, weights), per_pool)


def count_filled(record: MaskRecord) -> int:
    """Count the masked weights of the targets that are not zero, each once."""
    return sum(count_true(weight.ne(0) & ~mask) for weight, mask in record.masks_of_targets())


def count_zeros(record: MaskRecord) -> int:
    """Count the weights of the targets that are zero, masked or not."""
    return sum(_zeros(t) for t in record.targets)


def write_report(record: MaskRecord) -> SparsityReport:
    """Return a report of the pruned units and weights of each target, and of the targets left out with the reasons."""
    rows = tuple(_row(record, p) for p in record.pools)
    active = {p.name for p in record.active}
    left_out = {**record.selection.left_out, **{p.name: "frozen" for p in record.pools if p.name not in active}}
    own = unwrap(record.model).parameters()
    parameters = [p.detach() for p in own if not isinstance(p, UninitializedParameter)]
    total = sum(p.numel() for p in parameters)
    zeros = total - sum(int(torch.count_nonzero(p)) for p in parameters)
    return SparsityReport(repr(record.granularity), rows, left_out, total, zeros, _together(record, rows))


def _row(record: MaskRecord, pool: Pool) -> Row:
    zeros = sum(_zeros(t) for t in pool.targets)
    masked = sum(_hidden(tensor, mask) for tensor, mask in record.masks_of(pool))
    counts = (pool.count, record.pruned(pool), pool.weights, zeros, masked, record.disobeying(pool))
    return Row(pool.name, pool.shown_shape, *counts)


def _together(record: MaskRecord, rows: Sequence[Row]) -> Row:
    """Return all targets as one row."""
    sums = (sum(r.units for r in rows), sum(r.pruned for r in rows))
    weights, zeros = sum(t.parameter.numel() for t in record.targets), count_zeros(record)
    return Row("all targets", (), *sums, weights, zeros, count_masked(record), count_filled(record))


def count_masked(record: MaskRecord) -> int:
    """Return the number of weights of the targets that the masks set to zero, each counted once.

    Channels of two pools cross in the weight between them, so that the pools' counts would not add up.
    """
    return sum(_hidden(weight, mask) for weight, mask in record.masks_of_targets())


def _hidden(tensor: Tensor, mask: Tensor) -> int:
    """Return the number of weights that a mask sets to zero.

    A mask `(4, 1)` with one False stands for a tensor `(4, 9)`: 9 weights are zero.
    """
    return (mask.numel() - count_true(mask)) * (tensor.numel() // max(1, mask.numel()))


def _zeros(target: Target) -> int:
    weight = target.parameter.detach()
    return weight.numel() - int(torch.count_nonzero(weight))
