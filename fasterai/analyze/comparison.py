"""Comparison of several models, for instance dense, masked and small: the cost and the speed of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fasterai.analyze.cost import Cost, cost
from fasterai.analyze.latency import LatencyComparison, compare_latency
from fasterai.analyze.layers import LayerComparison, LayerRow
from fasterai.display import QUIET, SERIES, dress, new_axes, short, short_bytes, short_time, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]

#: Label, field of `Cost`, and how it is written.
MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", short),
    ("non-zero", "nonzero", short),
    ("MACs", "macs", short),
    ("file", "file_bytes", short_bytes),
    ("activations", "activation_bytes", short_bytes),
    ("held at once", "peak_bytes", short_bytes),
)


@dataclass(frozen=True)
class Comparison:
    """Costs and speeds of several models; `print` shows a table, and a sentence for each model after the first.

    Attributes:
        costs: Model name -> its cost. The others are compared with the first model.
        latency: Measured times; None if they were not measured.
    """

    costs: Mapping[str, Cost]
    latency: LatencyComparison | None = None

    @property
    def first(self) -> str:
        """Name of the first model, which the others are compared with."""
        return next(iter(self.costs))

    def share(self, name: str, field: str) -> float:
        """Return a model's figure divided by the first model's; `field` is one of `Cost`'s, such as `macs`. 0 / 0 gives 1.0."""
        own, base = getattr(self.costs[name], field), getattr(self.costs[self.first], field)
        return own / base if base else (1.0 if own == base else float("inf"))

    def layers(self) -> LayerComparison:
        """Compare the models layer by layer; layers without parameters and MACs in all models are left out."""
        by_model = {n: {row.name: row for row in c.layers if row.parameters or row.macs} for n, c in self.costs.items()}
        names = dict.fromkeys(layer for rows in by_model.values() for layer in rows)
        timed = {} if self.latency is None else {n: one.timings for n, one in self.latency.models.items()}
        sizes = (
            () if self.latency is None or not any(t.layers for ts in timed.values() for t in ts) else self.latency.batch_sizes
        )
        rows = []
        for layer in names:
            timings = {n: tuple(t.layers.get(layer) for t in ts) for n, ts in timed.items()} if sizes else {}
            rows.append(LayerRow(layer, {n: by_model[n].get(layer) for n in self.costs}, timings))
        return LayerComparison(tuple(self.costs), tuple(rows), sizes)

    def verdicts(self) -> tuple[str, ...]:
        """Return one sentence for each model after the first: its size and speed compared with the first model's."""
        return tuple(self._verdict(name) for name in self.costs if name != self.first)

    def _verdict(self, name: str) -> str:
        own, base = self.costs[name], self.costs[self.first]
        zeros, base_zeros = own.parameters - own.nonzero, base.parameters - base.nonzero
        same = (own.parameters, own.macs, own.file_bytes) == (base.parameters, base.macs, base.file_bytes)
        if same and zeros > base_zeros:
            text = f"{name}: {zeros / own.parameters:.1%} of its parameters are zero, but it is not smaller than {self.first}"
            return f"{text}, and computes as many MACs{self._speed(name, '; it is not faster either')}"
        if same:
            return f"{name}: the same size and MACs as {self.first}{self._speed(name, ', and as fast')}"
        shares = [f"{self.share(name, field):.1%} of the {label}" for label, field, _ in (MEASURES[0], *MEASURES[2:4])]
        return f"{name}: {', '.join(shares)} of {self.first}{self._speed(name, ', and not faster')}"

    def _speed(self, name: str, unchanged: str) -> str:
        """Return the end of a verdict: `unchanged` if the times are equal within the noise, else the measured ratios."""
        if self.latency is None:
            return "; its time was not measured"
        ratios = zip(self.latency.batch_sizes, self.latency.ratios[name], strict=True)
        figures = ", ".join(f"{r:.2f}x as fast" + ("" if b is None else f" at batch {b}") for b, r in ratios)
        return f"{unchanged} (measured: {figures})" if self.latency.is_same(name) else f"; measured: {figures}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        measured = None if self.latency is None else self.latency.to_dict()
        costs = {name: one.to_dict() for name, one in self.costs.items()}
        return {"costs": costs, "latency": measured, "verdicts": list(self.verdicts())}

    def __str__(self) -> str:
        names = tuple(self.costs)
        body = []
        for label, field, write in MEASURES:
            shares = ["", *(f" ({self.share(name, field):.1%})" for name in names[1:])]
            body.append([label, *(write(getattr(self.costs[n], field)) + s for n, s in zip(names, shares, strict=True))])
        body += [[label, *cells] for label, cells in self._times()]
        uncounted = dict.fromkeys(op for one in self.costs.values() for op in one.uncounted)
        lines = [*table(["", *names], body), *self.verdicts()]
        return "\n".join([*lines, *([f"not counted, without a rule: {', '.join(uncounted)}"] if uncounted else [])])

    def _times(self) -> list[tuple[str, list[str]]]:
        if self.latency is None:
            return []
        rows = []
        for i, size in enumerate(self.latency.batch_sizes):
            cells = []
            for name, one in self.latency.models.items():
                ratio = "" if name == self.first else f" ({self.latency.ratios[name][i]:.2f}x as fast)"
                cells.append(short_time(one.timings[i].median) + ratio)
            rows.append(("time" if size is None else f"time, batch {size}", cells))
        return rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every figure as a share of the first model's; time as well, if it was measured.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        groups = [(label, [self.share(name, field) for name in self.costs]) for label, field, _ in MEASURES]
        if self.latency is not None:
            for i, size in enumerate(self.latency.batch_sizes):
                label = "time" if size is None else f"time,\nbatch {size}"
                groups.append((label, [1 / self.latency.ratios[name][i] for name in self.costs]))
        axes = new_axes(max(6.0, 1.3 * len(groups)), 4.0) if ax is None else ax
        width = 0.84 / len(self.costs)
        for i, name in enumerate(self.costs):
            places = np.arange(len(groups)) + (i - (len(self.costs) - 1) / 2) * width
            heights = [values[i] for _, values in groups]
            axes.bar(places, heights, width * 0.92, color=SERIES[i % len(SERIES)], label=name)
            for place, height in zip(places, heights, strict=True) if i else ():
                axes.annotate(
                    f"{height:.0%}", (place, height), xytext=(0, 2), textcoords="offset points", ha="center", color=QUIET,
                    fontsize=8,
                )  # fmt: skip
        axes.set_xticks(range(len(groups)), [label for label, _ in groups])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(0, 1.12 * max(max(values) for _, values in groups))
        axes.set_ylabel(f"share of {self.first}")
        dress(axes, f"{', '.join(self.costs)}: less is better", grid="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(self.costs), frameon=False, labelcolor=QUIET)
        return axes


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    latency: bool = True,
    batch_sizes: Sequence[int] | None = (1,),
    threads: int = 1,
    channels_last: bool = False,
    min_run_time: float = 1.0,
) -> Comparison:
    """Count and measure models side by side.

    Args:
        models: Name -> model; the others are compared with the first.
        example_inputs: A tensor, or a tuple or list of positional arguments, that all models run on.
        latency: True to measure time, which takes `min_run_time` for each model and batch size.
        batch_sizes: As for `analyze.latency.latency`.
        threads: As there.
        channels_last: As there.
        min_run_time: Seconds for each model and batch size.

    Raises:
        TypeError: A model is no module.
        ValueError: There is no model, a number is out of range, or a model does not run on these inputs.
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models must be a dict of at least one name and model, got {models!r}")
    costs = {name: _cost(name, model, example_inputs) for name, model in models.items()}
    if not latency:
        return Comparison(costs)
    options = {"threads": threads, "channels_last": channels_last, "min_run_time": min_run_time}
    return Comparison(costs, compare_latency(models, example_inputs, batch_sizes=batch_sizes, **options))  # type: ignore[arg-type]


def _cost(name: str, model: nn.Module, example_inputs: Any) -> Cost:
    try:
        return cost(model, example_inputs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for models[{name!r}]") from error
