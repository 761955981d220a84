"""Result of a training along a route: what each stage has learned from, as data, table and picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fasterai.display import QUIET, Brief, Shown, Table, counted, dress, line_colors, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RouteResult", "Stage"]


@dataclass(frozen=True, repr=False)
class Stage(Brief):
    """Stage of a training along a route.

    Attributes:
        anchor: The place of its anchor among those of the route, from 0.
        score: What the training has returned, if it is a number.
        hardness: The hardness of every anchor from this one on for the student after the stage, if it was measured.
    """

    anchor: int
    score: float | None = None
    hardness: tuple[float, ...] = ()


@dataclass(frozen=True, repr=False)
class RouteResult(Shown):
    """Stages of a training along a route; `print` shows them as a table.

    Attributes:
        stages: The stages, in their order.
        anchors: The names of all anchors of the route.
    """

    stages: tuple[Stage, ...]
    anchors: tuple[str, ...]

    @property
    def visited(self) -> tuple[int, ...]:
        """The places of the anchors that the student has learned from."""
        return tuple(stage.anchor for stage in self.stages)

    def _line(self) -> str:
        score = self.stages[-1].score
        return f"<RouteResult: {self._words()}{'' if score is None else f', score {score:.4g}'}>"

    def _words(self) -> str:
        return f"{counted(len(self.stages), 'stage')}, of {counted(len(self.anchors), 'anchor')}"

    def _parts(self) -> Iterator[Table | str]:
        yield self._words()
        yield self.table()

    def table(self) -> Table:
        """Return a row for each stage: its anchor, its score, and how hard anchors are after it."""
        header = ["stage", "anchor", "score", "hardness", "of the next", "of the last"]
        body = []
        for k, stage in enumerate(self.stages):
            following = self.stages[k + 1].anchor - stage.anchor if k + 1 < len(self.stages) else None
            places = (0, following, -1) if stage.hardness else (None, None, None)
            found = ["" if place is None else f"{stage.hardness[place]:.4f}" for place in places]
            score = "" if stage.score is None else f"{stage.score:.4g}"
            body.append([str(k + 1), f"{stage.anchor + 1}: {self.anchors[stage.anchor]}", score, *found])
        wide = 6 if any(stage.hardness for stage in self.stages) else 3
        return Table(header[:wide], [row[:wide] for row in body], left=2)

    @styled()
    def plot(self, figsize: tuple[float, float] = (7, 4), ax: Axes | None = None) -> Axes:
        """Draw the hardness of the anchors after each stage, or the scores of stages where no hardness was measured.

        Args:
            figsize: Width and height of a new figure, in inches.
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(*figsize) if ax is None else ax
        measured = any(stage.hardness for stage in self.stages)
        self._draw_hardness(axes) if measured else self._draw_scores(axes)
        return axes

    def _draw_hardness(self, axes: Axes) -> None:
        for k, (stage, color) in enumerate(zip(self.stages, line_colors(len(self.stages)), strict=True)):
            places = range(stage.anchor + 1, len(self.anchors) + 1)
            axes.plot(places, stage.hardness, color=color, marker="o", markersize=3.5, linewidth=1.5, label=f"stage {k + 1}")
            axes.plot(places[0], stage.hardness[0], color=color, marker="o", markersize=8.0)
        axes.set(xlabel="anchor of the teacher's route", ylabel="KL(anchor || student), nats")
        axes.set_xticks(range(1, len(self.anchors) + 1))
        dress(axes, "Hardness of anchors after each stage", grid="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)

    def _draw_scores(self, axes: Axes) -> None:
        places = [stage.anchor + 1 for stage in self.stages if stage.score is not None]
        scores = [stage.score for stage in self.stages if stage.score is not None]
        axes.plot(places, scores, color=QUIET, marker="o", linewidth=1.5)
        axes.set(xlabel="anchor of the teacher's route", ylabel="score of the student")
        axes.set_xticks(range(1, len(self.anchors) + 1))
        dress(axes, "Score after each stage", grid="y")
