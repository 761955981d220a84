"""Comparison of several models layer by layer: cost and time of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fasterai.analyze.cost import LayerCost
from fasterai.analyze.layer_times import LayerTiming
from fasterai.display import (
    SMALL,
    Brief,
    Shown,
    Table,
    counted,
    dress,
    model_colors,
    new_axes,
    of_batch,
    short,
    short_bytes,
    short_time,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerComparison", "LayerRow"]

MOST_LAYERS = 40
#: Label, field of `LayerCost`, how it is written in the table, and in the picture.
FIGURES: tuple[tuple[str, str, Callable[[float], str], Callable[[float], str]], ...] = (
    ("parameters", "parameters", "{:,}".format, short),
    ("non-zero", "nonzero", "{:,}".format, short),
    ("MACs", "macs", "{:,}".format, short),
    ("file", "file_bytes", short_bytes, short_bytes),
    ("activations", "activation_bytes", short_bytes, short_bytes),
)


@dataclass(frozen=True, repr=False)
class LayerRow(Brief):
    """Figures of one layer in all models.

    Attributes:
        name: Its name; empty for the model itself.
        costs: Model name -> its cost there, None where the model has no such layer.
        timings: Model name -> for each batch size the time of it, None where it was not measured.
    """

    name: str
    costs: Mapping[str, LayerCost | None]
    timings: Mapping[str, tuple[LayerTiming | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class LayerComparison(Shown):
    """Costs and times of several models, layer by layer; `print` shows a table, `plot` draws it.

    Times are of passes apart from those of the whole model, with some microseconds for each layer in them: they show where the
    time goes, and need not add up to the whole.

    Attributes:
        names: The models.
        rows: The layers, in the order of the first model that has them.
        batch_sizes: Timed batch sizes, as for `LatencyComparison`; empty if nothing was.
        batch_size: The number of samples that MACs and activations are of; None if the inputs had none.
        note: A sentence on the figures, shown below the table.
    """

    names: tuple[str, ...]
    rows: tuple[LayerRow, ...]
    batch_sizes: tuple[int | None, ...] = ()
    batch_size: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        costs = {row.name: {n: None if c is None else asdict(c) for n, c in row.costs.items()} for row in self.rows}
        timings = {
            row.name: {n: [None if t is None else asdict(t) for t in ts] for n, ts in row.timings.items()} for row in self.rows
        }
        return {"names": list(self.names), "layers": costs, "batch_sizes": list(self.batch_sizes), "timings": timings} | {
            "batch_size": self.batch_size
        }

    def _line(self) -> str:
        return f"<LayerComparison of {', '.join(self.names)}: {counted(len(self.rows), 'layer')}>"

    def _parts(self) -> Iterator[Table | str]:
        times = ["time" + _at(size) for size in self.batch_sizes]
        header = ("layer", "model", "output", *(label for label, *_ in FIGURES), *times)
        body = []
        for row in self.rows:
            for i, name in enumerate(self.names):
                cost = row.costs[name]
                shape = "" if cost is None or cost.output_shape is None else "x".join(map(str, cost.output_shape))
                figures = ("" if cost is None else write(getattr(cost, key)) for _, key, write, _ in FIGURES)
                seconds = ("" if t is None else short_time(t.median) for t in row.timings.get(name, ()))
                body.append((("" if i else row.name or "(model)"), name, shape, *figures, *seconds))
        yield Table(header, body, left=3)
        if self.batch_size is not None:
            yield f"MACs and activations{of_batch(self.batch_size)}"
        if self.note:
            yield self.note

    @styled()
    def plot(self) -> Figure:
        """Draw MACs, file size, activations and, at the first batch size, time of each layer; of many layers the costliest."""
        panels = [
            (label + (of_batch(self.batch_size) if key == "macs" else ""), write, self._values(key))
            for label, key, _, write in FIGURES[2:]
        ]
        if self.batch_sizes:
            panels.append(("time" + _at(self.batch_sizes[0]), short_time, self._times()))
        shares = np.max([values.max(axis=1) / max(values.sum(), 1e-300) for _, _, values in panels], axis=0, initial=0.0)
        shown = np.sort(np.argsort(-shares, kind="stable")[:MOST_LAYERS])
        axes = new_axes(2.0 + 2.6 * len(panels), 1.6 + (0.16 + 0.12 * len(self.names)) * len(shown), len(panels))
        width, colors = 0.84 / len(self.names), model_colors(self.names)
        for ax, (label, write, values) in zip(axes, panels, strict=True):
            for i, name in enumerate(self.names):
                places = np.arange(len(shown)) + (i - (len(self.names) - 1) / 2) * width
                ax.barh(places, values[shown, i], height=width * 0.92, color=colors[name], label=name)
            most = float(values.max(initial=1e-300))
            ax.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, 1.2 * most))
            ax.set_yticks([])
            ax.locator_params(axis="x", nbins=3)
            if write is short_bytes:  # powers of two are round
                step = 2.0 ** np.floor(np.log2(most / 2))
                ax.set_xticks(np.arange(0.0, most, step))
            ax.xaxis.set_major_formatter(lambda value, _, write=write: write(value))
            dress(ax, label, grid="x")
        axes[0].set_yticks(range(len(shown)), [self.rows[i].name or "(model)" for i in shown], fontsize=SMALL)
        figure: Figure = axes[0].figure
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(self.names))
        return figure

    def _values(self, key: str) -> np.ndarray[Any, Any]:
        """Return a figure of the costs as an array (layers, models); 0 where a model lacks the layer."""
        costs = [[row.costs[name] for name in self.names] for row in self.rows]
        return self._array([[0.0 if c is None else float(getattr(c, key)) for c in cs] for cs in costs])

    def _times(self) -> np.ndarray[Any, Any]:
        """Return the seconds at the first batch size as an array (layers, models)."""
        timings = [[row.timings[name][0] for name in self.names] for row in self.rows]
        return self._array([[0.0 if t is None else t.median for t in ts] for ts in timings])

    def _array(self, values: list[list[float]]) -> np.ndarray[Any, Any]:
        return np.array(values).reshape(len(self.rows), len(self.names))


def _at(batch_size: int | None) -> str:
    return "" if batch_size is None else f", batch {batch_size}"
