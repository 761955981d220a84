"""Look of reports: numbers in words, tables as text and as HTML, one line for each value, one style for all pictures.

Over 300 lines, since all that is seen of the library is formed here.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AREA",
    "DPI",
    "EMPTY",
    "GRID",
    "HEAT",
    "INK",
    "MODELS",
    "PAPER",
    "QUIET",
    "SERIES",
    "SMALL",
    "TEXT",
    "TITLE",
    "Brief",
    "Shown",
    "Table",
    "as_percent",
    "brief",
    "counted",
    "dress",
    "legend_above",
    "line_colors",
    "model_colors",
    "new_axes",
    "new_figure",
    "of_batch",
    "one_line",
    "ruled",
    "save_figure",
    "settings",
    "short",
    "short_bytes",
    "short_time",
    "styled",
    "table",
    "units_word",
]

INK, QUIET, GRID, EMPTY, PAPER = "#22303c", "#6b7a88", "#e3e8ed", "#eef1f4", "#ffffff"
#: Colours of models or lines, in their order: the first is the one that the others are held against.
SERIES = ("#7b8794", "#f0a35e", "#d9480f", "#1c7293", "#5c7c3a", "#8e5a9b")
#: Colours of models by what users call them.
MODELS = {"dense": SERIES[0], "sparse": SERIES[2], "masked": SERIES[2], "small": SERIES[3]}
#: Ground under a line of the third colour.
AREA = "#fbe3d3"
#: Matplotlib's name of the colours of a map, from nothing to the most.
HEAT = "OrRd"
#: Sizes of text: titles, all else, and what stands beside bars and in maps. Dots per inch of files.
TITLE, TEXT, SMALL, DPI = 12.0, 10.0, 8.5, 150
#: Matplotlib's settings of every picture of the library, of its command line, of the docs and of the benchmarks.
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": PAPER,
    "axes.labelcolor": QUIET,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": TITLE,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "grid.color": GRID,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.labelcolor": QUIET,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


#: Characters of a `repr` at most; items of a collection that it lists.
LONGEST_LINE, MOST_ITEMS, MOST_DIGITS = 120, 4, 12


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


def of_batch(samples: int | None) -> str:
    """Name the batch that a figure is of; nothing if there is none.

    >>> "MACs" + of_batch(1), "MACs" + of_batch(8), "MACs" + of_batch(None)
    ('MACs of 1 sample', 'MACs of 8 samples', 'MACs')
    """
    return "" if samples is None else f" of {counted(samples, 'sample')}"


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


@dataclass(frozen=True)
class Table:
    """Table of a report, laid out as text or as HTML with the same cells.

    Attributes:
        header: The columns' heads.
        body: The rows.
        left: The number of first columns that are aligned to the left.
        foot: The number of last rows that stand below a rule.
        text: Lines to print in place of the laid-out table, with the same cells.
    """

    header: Sequence[str]
    body: Sequence[Sequence[str]]
    left: int = 1
    foot: int = 0
    text: Sequence[str] | None = None

    def lines(self) -> list[str]:
        """Lay out the table as lines of text."""
        return table(self.header, self.body, self.left, self.foot) if self.text is None else list(self.text)

    def html(self) -> str:
        """Lay out the table as HTML, all cells escaped."""
        split = len(self.body) - self.foot
        parts = [("thead", "th", [self.header]), ("tbody", "td", self.body[:split]), ("tfoot", "th", self.body[split:])]
        inner = "".join(
            f"<{part}>{''.join(self._row(cells, tag) for cells in rows)}</{part}>" for part, tag, rows in parts if rows
        )
        return f"<table>{inner}</table>"

    def _row(self, cells: Sequence[str], tag: str) -> str:
        from html import escape  # only notebooks need it

        sides = ["left"] * self.left + ["right"] * (len(cells) - self.left)
        written = [f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=False)]
        return f"<tr>{''.join(written)}</tr>"


class Shown(ABC):
    """Value that is seen in three ways: `repr` is one line, `print` shows all of it, and a notebook shows that as tables."""

    @abstractmethod
    def _line(self) -> str:
        """Return the line that `repr` shows."""

    @abstractmethod
    def _parts(self) -> Iterable[Table | str]:
        """Return tables and lines of text, in their order; an empty line sets them apart."""

    def __repr__(self) -> str:
        return one_line(self._line())

    def __str__(self) -> str:
        return "\n".join(line for part in self._parts() for line in (part.lines() if isinstance(part, Table) else [part]))

    def _repr_html_(self) -> str:
        from html import escape

        parts = [part.html() if isinstance(part, Table) else f"<div>{escape(part)}</div>" for part in self._parts() if part]
        return f"<div>{''.join(parts)}</div>"


class Brief:
    """Dataclass whose `repr` is one line: long values in it are described. Use it with `@dataclass(repr=False)`."""

    def __repr__(self) -> str:
        own: Any = self
        values = ", ".join(f"{f.name}={brief(getattr(own, f.name))}" for f in fields(own) if f.repr)
        return one_line(f"{type(self).__name__}({values})")


def told_apart(first: float, second: float, digits: int = 4) -> tuple[str, str]:
    """Write two numbers with so many digits that they differ, if they do; 12 at most.

    >>> told_apart(0.35, 0.7), told_apart(0.69999, 0.7)
    (('0.3500', '0.7000'), ('0.69999', '0.70000'))
    """
    while f"{first:.{digits}f}" == f"{second:.{digits}f}" and first != second and digits < MOST_DIGITS:
        digits += 1
    return f"{first:.{digits}f}", f"{second:.{digits}f}"


def one_line(text: str) -> str:
    r"""Shorten a text to one line of at most 120 characters.

    >>> one_line("a  b\n c")
    'a b c'
    """
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 4].rstrip()} ..."


def brief(value: Any) -> str:
    """Describe a value in a few words, without an address.

    >>> brief(0.5), brief({"a": 1}), brief([1] * 9), brief(one_line)
    ('0.5', "{'a': 1}", '9 items', 'one_line')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__}({', '.join(map(str, value.shape))})"
    if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > MOST_ITEMS:
        return counted(len(value), "item")
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {brief(one)}' for key, one in value.items())}}}"
    if type(value) in (list, tuple):
        inner = ", ".join(map(brief, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    text = repr(value)
    if " at 0x" in text or "\n" in text or len(text) > LONGEST_LINE:
        return str(getattr(value, "__name__", type(value).__name__))
    return text


def settings(pairs: Mapping[str, Any]) -> Table:
    """Return a table of settings and their values."""
    body = [(name, value if isinstance(value, str) else brief(value)) for name, value in pairs.items()]
    return Table(("setting", "value"), body, left=2)


@contextmanager
def styled() -> Iterator[None]:
    """Apply the library's style to all that is drawn inside; also a decorator, `@styled()`, of functions that draw.

    Only its own settings are put back. A notebook's backend begins with the first figure, and sets `interactive`, without which
    no later picture is shown; `matplotlib.rc_context` would put that back as well.
    """
    import matplotlib as mpl

    before = {name: mpl.rcParams[name] for name in STYLE}
    mpl.rcParams.update(STYLE)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


@styled()
def new_axes(width: float, height: float, columns: int = 1) -> Any:
    """Make a figure, and return its axes: one, or an array of as many as there are columns."""
    return new_figure(width, height).subplots(1, columns)


@styled()
def new_figure(width: float, height: float, *, shown: bool = True, pad: float = 0.04) -> Figure:
    """Make an empty figure; sizes in inches.

    Args:
        width: Its width.
        height: Its height.
        shown: True if a notebook is to show it by itself; False for a figure that is only written to a file.
        pad: Inches between the parts of the figure and around them.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    if not shown:
        from matplotlib.figure import Figure  # not pyplot: no window, no state that others could see

        return Figure(figsize=(width, height), layout=engine)
    import matplotlib.pyplot as plt

    from fasterai.figures import OpenFigure

    return plt.figure(figsize=(width, height), layout=engine, FigureClass=OpenFigure)


def save_figure(figure: Figure, path: Path | BinaryIO) -> None:
    """Write a figure as PNG into a file, given by its path or open, and close it where a notebook would show it."""
    try:
        figure.savefig(path, format="png", backend="agg", dpi=DPI)
    finally:
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close(figure)


def model_colors(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each model: dense, sparse and small ones have the same in every picture."""
    names = list(names)
    spare = [color for color in SERIES if color not in {MODELS[name] for name in names if name in MODELS}]
    others = [name for name in names if name not in MODELS]
    chosen = {name: (spare or SERIES)[i % len(spare or SERIES)] for i, name in enumerate(others)}
    return {name: MODELS.get(name) or chosen[name] for name in names}


def legend_above(axes: Axes, *given: Any) -> None:
    """Explain the colours in one line above the axes, at the right, where nothing is drawn.

    Args:
        axes: The axes.
        *given: Handles and labels; those of what was drawn if they are left out.
    """
    count = len(given[0]) if given else len(axes.get_legend_handles_labels()[0])
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2, "handlelength": 1.2}
    axes.legend(*given, ncols=max(1, count), **place)


def write_above(axes: Axes, text: str, place: float, height: float) -> None:
    """Write a few quiet words above the end of a bar."""
    where: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, (place, height), **where, color=QUIET, fontsize=SMALL)


def line_colors(count: int) -> list[Any]:
    """Return `count` colours for the lines of one picture, from blue over green to red."""
    from matplotlib import colormaps

    return [colormaps["turbo"](0.08 + 0.84 * i / max(1, count - 1)) for i in range(count)]


def dress(axes: Axes, title: str, grid: Literal["x", "y"] | None = None, below: str = "") -> None:
    """Apply the library's style to axes, of whatever style they were made.

    Args:
        axes: The axes, with all that was drawn.
        title: The title above it, at the left.
        grid: `x` or `y`, the axis whose values are read off lines across; None for no lines.
        below: A line under the title, such as the conditions.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_title(title, loc="left", pad=26 if below else 12, fontsize=TITLE, weight="bold", color=INK)
    if below:
        axes.annotate(
            below, (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=SMALL
        )


def as_percent(value: float, _: float = 0.0) -> str:
    """Write a share at a tick: whole percents where they are."""
    return f"{value:.0%}" if abs(100 * value - round(100 * value)) < 1e-6 else f"{value:.1%}"
