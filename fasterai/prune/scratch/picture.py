"""Picture of widths found on random weights: channels of each group as bars, and its gates beside them; from plain figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fasterai.display import GRID, HEAT, MODELS, QUIET, SMALL, dress, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_widths"]

BINS = 20


@styled()
def draw_widths(widths: Mapping[str, tuple[int, int, int]], gates: Mapping[str, Tensor], title: str) -> Figure:
    """Draw a bar for each group, and the distribution of its gates in the same row.

    Args:
        widths: Group's name -> channels of the dense, the searched and the small network.
        gates: Group's name -> its gates, in [0, 1].
        title: The title.
    """
    figure = new_figure(8.5, max(2.8, 1.4 + 0.26 * len(widths)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    _draw_bars(left, widths)
    dress(left, title, "x", below="found on random weights")
    legend_above(left)
    shares = [np.histogram(gates[name].numpy(), BINS, (0.0, 1.0))[0] / max(1, len(gates[name])) for name in widths]
    right.imshow(np.stack(shares), cmap=HEAT, vmin=0, vmax=1, aspect="auto", extent=(0, 1, len(widths) - 0.5, -0.5))
    right.set(xlabel="gate at the end")
    right.tick_params(labelleft=False)
    dress(right, "gates", below="darker: more channels of the group")
    return figure


def _draw_bars(axes: Axes, widths: Mapping[str, tuple[int, int, int]]) -> None:
    places = range(len(widths))
    dense, searched, small = zip(*widths.values(), strict=True)
    if searched != dense:
        axes.barh(places, searched, height=0.78, facecolor="none", edgecolor=QUIET, linewidth=0.8, label="searched")
    axes.barh(places, dense, height=0.78, color=GRID, label="dense")
    axes.barh(places, small, height=0.5, color=MODELS["small"], label="small")
    axes.set_yticks(places, list(widths), fontsize=SMALL)
    axes.set(ylim=(len(widths) - 0.4, -0.6), xlabel="channels")
