"""Picture of a study: the mean over the seeds, with the spread, in lines or in bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasterai.display import QUIET, SERIES, SMALL, as_percent, dress, line_colors, new_figure, styled
from fasterai.study.description import Study
from fasterai.study.rows import Row, is_share, write_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

#: Characters of a title, beyond which it is the study's name.
LONGEST = 64
#: Points between two lines at one name of an axis, and points for all of them.
ASIDE, ROOM = 7.0, 36.0
#: Values of an axis that are marked one by one along the picture.
TICKS = 8


@styled()
def draw(study: Study, rows: Sequence[Row], conditions: str, *, shown: bool = True) -> Axes:
    """Draw the mean over the study's x, a line for each value of its lines, with the spread around it."""
    rows = [row for row in rows if study.y in row.values]
    colors = _colors(study, rows)
    panels = list(dict.fromkeys(row.settings.get(study.panels, "") for row in rows)) if study.panels else []
    if len(panels) < 2:
        axes = new_figure(8.0, 4.6, shown=shown, pad=0.1).subplots()
        _draw_lines(axes, study, rows, colors)
        title = study.about if len(study.about) < LONGEST else study.name
        dress(axes, title[:1].upper() + title[1:], grid="y", below=conditions)
        return axes
    height = math.ceil(len(panels) / 2)
    figure = new_figure(9.6, 0.9 + 3.1 * height, shown=shown, pad=0.1)
    grid = figure.subplots(height, 2, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        found = [row for row in rows if row.settings.get(study.panels) == panel]
        _draw_lines(axes, study, found, colors, explained=False)
        dress(axes, str(panel), grid="y")
    for axes in grid[len(panels) :]:
        axes.remove()
    pairs = (pair for axes in grid[: len(panels)] for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    lines = {name: handle for handle, name in pairs}  # panels may have lines of their own
    names = {"ncols": min(4, max(1, len(lines))), "handlelength": 1.2}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", **names)
    figure.suptitle(f"{study.about}\n{conditions}", x=0.01, ha="left", fontsize=SMALL, color=QUIET)
    first: Axes = grid[0]
    return first


def _line_of(study: Study, row: Row) -> str:
    return ", ".join(write_setting(axis, row.settings.get(axis, "")) for axis in study.line_axes)


def _is_reference(study: Study, row: Row) -> bool:
    return bool(study.reference) and all(row.settings.get(axis) == value for axis, value in study.reference.items())


def _colors(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """Give each line a colour, the same in all panels."""
    names = list(dict.fromkeys(_line_of(study, row) for row in rows if not _is_reference(study, row)))
    return dict(zip(names, SERIES[1:] if len(names) < len(SERIES) else line_colors(len(names)), strict=False))


def _draw_lines(axes: Axes, study: Study, rows: Sequence[Row], colors: Mapping[str, Any], explained: bool = True) -> None:
    """Draw the lines of a study, and explain them beside the axes."""
    reference = [row for row in rows if _is_reference(study, row)]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row not in reference:
            lines.setdefault(_line_of(study, row), []).append(row)
    for row in reference:
        _draw_level(axes, row, study.y, " ".join(map(str, study.reference.values())))
    courses = any(row.course(study.x, study.y) for row in rows)
    numbers = courses or all(isinstance(_x(row, study.x), int | float) for row in rows if row not in reference)
    for i, (name, found) in enumerate(lines.items()):
        aside = 0.0 if numbers else (i - (len(lines) - 1) / 2) * min(ASIDE, ROOM / len(lines))
        _draw_line(axes, name, found, (study.x, study.y), colors[name], joined=numbers, aside=aside)
    axes.set(xlabel=study.x.replace("_", " "), ylabel=study.y.replace("_", " "))
    places = sorted({_x(row, study.x) for row in rows if row not in reference}) if numbers and not courses else []
    if courses:
        places = sorted({x for row in rows for x, _ in row.course(study.x, study.y)})
    if (courses or study.x in (rows[0].settings if rows else {})) and 0 < len(places) <= TICKS:
        axes.set_xticks(places)
    room = LONGEST if explained else LONGEST / 2  # of panels that share one explanation there are several in a row
    if not numbers and sum(len(str(_x(row, study.x))) for row in next(iter(lines.values()), [])) > room:
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    if is_share(study.x) and numbers:
        axes.xaxis.set_major_formatter(as_percent)
    if is_share(study.y):
        axes.yaxis.set_major_formatter(as_percent)
    if any(lines) and explained:  # one line without a name needs none
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)


def _x(row: Row, name: str) -> Any:
    return row.mean(name) if name in row.values else row.settings.get(name, "")


def _draw_line(
    axes: Axes, name: str, rows: list[Row], of: tuple[str, str], color: Any, joined: bool, aside: float = 0.0
) -> None:
    """Draw a line: its courses, or its means and their spread, as many points aside as is said, so that none hides another."""
    from matplotlib.transforms import ScaledTranslation  # slow to load

    if any(row.course(*of) for row in rows):
        for row in rows:
            axes.plot(*zip(*row.course(*of), strict=True), color=color, label=name, marker="o", markersize=3.0, linewidth=1.5)
        return
    points = [(_x(row, of[0]), row.mean(of[1]), row.spread(of[1])) for row in rows]
    if joined:
        points.sort()
    x, y, spread = ([point[i] for point in points] for i in range(3))
    style = {"marker": "o", "markersize": 4.5, "capsize": 2.5, "elinewidth": 1.0, "linewidth": 1.8 if joined else 0.0}
    drawn = axes.errorbar(x, y, yerr=spread, color=color, label=name or None, **style)  # type: ignore[arg-type]
    for part in drawn.get_children():
        part.set_transform(axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans))


def _draw_level(axes: Axes, row: Row, y: str, name: str) -> None:
    mean, spread = row.mean(y), row.spread(y)
    axes.axhspan(mean - spread, mean + spread, color=SERIES[0], alpha=0.15, linewidth=0)
    axes.axhline(mean, color=SERIES[0], linewidth=1.4)
    place = {"xytext": (-4, 4), "ha": "right", "textcoords": "offset points", "fontsize": SMALL, "color": QUIET}
    axes.annotate(name, (1, mean), xycoords=("axes fraction", "data"), **place)  # type: ignore[arg-type]
