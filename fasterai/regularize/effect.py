"""The effect of a penalty: how large the units are in the course of a training, noted at few steps, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasterai.core.selection import count_true
from fasterai.display import AREA, QUIET, SERIES, as_percent, dress, legend_above, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLUMNS", "NOTES", "LEVELS", "draw", "note"]

#: Notes of a training besides the first, at most; quantiles that are noted, and units that they are read off at most.
NOTES, LEVELS, MOST_UNITS = 50, (0.05, 0.25, 0.5, 0.75, 0.95), 100_000
COLUMNS = ("position", "strength", "zero", *(f"q{level:.2f}" for level in LEVELS))


def note(position: float, strength: float, norms: Sequence[Tensor]) -> list[float]:
    """Return a row of `COLUMNS`, with quantiles of the norms; of many units evenly spaced ones are read."""
    count = sum(len(one) for one in norms)
    every = -(-count // MOST_UNITS)
    zero = sum(len(one) - count_true(one != 0) for one in norms) / max(1, count)
    some = torch.cat([one[::every].float().cpu() for one in norms]) if norms else torch.zeros(1)
    levels = torch.quantile(some, torch.tensor(LEVELS))
    return [position, strength, zero, *levels.tolist()]


@styled()
def draw(rows: Iterable[Sequence[float]], axes: Axes, title: str) -> Axes:
    """Draw the norms of the units over the training: the middle, half and nine tenths of them, and the share that is zero."""
    table = torch.tensor([list(row) for row in rows])
    where, zero, levels = table[:, 0].numpy(), table[:, 2].numpy(), table[:, 3:].numpy()
    axes.fill_between(where, levels[:, 0], levels[:, 4], color=AREA, alpha=0.6, linewidth=0, label="90 % of them")
    axes.fill_between(where, levels[:, 1], levels[:, 3], color=SERIES[1], alpha=0.6, linewidth=0, label="50 %")
    axes.plot(where, levels[:, 2], color=SERIES[2], linewidth=2, label="median")
    axes.set(xlabel="position of the training", ylabel="norm of a unit / root of its size", xlim=(0, 1), ylim=(0, None))
    beside: Any = axes.twinx()
    beside.plot(where, zero, color=SERIES[3], linewidth=2, label="zero")
    beside.set(ylim=(0, 1), ylabel="units that are zero")
    beside.yaxis.set_major_formatter(as_percent)
    beside.spines[["top", "right", "left"]].set_visible(False)
    beside.tick_params(colors=QUIET, length=0)
    beside.yaxis.label.set_color(QUIET)
    dress(axes, title, grid="y")
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    legend_above(axes, handles, [handle.get_label() for handle in handles])
    return axes
