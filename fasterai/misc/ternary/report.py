"""Report of ternary groups: what each layer loses, and what it saves in multiplications and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasterai.analyze.cost import Cost
from fasterai.core.types import Target
from fasterai.display import (
    QUIET,
    SERIES,
    SMALL,
    Brief,
    Shown,
    Table,
    as_percent,
    dress,
    new_axes,
    of_batch,
    short,
    short_bytes,
    styled,
)
from fasterai.misc.ternary.groups import Division, Group
from fasterai.misc.ternary.packing import packed_bytes, scales_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TernaryLayer", "TernaryReport", "macs_of", "measure_layer"]

#: Bars of a picture at most: the layers with the largest errors.
MOST_BARS = 40


@dataclass(frozen=True, repr=False)
class TernaryLayer(Brief):
    """A weight in ternary groups.

    Attributes:
        error: Distance to the weight that was there, as a share of that weight's norm.
        zeros: Share of the weights that are zero.
        weights: Number of weights.
        groups: Number of groups, each with a scale.
        dense_bytes: Bytes of the weight.
        packed_bytes: Bytes of two bits for each weight, and the scales.
        macs: Multiply-accumulates with this weight; None where they are not counted.
    """

    error: float
    zeros: float
    weights: int
    groups: int
    dense_bytes: int
    packed_bytes: int
    macs: int | None = None

    @property
    def multiplications(self) -> int | None:
        """Multiplications with this weight: one for each group and output, after its inputs are added up."""
        return None if self.macs is None else round(self.macs * self.groups / self.weights)


@dataclass(frozen=True, repr=False)
class TernaryReport(Shown):
    """Report of a model with ternary groups: `print` shows a table, `plot` a picture.

    Attributes:
        group: Weights of a group.
        rule: How their ternary values were chosen.
        layers: Parameter name -> what became of it.
        left: Name of each other weight -> why it stays.
        macs: Multiply-accumulates of the whole model; None without example inputs.
        batch_size: Number of samples that they are of.
    """

    group: Group
    rule: str
    layers: Mapping[str, TernaryLayer] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    macs: int | None = None
    batch_size: int | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the ternary weights as they were."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    @property
    def packed_bytes(self) -> int:
        """Bytes of the ternary weights, packed."""
        return sum(layer.packed_bytes for layer in self.layers.values())

    @property
    def multiplications(self) -> int | None:
        """Multiplications of the whole model that are left; None without example inputs."""
        if self.macs is None:
            return None
        return self.macs - sum((one.macs or 0) - (one.multiplications or 0) for one in self.layers.values())

    def _head(self) -> str:
        total = len(self.layers) + len(self.left)
        head = f"{len(self.layers)} of {total} weights in ternary groups ({self.group}, {self.rule}), "
        head += f"{short_bytes(self.dense_bytes)} -> {short_bytes(self.packed_bytes)}"
        if self.macs is None or self.multiplications is None:
            return head
        return f"{head}, {short(self.multiplications)} of {short(self.macs)} multiplications left{of_batch(self.batch_size)}"

    def _line(self) -> str:
        return f"<TernaryReport: {self._head()}>"

    def _parts(self) -> Iterator[Table | str]:
        yield self._head()
        if self.layers:
            header = ("weight", "error", "zeros", "weights", "groups", "MACs", "multiplications", "dense", "packed")
            yield Table(header, [*((name, *_figures(layer)) for name, layer in self.layers.items()), self._whole()], foot=1)
        if self.left:
            yield ""
            yield Table(("weight", "why it stays"), list(self.left.items()), left=2)

    def _whole(self) -> tuple[str, ...]:
        """Return the table's last row: the sums over the ternary weights."""
        layers = self.layers.values()
        weights, groups = sum(one.weights for one in layers), sum(one.groups for one in layers)
        zeros = sum(one.zeros * one.weights for one in layers) / weights
        counted = [(one.macs, one.multiplications) for one in layers if one.macs is not None]
        sums = [short(sum(column)) for column in zip(*counted, strict=True)] if counted else ["-", "-"]  # type: ignore[arg-type]
        sizes = (short_bytes(self.dense_bytes), short_bytes(self.packed_bytes))
        return ("all of these", "", f"{zeros:.1%}", short(weights), short(groups), *sums, *sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the error and the share of zeros of each layer; at most the 40 layers with the largest errors.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        largest = sorted(self.layers, key=lambda name: -self.layers[name].error)[:MOST_BARS]
        shown = [name for name in self.layers if name in largest]
        axes = new_axes(8.0, 1.6 + 0.32 * len(shown)) if ax is None else ax
        for place, name in enumerate(shown):
            layer = self.layers[name]
            axes.barh(place, layer.error, height=0.6, color=SERIES[2])
            text = f"  {layer.error:.1%}; {layer.zeros:.0%} zeros, {short_bytes(layer.packed_bytes)}"
            axes.text(layer.error, place, text, va="center", color=QUIET, fontsize=SMALL)
        axes.set_yticks(range(len(shown)), shown)
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="distance to the dense weight, as a share of its norm")
        axes.set_xlim(0, 1.5 * max([0.01, *(self.layers[name].error for name in shown)]))
        axes.xaxis.set_major_formatter(as_percent)
        dress(axes, f"Ternary groups ({self.group}, {self.rule})", grid="x", below=self._head())
        return axes


def _figures(layer: TernaryLayer) -> tuple[str, ...]:
    counted = ("-", "-") if layer.macs is None else (short(layer.macs), short(layer.multiplications or 0))
    sizes = (
        short(layer.weights),
        short(layer.groups),
        *counted,
        short_bytes(layer.dense_bytes),
        short_bytes(layer.packed_bytes),
    )
    return (f"{layer.error:.1%}", f"{layer.zeros:.1%}", *sizes)


@torch.no_grad()
def measure_layer(before: Tensor, ternary: Tensor, division: Division, macs: int | None) -> TernaryLayer:
    """Measure what became of a weight.

    Args:
        before: The weight as it was.
        ternary: Its ternary values.
        division: Its groups.
        macs: Multiply-accumulates with it, where counted.
    """
    count = ternary.numel()
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    size = float(torch.linalg.vector_norm(before, dtype=wide))
    distance = float(torch.linalg.vector_norm(before.to(wide) - ternary.to(wide)))
    return TernaryLayer(
        error=distance / size if size else 0.0,
        zeros=1 - int(torch.count_nonzero(ternary)) / count,
        weights=count,
        groups=division.groups,
        dense_bytes=count * ternary.element_size(),
        packed_bytes=packed_bytes(count, division.groups, scales_of(ternary, division).dtype),
        macs=macs,
    )


def macs_of(costs: Cost, targets: tuple[Target, ...]) -> dict[str, int]:
    """Return target -> the multiply-accumulates with it, where its module multiplies with nothing else.

    A recurrent module's are shared out by the sizes of its matrices; those of attention also multiply queries by keys, and are
    not counted.
    """
    by_module = {layer.name: layer.macs for layer in costs.layers}
    found = {}
    for target in targets:
        matrices = [p for p in target.module._parameters.values() if p is not None and p.dim() > 1]
        if target.kind != "attention" and by_module.get(target.module_name):
            share = target.parameter.numel() / sum(p.numel() for p in matrices)
            found[target.name] = round(by_module[target.module_name] * share)
    return found
