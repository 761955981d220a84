"""Result of a study: mean and spread over the seeds, as a table, a picture and a CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasterai.core.files import write_file
from fasterai.display import Shown, Table, counted, save_figure, short
from fasterai.study.description import Run, Settings, Size, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Result", "Row"]

#: Metrics that are shares, written in percent.
SHARES = ("accuracy", "sparsity")


@dataclass(frozen=True)
class Row:
    """Results of one combination of settings over the seeds.

    Attributes:
        settings: Axis -> value.
        values: Metric -> its value for each seed that is done.
    """

    settings: Settings
    values: Mapping[str, Sequence[float]]

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.values[metric])

    def spread(self, metric: str) -> float:
        """Return the standard deviation over the seeds (divided by their number less one); 0 for a single one."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0


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
        return [Row(settings, _by_metric(metrics)) for settings, metrics in found.values()]

    @property
    def failures(self) -> dict[str, str]:
        """Run in words -> its error, of those asked for."""
        return {str(run): self.failed[run.key][1] for run in self.runs if run.key in self.failed}

    def table(self) -> Table:
        """Return the table: settings, then mean and spread of every metric."""
        rows = self.rows
        axes = list(dict.fromkeys(axis for row in rows for axis in row.settings))
        metrics = list(dict.fromkeys([self.study.y, *(name for row in rows for name in row.values)]))
        body = [
            [*(_written(axis, row.settings.get(axis, "")) for axis in axes), *(_cell(row, name) for name in metrics)]
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

        return draw(self)

    def save(self, folder: Path) -> None:
        """Write `runs.csv`, `table.md` and `picture.png`."""
        from fasterai.study.picture import draw

        write_file(folder / "runs.csv", lambda file: file.write(self.csv().encode()))
        if self.rows:
            write_file(folder / "table.md", lambda file: file.write(self.markdown().encode()))
            figure = draw(self, shown=False).figure
            write_file(folder / "picture.png", lambda file: save_figure(figure, file))  # type: ignore[arg-type]

    def csv(self) -> str:
        """Return one line for each run: settings, seed, metrics, error."""
        axes = list(dict.fromkeys(axis for run in self.runs for axis in run.settings))
        metrics = list(dict.fromkeys(name for run in self.runs for name in self.done.get(run.key, {})))
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([*axes, "seed", *metrics, "error"])
        for run in self.runs:
            found = self.done.get(run.key, {})
            error = "" if run.key in self.done else self.failed.get(run.key, (0, ""))[1]
            lines.writerow([*(run.settings.get(a, "") for a in axes), run.seed, *(found.get(m, "") for m in metrics), error])
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


def _by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [run[name] for run in runs if name in run] for name in names}


def is_share(name: str) -> bool:
    """Tell if a metric or an axis is written in percent: its name ends with one of a share."""
    return name.rsplit("_", maxsplit=1)[-1] in SHARES


def _written(axis: str, value: Any) -> str:
    if isinstance(value, float) and is_share(axis):
        return f"{100 * value:g} %"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(row: Row, metric: str) -> str:
    """Write mean and spread, in percent where the metric is a share."""
    if metric not in row.values:
        return ""
    mean, spread = row.mean(metric), row.spread(metric)
    if is_share(metric):
        return f"{100 * mean:.1f} ± {100 * spread:.1f}"
    if not spread:
        return f"{mean:,.0f}" if mean == int(mean) else f"{mean:.4g}"
    return f"{short(mean)} ± {short(spread)}" if mean >= 1000 else f"{mean:.4g} ± {spread:.2g}"
