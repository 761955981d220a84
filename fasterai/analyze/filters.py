"""Pictures of a layer's filters: how similar they are, before and after a choice, and themselves as images."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import check_count
from fasterai.core.variety import similarities
from fasterai.display import EMPTY, HEAT, SMALL, dress, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["by_clusters", "plot_filters", "plot_similarity"]


@styled()
def plot_similarity(weight: Tensor, keep: Tensor | None = None, similarity: str = "cosine") -> Figure:
    """Draw how similar the filters of a layer are to each other, those of a cluster side by side.

    Args:
        weight: The weight before anything was removed, `(O, ...)`, or other vectors, one for each filter.
        keep: Which filters are kept, bool `(O,)`, or a mask of the weight; a second panel then shows these alone.
        similarity: `cosine`, `abs_cosine`, `pearson` or `euclidean`.

    Raises:
        ValueError: A filter is zero, so that it is similar to nothing, or `keep` does not fit.
    """
    vectors = _rows(weight)
    panels = [("all filters", vectors)]
    if keep is not None:
        panels.append(("kept filters", vectors[_flags(keep, len(vectors))]))
    figure = new_figure(4.4 * len(panels) + 0.8, 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low = 0.0 if similarity == "abs_cosine" else float(similarities(vectors, similarity).min())
    for place, (title, rows) in zip(axes, panels, strict=True):
        found = similarities(rows, similarity)
        order = by_clusters(found)
        image = place.imshow(found[order][:, order], cmap=HEAT, vmin=low, vmax=0.0 if similarity == "euclidean" else 1.0)
        place.set(xticks=[], yticks=[])
        place.set_xlabel(_nearest(found), loc="left", fontsize=SMALL)
        dress(place, f"{len(rows)} {title}")
        place.spines["bottom"].set_visible(False)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label=similarity)
    return figure


def _nearest(found: Tensor) -> str:
    if len(found) < 2:
        return ""
    nearest = found.clone().fill_diagonal_(-torch.inf).amax(1)
    return f"to the most similar other: {nearest.mean():.2f} on the mean, {nearest.max():.2f} at most"


def by_clusters(found: Tensor) -> list[int]:
    """Return an order of filters in which similar ones are neighbours: the leaves of a tree of average distances.

    Args:
        found: Similarities, `(units, units)`.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(found) < 3:
        return list(range(len(found)))
    distances = (found.max() - found).double().fill_diagonal_(0).clamp(min=0).numpy()
    distances = squareform((distances + distances.T) / 2, checks=False)
    tree = linkage(distances, "average")
    ordered = optimal_leaf_ordering(tree, distances) if len(found) <= 256 else tree  # which takes the third power of them
    return [int(i) for i in leaves_list(ordered)]


@styled()
def plot_filters(weight: Tensor, keep: Tensor, columns: int = 16) -> Figure:
    """Draw a first layer's filters as images, kept ones above and removed ones below, similar ones side by side.

    Args:
        weight: A convolution's weight of 1 or 3 inputs, `(O, 1 or 3, height, width)`, before anything was removed.
        keep: Which filters are kept, bool `(O,)`, or a mask of the weight.
        columns: The number of filters side by side.

    Raises:
        ValueError: The weight is not that of such a layer, or `keep` does not fit.
    """
    if weight.dim() != 4 or weight.shape[1] not in (1, 3):
        raise ValueError(f"weight must be (outputs, 1 or 3 inputs, height, width) to be shown, got shape {tuple(weight.shape)}")
    check_count("columns", columns)
    vectors = _rows(weight)
    flags = _flags(keep, len(vectors))
    parts = [(name, chosen) for name, chosen in (("kept", flags), ("removed", ~flags)) if bool(chosen.any())]
    rows = [ceil(int(chosen.sum()) / columns) for _, chosen in parts]
    figure = new_figure(0.46 * columns + 0.3, 0.46 * sum(rows) + 0.5 * len(rows))
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (name, chosen), count in zip(panels, parts, rows, strict=True):
        _draw_filters(axes, weight.detach().float().cpu()[chosen], columns, count)
        axes.set_title(f"{int(chosen.sum())} {name}", loc="left", fontsize=SMALL)
    return figure


def _draw_filters(axes: Axes, filters: Tensor, columns: int, rows: int) -> None:
    """Draw filters on a sheet, each from its lowest to its highest weight, with a line of ground between them."""
    from matplotlib.colors import to_rgb

    height, width = filters.shape[2:]
    sheet = np.empty((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    sheet[:] = to_rgb(EMPTY)
    low, high = filters.flatten(1).amin(1), filters.flatten(1).amax(1)
    images = (filters - low.view(-1, 1, 1, 1)) / torch.where(high > low, high - low, 1).view(-1, 1, 1, 1)
    vectors = filters.flatten(1)
    order = by_clusters(similarities(vectors)) if bool(vectors.any(1).all()) else list(range(len(filters)))
    for place, i in enumerate(order):
        row, column = divmod(place, columns)
        at = np.s_[row * (height + 1) : row * (height + 1) + height, column * (width + 1) : column * (width + 1) + width]
        sheet[at] = images[i].expand(3, -1, -1).permute(1, 2, 0).numpy()
    axes.imshow(sheet, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _rows(weight: Tensor) -> Tensor:
    if weight.dim() < 2:
        raise ValueError(f"weight must have filters of several weights, (O, ...), got shape {tuple(weight.shape)}")
    return weight.detach().float().cpu().flatten(1)


def _flags(keep: Tensor, count: int) -> Tensor:
    """Return which filters are kept, of flags or of a mask of the weight."""
    if keep.dtype != torch.bool or keep.dim() < 1 or len(keep) != count:
        raise ValueError(
            f"keep must be bool of {count} filters, or the mask of their weight, got {keep.dtype} {tuple(keep.shape)}"
        )
    flags = keep.detach().cpu().reshape(count, -1).any(1)
    if not bool(flags.any()):
        raise ValueError("keep must keep a filter, got none")
    return flags
