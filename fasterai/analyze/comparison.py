"""Comparison of several models, for instance dense, masked and small: the cost and the speed of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fasterai.analyze.cost import Cost, cost
from fasterai.analyze.latency import LatencyComparison, compare_latency
from fasterai.analyze.layers import LayerComparison, LayerRow
from fasterai.display import (
    Shown,
    Table,
    as_percent,
    counted,
    dress,
    legend_above,
    model_colors,
    new_axes,
    of_batch,
    short,
    short_bytes,
    short_time,
    styled,
    write_above,
)
from fasterai.model.running import evaluating, undisturbed

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


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Costs and speeds of several models; `print` shows a table, and a sentence for each model after the first.

    Attributes:
        costs: Model name -> its cost. The others are compared with the first model.
        latency: Measured times; None if they were not measured.
        scores: Name of a score -> model name -> its value; empty if none was asked for.
    """

    costs: Mapping[str, Cost]
    latency: LatencyComparison | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

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
        return LayerComparison(tuple(self.costs), tuple(rows), sizes, self.batch_size)

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
        speeds = {size: self.latency.speed(name, size) for size in self.latency.batch_sizes}
        figures = ", ".join(speed.words(size) for size, speed in speeds.items())
        is_same = all(speed.is_same for speed in speeds.values())
        return f"{unchanged} (measured: {figures})" if is_same else f"; measured: {figures}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        measured = None if self.latency is None else self.latency.to_dict()
        costs = {name: one.to_dict() for name, one in self.costs.items()}
        scores = {label: dict(values) for label, values in self.scores.items()}
        return {"costs": costs, "latency": measured, "scores": scores, "verdicts": list(self.verdicts())}

    @property
    def batch_size(self) -> int | None:
        """Number of samples that the models were counted on."""
        return self.costs[self.first].batch_size

    def _line(self) -> str:
        return f"<Comparison of {counted(len(self.costs), 'model')}: {'; '.join(self.verdicts()) or self.first}>"

    def _parts(self) -> Iterator[Table | str]:
        names = tuple(self.costs)
        body = [[label, *(f"{values[name]:.4g}" for name in names)] for label, values in self.scores.items()]
        for label, measure, write in self._labels():
            shares = ["", *(f" ({self.share(name, measure):.1%})" for name in names[1:])]
            body.append([label, *(write(getattr(self.costs[n], measure)) + s for n, s in zip(names, shares, strict=True))])
        body += [[label, *cells] for label, cells in self._times()]
        uncounted = dict.fromkeys(op for one in self.costs.values() for op in one.uncounted)
        yield Table(["", *names], body)
        yield from self.verdicts()
        if uncounted:
            yield f"not counted, without a rule: {', '.join(uncounted)}"

    def _labels(self) -> list[tuple[str, str, Callable[[float], str]]]:
        """Return the measures, with the batch named that MACs are of."""
        return [
            (label + (of_batch(self.batch_size) if field == "macs" else ""), field, write) for label, field, write in MEASURES
        ]

    def _times(self) -> list[tuple[str, list[str]]]:
        if self.latency is None:
            return []
        rows = []
        for i, size in enumerate(self.latency.batch_sizes):
            cells = []
            for name, one in self.latency.models.items():
                speed = "" if name == self.first else f" ({self.latency.speed(name, size).words()})"
                cells.append(short_time(one.timings[i].median) + speed)
            rows.append(("time" if size is None else f"time, batch {size}", cells))
        return rows

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every figure as a share of the first model's; time as well, if it was measured.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        names = list(self.costs)
        groups = [
            (label, [(0.0, self.share(name, field)) for name in names], [f"{self.share(name, field):.0%}" for name in names])
            for label, field, _ in self._labels()
        ]
        if self.latency is not None:
            for size in self.latency.batch_sizes:
                label = "time" if size is None else f"time,\nbatch {size}"
                speeds = [self.latency.speed(name, size) for name in names]
                groups.append((label, [speed.bar for speed in speeds], [speed.share for speed in speeds]))
        axes = new_axes(max(6.0, 1.3 * len(groups)), 4.0) if ax is None else ax
        width, colors = 0.84 / len(self.costs), model_colors(self.costs)
        for i, name in enumerate(self.costs):
            places = np.arange(len(groups)) + (i - (len(self.costs) - 1) / 2) * width
            starts, heights = zip(*(bars[i] for _, bars, _ in groups), strict=True)
            axes.bar(places, heights, width * 0.92, bottom=starts, color=colors[name], label=name)
            said = [words[i] for _, _, words in groups]
            for place, bottom, height, words in zip(places, starts, heights, said, strict=True) if i else ():
                write_above(axes, words.replace(" to ", "\nto "), place, bottom + height)
        axes.set_xticks(range(len(groups)), [label.replace(" of ", "\nof ") for label, *_ in groups])
        axes.yaxis.set_major_formatter(as_percent)
        axes.set_ylim(0, 1.12 * max(sum(bar) for _, bars, _ in groups for bar in bars))
        axes.set_ylabel(f"share of {self.first}")
        dress(axes, f"{', '.join(self.costs)}: less is better", grid="y")
        legend_above(axes)
        return axes


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    scores: Mapping[str, Callable[[nn.Module], float]] | None = None,
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
        scores: Name -> a function of a model, such as its accuracy on data of yours. Each model is in eval mode for it.
        latency: True to measure time, which takes `min_run_time` for each model and batch size.
        batch_sizes: As for `analyze.latency.latency`.
        threads: As there.
        channels_last: As there.
        min_run_time: Seconds for each model and batch size.

    Raises:
        TypeError: A model is no module, or a score is no function or returns no number.
        ValueError: There is no model, a number is out of range, or a model does not run on these inputs.
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models must be a dict of at least one name and model, got {models!r}")
    costs = {name: _cost(name, model, example_inputs) for name, model in models.items()}
    scored = {label: {n: _score(label, score, model) for n, model in models.items()} for label, score in (scores or {}).items()}
    if not latency:
        return Comparison(costs, scores=scored)
    options = {"threads": threads, "channels_last": channels_last, "min_run_time": min_run_time}
    measured = compare_latency(models, example_inputs, batch_sizes=batch_sizes, **options)  # type: ignore[arg-type]
    return Comparison(costs, measured, scored)


def _cost(name: str, model: nn.Module, example_inputs: Any) -> Cost:
    try:
        return cost(model, example_inputs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for models[{name!r}]") from error


def _score(label: str, score: Callable[[nn.Module], float], model: nn.Module) -> float:
    if not callable(score):
        raise TypeError(f"scores must be functions of a model, got {score!r} for {label!r}")
    with undisturbed(model), evaluating(model):
        value = score(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scores must return a number, got {value!r} ({type(value).__name__}) of {label!r}") from error
