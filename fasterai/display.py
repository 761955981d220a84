"""Look of reports: numbers in words, tables as text, one palette for all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AREA",
    "EMPTY",
    "GRID",
    "HEAT",
    "INK",
    "QUIET",
    "SERIES",
    "counted",
    "dress",
    "line_colors",
    "new_axes",
    "new_figure",
    "ruled",
    "short",
    "short_bytes",
    "short_time",
    "table",
    "units_word",
]

INK, QUIET, GRID, EMPTY = "#22303c", "#6b7a88", "#e3e8ed", "#eef1f4"
#: Colours of models or lines, in their order: the first is the one that the others are held against.
SERIES = ("#7b8794", "#f0a35e", "#d9480f", "#1c7293", "#5c7c3a", "#8e5a9b")
#: Ground under a line of the third colour.
AREA = "#fbe3d3"
#: Matplotlib's name of the colours of a map, from nothing to the most.
HEAT = "OrRd"


def short(number: float) -> str:
    """Write a count with three figures, such as 1.81 G.

    >>> short(1_814_073_344), short(512), short(0)
    ('1.81 G', '512', '0')
    """
    return _scaled(number, 1000.0, ("", " k", " M", " G", " T"))


def short_bytes(number: float) -> str:
    """Write a number of bytes with three figures and a unit in powers of 1024, such as 1.5 MiB.

    >>> short_bytes(1536), short_bytes(46_827_520)
    ('1.5 KiB', '44.7 MiB')
    """
    return _scaled(number, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def short_time(seconds: float) -> str:
    """Write a duration with three figures.

    >>> short_time(0.0123), short_time(2.5), short_time(0.000_004)
    ('12.3 ms', '2.5 s', '4 us')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _scaled(number: float, step: float, units: Sequence[str]) -> str:
    size, unit = float(number), 0
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / step, unit + 1
    return f"{size:.3g}{units[unit]}"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def units_word(granularity: str) -> str:
    """Name the units of a granularity, in the plural.

    >>> units_word("filter"), units_word("Coupled()")
    ('filters', 'channels')
    """
    return "channels" if granularity.lower().startswith("coupled") else f"{granularity}s"


def table(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1, foot: int = 0) -> list[str]:
    """Lay out a table as lines of text.

    Args:
        header: The columns' heads.
        body: The rows.
        left: The number of first columns that are aligned to the left.
        foot: The number of last rows that stand below a rule.
    """
    rules = [1, len(body) + 1 - foot] if foot else [1]
    return ruled([header, *body], rules, left)


def ruled(rows: Sequence[Sequence[str]], rules: Sequence[int], left: int = 1, gap: int = 2) -> list[str]:
    """Lay out rows as lines of text, with rules between them.

    Args:
        rows: The rows, of equal length.
        rules: The numbers of the rows that have a rule above them.
        left: The number of first columns that are aligned to the left.
        gap: Spaces between two columns.

    >>> ruled([["unit", "count"], ["filter", "8"]], [1])
    ['unit    count', '-------------', 'filter      8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "-" * (sum(widths) + gap * (len(widths) - 1))
    lines = []
    for i, row in enumerate(rows):
        cells = (c.ljust(w) if j < left else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines += [rule] * (i in rules) + [(" " * gap).join(cells).rstrip()]
    return lines


def new_axes(width: float, height: float, columns: int = 1) -> Any:
    """Make a figure, and return its axes: one, or an array of as many as there are columns."""
    return new_figure(width, height).subplots(1, columns)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure on white ground; sizes in inches."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained", facecolor="white")


def line_colors(count: int) -> list[Any]:
    """Return `count` colours for the lines of one picture, from blue over green to red."""
    from matplotlib import colormaps

    return [colormaps["turbo"](0.08 + 0.84 * i / max(1, count - 1)) for i in range(count)]


def dress(axes: Axes, title: str, grid: Literal["x", "y"] | None = None) -> None:
    """Apply the library's look to axes.

    Args:
        axes: The axes, with all that was drawn.
        title: The title above it, at the left.
        grid: `x` or `y`, the axis whose values are read off lines across; None for no lines.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_title(title, loc="left", pad=12, fontsize=12, weight="bold", color=INK)
