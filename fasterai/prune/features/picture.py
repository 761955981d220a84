"""Pictures of features: bars with names, and kept pixels as a heat map over an image; drawn from plain figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fasterai.display import GRID, HEAT, QUIET, SERIES, SMALL, counted, dress, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bars", "draw_pixels", "image_of"]

KEPT, GONE = SERIES[3], GRID
MOST_BARS = 40
Values = np.ndarray[Any, np.dtype[Any]]


@styled()
def draw_bars(names: Sequence[str], scores: Sequence[float], is_kept: Sequence[bool], title: str) -> Figure:
    """Draw a bar for each feature, the highest score first; of many the first ones, and none for those that nobody reads.

    Args:
        names: The features' names.
        scores: How much each matters.
        is_kept: True for those that are kept.
        title: The title.
    """
    order = [i for i in range(len(names)) if is_kept[i] or scores[i] > 0]
    order = sorted(order, key=lambda i: (not is_kept[i], -scores[i]))[:MOST_BARS]
    figure = new_figure(7.5, max(2.6, 1.3 + 0.24 * len(order)))
    axes = figure.add_subplot()
    for label, color, kept in (("kept", KEPT, True), ("removed", GONE, False)):
        places = [p for p, i in enumerate(order) if is_kept[i] is kept]
        if places:
            axes.barh(places, [scores[order[p]] for p in places], height=0.7, color=color, label=label)
    axes.set_yticks(range(len(order)), [names[i] for i in order], fontsize=SMALL)
    axes.set(ylim=(len(order) - 0.4, -0.6), xlabel="score, the mean of all is 1")
    left_out = len(names) - len(order)
    dress(axes, title + (f" ({left_out} more not shown)" if left_out else ""), "x")
    legend_above(axes)
    return figure


@styled()
def draw_pixels(scores: Values, is_kept: Values, image: Values, title: str) -> Figure:
    """Draw an image, and the kept pixels as a heat map over it.

    Args:
        scores: How much each pixel matters, `(H, W)`; over channels, those that are kept are summed.
        is_kept: The share of each pixel's channels that are kept, `(H, W)`, in [0, 1].
        image: What is drawn below, `(H, W)` or `(H, W, 3)`, in any range.
        title: The title.
    """
    from matplotlib import colormaps

    figure = new_figure(7.2, 3.7)
    left, right = figure.subplots(1, 2)
    for axes, shown in ((left, "mean image"), (right, "kept pixels")):
        _show(axes, image)
        dress(axes, shown)
        axes.set(xticks=[], yticks=[])
    heat = np.where(is_kept > 0, scores, 0.0)
    colors = colormaps[HEAT](0.25 + 0.75 * heat / max(float(heat.max()), 1e-12))
    colors[..., 3] = np.where(is_kept > 0, 0.35 + 0.55 * is_kept, 0.0)
    right.imshow(colors, interpolation="nearest")
    right.set_xlabel(f"{counted(int((is_kept > 0).sum()), 'pixel')} of {is_kept.size:,}; darker: higher score", fontsize=SMALL)
    left.set_xlabel(title, fontsize=SMALL, color=QUIET)
    return figure


def _show(axes: Axes, image: Values) -> None:
    low, high = float(image.min()), float(image.max())
    shown = (image - low) / max(high - low, 1e-12)
    axes.imshow(shown if image.ndim == 3 else np.stack([shown] * 3, 2), interpolation="nearest")


def image_of(values: Values, shape: Sequence[int]) -> Values:
    """Return flat values `(F,)` as an image: `(H, W)` for a shape of two, or of one channel; `(H, W, C)` for several.

    Raises:
        ValueError: The shape has another number of values, or is none of an image.
    """
    if len(shape) not in (2, 3) or int(np.prod(shape)) != values.size:
        raise ValueError(f"shape must be (H, W) or (C, H, W) with {values.size:,} values, got {tuple(shape)}")
    image = values.reshape(shape)
    if image.ndim == 3:
        image = image[0] if shape[0] == 1 else np.moveaxis(image, 0, -1)
    return image
