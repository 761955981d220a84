"""Rows of a study's table: the results of one combination of settings over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasterai.display import short
from fasterai.study.description import Settings

__all__ = ["Row", "by_metric", "is_share", "write_cell", "write_setting"]

#: Metrics that are shares, written in percent.
SHARES = ("accuracy", "share", "sparsity")


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


def by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return metric -> its values, of the metrics of several runs."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [run[name] for run in runs if name in run] for name in names}


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
