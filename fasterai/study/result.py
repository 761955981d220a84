"""Result of a study: mean and spread over the seeds, as a table, a picture and a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fasterai.core.files import write_file
from fasterai.display import Shown, Table, counted, save_figure
from fasterai.study.description import Run, Settings, Size, Study
from fasterai.study.rows import Row, by_metric, is_course, write_cell, write_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Result"]


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """All runs of a study that were asked for.

    Attributes:
        study: What was run.
        size: How much each run trained.
        data: What it trained on, in words.
        runs: What was asked for.
        done: Key of a run -> its metrics.
        failed: Key of a run -> (number of its trial, error).
    """

    study: Study
    size: Size
    data: str
    runs: tuple[Run, ...]
    done: Mapping[str, Mapping[str, float]] = field(repr=False)
    failed: Mapping[str, tuple[int, str]] = field(repr=False)

    @property
    def rows(self) -> list[Row]:
        """One row for each combination of settings with a run that is done, in the order of the grid."""
        found: dict[str, tuple[Settings, list[Mapping[str, float]]]] = {}
        for run in self.runs:
            if run.key in self.done:
                found.setdefault(str(dict(run.settings)), (run.settings, []))[1].append(self.done[run.key])
        return [Row(settings, by_metric(metrics)) for settings, metrics in found.values()]

    @property
    def failures(self) -> dict[str, str]:
        """Run in words -> its error, of those asked for."""
        return {str(run): self.failed[run.key][1] for run in self.runs if run.key in self.failed}

    def table(self) -> Table:
        """Return the table: settings, then mean and spread of every metric."""
        rows = self.rows
        axes = list(dict.fromkeys(axis for row in rows for axis in row.settings))
        named = dict.fromkeys([self.study.y, *(name for row in rows for name in row.values)])
        metrics = [name for name in named if not is_course(name)]
        body = [
            [*(write_setting(axis, row.settings.get(axis, "")) for axis in axes), *(write_cell(row, name) for name in metrics)]
            for row in rows
        ]
        return Table([*axes, *metrics], body, left=len(axes))

    def markdown(self) -> str:
        """Return the table as Markdown, with a line of its conditions."""
        table = self.table()
        sides = ["---"] * table.left + ["---:"] * (len(table.header) - table.left)
        lines = [f"| {' | '.join(cells)} |" for cells in (table.header, sides, *table.body)]
        return "\n".join([self.conditions(), "", *lines, ""])

    def conditions(self) -> str:
        """Return what was trained on, how long, and how many seeds, in one line."""
        seeds = dict.fromkeys(run.seed for run in self.runs)
        parts = [self.data, counted(self.size.epochs, "epoch"), f"seeds {', '.join(map(str, seeds))}"]
        return "; ".join(part for part in parts if part)

    def plot(self) -> Axes:
        """Draw the mean over the study's x, a line for each value of its lines, with the spread around it."""
        from fasterai.study.picture import draw  # matplotlib is slow to load

        return draw(self.study, self.rows, self.conditions())

    def save(self, folder: Path) -> None:
        """Write `runs.csv`, `table.md` and `picture.png`."""
        from fasterai.study.picture import draw

        write_file(folder / "runs.csv", lambda file: file.write(self.csv().encode()))
        if self.rows:
            write_file(folder / "table.md", lambda file: file.write(self.markdown().encode()))
            figure = draw(self.study, self.rows, self.conditions(), shown=False).figure
            write_file(folder / "picture.png", lambda file: save_figure(figure, file))  # type: ignore[arg-type]

    def csv(self) -> str:
        """Return one line for each run: settings, seed, metrics, and why it failed."""
        axes = list(dict.fromkeys(axis for run in self.runs for axis in run.settings))
        metrics = list(dict.fromkeys(name for run in self.runs for name in self.done.get(run.key, {})))
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([*axes, "seed", *metrics, "failure"])
        for run in self.runs:
            found = self.done.get(run.key, {})
            failure = "" if run.key in self.done else self.failed.get(run.key, (0, ""))[1]
            lines.writerow([*(run.settings.get(a, "") for a in axes), run.seed, *(found.get(m, "") for m in metrics), failure])
        return text.getvalue()

    def _line(self) -> str:
        done = sum(run.key in self.done for run in self.runs)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"<Result: {self.study.name} {self.size.name}, {done} of {counted(len(self.runs), 'run')}{failed}>"

    def _parts(self) -> Iterable[Table | str]:
        yield f"{self.study.name}: {self.study.about}"
        yield self.conditions()
        yield ""
        if self.rows:
            yield self.table()
        for run, error in self.failures.items():
            yield f"failed: {run}: {error}"
