"""Rows of a study's table: the results of one combination of settings over the seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasterai.display import short
from fasterai.study.description import Settings

__all__ = ["Row", "by_metric", "is_course", "is_share", "write_cell", "write_setting"]

#: Metrics that are shares, written in percent.
SHARES = ("accuracy", "precision", "recall", "share", "sparsity")
#: A metric after a part of the run, such as `epoch_3_accuracy`.
COURSE = re.compile(r"([a-z]+)_(\d+)_(\w+)")


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

    def course(self, x: str, metric: str) -> list[tuple[int, float]]:
        """Return the mean of a metric after each part of the run: of `epoch_3_accuracy` and so on for an `x` of `epoch`."""
        found = {name: COURSE.fullmatch(name) for name in self.values}
        parts = ((int(m[2]), self.mean(name)) for name, m in found.items() if m and (m[1], m[3]) == (x, metric))
        return sorted(parts)


def by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return metric -> its values, of the metrics of several runs."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [run[name] for run in runs if name in run] for name in names}


def is_course(name: str) -> bool:
    """Tell if a metric is of a part of the run: pictures draw it, and tables leave it out."""
    return COURSE.fullmatch(name) is not None


def is_share(name: str) -> bool:
    """Tell if a metric or an axis is written in percent: its name ends with one of a share."""
    return name.endswith(SHARES)


def write_setting(axis: str, value: Any) -> str:
    """Write the value of an axis, in percent where it is a share."""
    if isinstance(value, float) and is_share(axis):
        return f"{100 * value:g} %"
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_cell(row: Row, metric: str) -> str:
    """Write mean and spread, in percent where the metric is a share."""
    if metric not in row.values:
        return ""
    mean, spread = row.mean(metric), row.spread(metric)
    if is_share(metric):
        return f"{100 * mean:.1f} ± {100 * spread:.1f}"
    if not spread:
        return f"{mean:,.0f}" if mean == int(mean) else f"{mean:.4g}"
    return f"{short(mean)} ± {short(spread)}" if mean >= 1000 else f"{mean:.4g} ± {spread:.2g}"
