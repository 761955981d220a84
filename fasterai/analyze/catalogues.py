"""Pictures of the four catalogues: the weights that share a decision, those that are kept, and how many are by when.

To add an entry to a catalogue adds its panel here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.core.checks import check_fraction
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.schedules import Schedule
from fasterai.core.scores import TensorScores
from fasterai.core.types import Evidence, Layout
from fasterai.display import EMPTY, INK, PAPER, QUIET, SERIES, SMALL, TEXT, as_percent, counted, dress, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_contexts", "plot_criteria", "plot_granularities", "plot_schedules"]

AXES = ("out", "in", "height", "width")
#: Colours of the units that are shown of a granularity, and of a weight that belongs to none of them.
UNITS, OTHERS = (SERIES[2], SERIES[3]), EMPTY
KEPT = SERIES[3]
POINTS = 60
#: Letters of a title that a criterion's panel has room for.
WIDEST = 24
#: Evidence -> how it is written at an axis.
SYMBOLS = {
    "initial": "w at first",
    "previous": "w at the last move",
    "gradient": "gradient",
    "hessian_gradient": "Hessian times gradient",
    "hessian_diagonal": "second derivative",
    "synaptic_flow": "synaptic flow",
    "activation": "size of the input",
}
#: The layers of a small network: name, shape of the weight, standard deviation of its weights.
LAYERS = (
    ("conv1", (16, 3, 3, 3), 0.2),
    ("conv2", (32, 16, 3, 3), 0.08),
    ("conv3", (64, 32, 3, 3), 0.06),
    ("fc", (10, 64), 0.1),
)
CONTEXTS = ("local", "global", "erk", "lamp")


@styled()
def plot_granularities(
    names: Sequence[str] | None = None, shape: tuple[int, int, int, int] = (4, 3, 3, 3), columns: int = 4
) -> Figure:
    """Draw a small convolution's weight for each granularity, with all weights of two of its units in a colour each.

    Each panel has a row of kernels for each output, and a column for each input.

    Args:
        names: The granularities; all sixteen that a weight alone has, if left out.
        shape: The weight's shape: outputs, inputs, height, width.
        columns: The number of panels side by side.
    """
    names = _by_size(shape) if names is None else names
    figure, panels = _panels(len(names), columns, 2.3, 2.6)
    for axes, name in zip(panels, names, strict=False):
        _draw_granularity(axes, name, getattr(granularities, name), Layout(shape, tuple(frozenset({a}) for a in AXES)))
    _caption(figure, "a row for each output, a column for each input, a square for each weight; two units are coloured")
    return figure


def _by_size(shape: tuple[int, ...]) -> list[str]:
    """List the granularities of a weight alone: the finest first."""
    layout = Layout(shape, tuple(frozenset({axis}) for axis in AXES))
    sizes = {name: torch.Size(getattr(granularities, name).unit_shape(layout)).numel() for name in granularities.__all__}
    return sorted((name for name in sizes if name != "coupled"), key=lambda name: -sizes[name])


def _draw_granularity(axes: Axes, name: str, granularity: Granularity, layout: Layout) -> None:
    units = units_of(granularity, layout)
    count, (outs, ins, height, width) = int(units.max()) + 1, layout.shape
    shown = _shown_units(units)
    for place, unit in zip(
        torch.cartesian_prod(*map(torch.arange, layout.shape)).tolist(), units.ravel().tolist(), strict=True
    ):
        out, into, row, column = place
        color = UNITS[shown.index(unit)] if unit in shown else OTHERS
        at = (into * (width + 0.6) + column, out * (height + 0.6) + row)
        axes.add_patch(_square(at, color))
    axes.set(
        xlim=(-0.3, ins * (width + 0.6) - 0.3), ylim=(outs * (height + 0.6) - 0.3, -0.3), aspect="equal", xticks=[], yticks=[]
    )
    size = layout.shape[0] * ins * height * width // count
    dress(axes, "", below=f"{counted(count, 'unit')} of {counted(size, 'weight')}")
    axes.set_title(name, fontsize=TEXT, pad=24)
    axes.spines["bottom"].set_visible(False)


def _square(at: tuple[float, float], color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(at, 0.92, 0.92, facecolor=color, edgecolor="none")


def units_of(granularity: Granularity, layout: Layout) -> Tensor:
    """Return the number of the unit that each weight belongs to, in the layout's view."""
    shape = granularity.unit_shape(layout)
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return granularity.expand(numbers, layout).expand(layout.shape)


def _shown_units(units: Tensor) -> list[int]:
    """Return two units that lie apart: that of the first weight, and of what others there are one in the middle."""
    first = int(units.ravel()[0])
    others = [unit for unit in range(int(units.max()) + 1) if unit != first]
    return [first, *others[len(others) // 2 : len(others) // 2 + 1]]


@styled()
def plot_criteria(names: Sequence[str] | None = None, kept: float = 0.5, columns: int = 5) -> Figure:
    """Draw the weights that each criterion keeps: a weight's value upwards, what else the criterion reads to the right.

    Args:
        names: The criteria; all of the catalogue if left out.
        kept: The share that is kept, in [0, 1].
        columns: The number of panels side by side.
    """
    check_fraction("kept", kept)
    if names is None:  # a rule on units has no place in a picture of single weights
        names = [name for name in criteria.__all__ if getattr(criteria, name).unit_rule is None]
    figure, panels = _panels(len(names), columns, 2.0, 2.2)
    for axes, name in zip(panels, names, strict=False):
        _draw_criterion(axes, name, getattr(criteria, name), kept)
    _caption(figure, f"blue: the {kept:.0%} of all weights that are kept; both axes from -1 to 1, sizes from 0 to 1", "weight")
    return figure


def _draw_criterion(axes: Axes, name: str, criterion: Criterion, kept: float) -> None:
    from matplotlib.colors import ListedColormap

    needs = [need for need in criterion.needs if need in SYMBOLS]
    keep = kept_by(criterion, kept)
    axes.imshow(keep, origin="lower", extent=(-1, 1, -1, 1), cmap=ListedColormap([OTHERS, KEPT]), vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], xlabel=SYMBOLS[needs[0]] if needs else "")
    axes.xaxis.label.set_fontsize(SMALL)
    dress(axes, "")
    axes.set_title(_in_lines(name), fontsize=SMALL)
    axes.spines["bottom"].set_visible(False)


def _in_lines(name: str) -> str:
    """Split a name that is wider than its panel after the first word."""
    return name.replace("_", "_\n", 1) if len(name) > WIDEST else name


def kept_by(criterion: Criterion, kept: float) -> Tensor:
    """Return which weights a criterion keeps: weights from -1 to 1 down the rows, its evidence from -1 to 1 along them."""
    line = torch.linspace(-1, 1, POINTS)
    weight, other = line[:, None].expand(POINTS, POINTS), line.expand(POINTS, POINTS)
    evidence: dict[str, Any] = {
        name: (other + 1) / 2 if name == "activation" else other for name in criterion.needs if name in SYMBOLS
    }
    scores = criterion(Evidence("weight", weight.contiguous(), **evidence))
    layout = Layout((POINTS, POINTS), (frozenset({"out"}), frozenset({"in"})))
    return contexts.local([TensorScores("weight", scores)], [layout], 1 - kept)[0]


@styled()
def plot_schedules(given: Mapping[str, Schedule] | None = None, columns: int = 4) -> Figure:
    """Draw the share of the sparsity over the training, a panel for each schedule.

    Args:
        given: Name -> schedule; all of the catalogue if left out.
        columns: The number of panels side by side.
    """
    given = {name: getattr(schedules, name) for name in schedules.__all__} if given is None else given
    figure, panels = _panels(len(given), columns, 2.7, 2.3)
    for place, (axes, (name, schedule)) in enumerate(zip(panels, given.items(), strict=False)):
        schedule.plot(ax=axes)
        dress(axes, name)
        axes.set(xlabel="", ylabel="", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.tick_params(labelleft=place % columns == 0)
    _caption(figure, "position in the training", "share of the sparsity")
    return figure


@styled()
def plot_contexts(sparsity: float = 0.8, names: Sequence[str] = CONTEXTS) -> Figure:
    """Draw the share of each layer of a small network that is pruned, by magnitude, a panel for each context.

    Args:
        sparsity: The share of all weights that is pruned, in [0, 1].
        names: The contexts.
    """
    check_fraction("sparsity", sparsity)
    figure, panels = _panels(len(names), len(names), 2.5, 2.4)
    for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
        _draw_context(axes, name, pruned_by(getattr(contexts, "global_" if name == "global" else name), sparsity))
        axes.tick_params(labelleft=place == 0)
        axes.axvline(sparsity, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    _caption(
        figure, f"share of the layer's weights pruned; the line is {sparsity:.0%}, that of the whole network in every context"
    )
    return figure


def _draw_context(axes: Axes, name: str, shares: Mapping[str, float]) -> None:
    axes.barh(range(len(shares)), [1.0] * len(shares), color=EMPTY, height=0.7)
    axes.barh(range(len(shares)), list(shares.values()), color=SERIES[2], height=0.7)
    for place, share in enumerate(shares.values()):
        at, color = (0.03, PAPER) if share > 0.2 else (share + 0.03, QUIET)
        axes.text(at, place, f"{share:.0%}", va="center", color=color, fontsize=SMALL, weight="bold")
    labels = [f"{layer}\n{torch.Size(shape).numel():,}" for layer, shape, _ in LAYERS]
    axes.set(xlim=(0, 1), ylim=(len(shares) - 0.5, -0.5), xticks=[0, 0.5, 1])
    axes.set_yticks(range(len(shares)), labels, fontsize=SMALL)
    axes.xaxis.set_major_formatter(as_percent)
    dress(axes, name)


def pruned_by(context: Context, sparsity: float) -> dict[str, float]:
    """Return for each layer of the small network the share of its weights that a context prunes, by magnitude."""
    generator = torch.Generator().manual_seed(0)
    scores, layouts = [], []
    for name, shape, deviation in LAYERS:
        scores.append(TensorScores(name, deviation * torch.randn(shape, generator=generator).abs()))
        layouts.append(Layout(shape, tuple(frozenset({axis}) for axis in AXES[: len(shape)])))
    keeps = context(scores, layouts, sparsity)
    return {name: 1 - keep.float().mean().item() for (name, _, _), keep in zip(LAYERS, keeps, strict=True)}


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Make a figure of so many panels, and hide those that are left over."""
    columns = min(columns, count)
    rows = ceil(count / columns)
    figure = new_figure(columns * width, rows * height + 0.3, pad=0.1)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels


def _caption(figure: Figure, below: str, beside: str = "") -> None:
    """Write what all panels have along their axes."""
    figure.supxlabel(below, fontsize=TEXT, color=QUIET)
    if beside:
        figure.supylabel(beside, fontsize=TEXT, color=QUIET)
