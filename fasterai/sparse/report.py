"""The sparsity that a sparsifier reached, as data, table and picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fasterai.display import SERIES, Brief, Shown, Table, as_percent, counted, dress, legend_above, new_axes, styled, units_word

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Reached", "Row", "SparsityReport"]


@dataclass(frozen=True, repr=False)
class Reached(Shown, Mapping[str, float]):
    """The sparsity that the masks hold, counted in units: a mapping of target names, with the whole beside it.

    Attributes:
        overall: Pruned units over all units, in [0, 1]. `float(reached)` is the same.
        weights: Pruned weights over all weights of the targets; another number where units differ in size.
        per_target: Target name -> pruned units over its units.
    """

    overall: float
    weights: float
    per_target: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        if name not in self.per_target:
            raise KeyError(f"{name!r} is no target; the targets are {', '.join(self.per_target)}")
        return self.per_target[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.per_target)

    def __len__(self) -> int:
        return len(self.per_target)

    def __float__(self) -> float:
        return self.overall

    def __format__(self, spec: str) -> str:
        return format(self.overall, spec)

    def _line(self) -> str:
        of = f"units of {counted(len(self), 'target')}"
        return f"<Reached: {self.overall:.2%} of the {of}, {self.weights:.2%} of their weights>"

    def _parts(self) -> Iterator[Table | str]:
        body = [(name, f"{share:.2%}") for name, share in self.per_target.items()]
        yield Table(("target", "sparsity"), [*body, ("all targets", f"{self.overall:.2%}")], foot=1)
        yield f"{self.weights:.2%} of the targets' weights"


@dataclass(frozen=True, repr=False)
class Row(Brief):
    """One target.

    Attributes:
        name: Its name.
        shape: The parameter's shape.
        units: The number of its units at the granularity.
        pruned: The number of units that the masks prune.
        weights: The number of its weights.
        zeros: The number of weights that are zero now.
        masked: The number of weights that the masks set to zero.
        disobeying: The number of masked weights that are not zero now.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    pruned: int
    weights: int
    zeros: int
    masked: int = 0
    disobeying: int = 0

    @property
    def sparsity(self) -> float:
        """The share of its units that is pruned, in [0, 1]."""
        return self.pruned / self.units if self.units else 0.0


@dataclass(frozen=True, repr=False)
class SparsityReport(Shown):
    """The sparsity that the masks hold, target by target; `print` shows it as a table.

    Attributes:
        granularity: The granularity, which says what a unit is.
        rows: The targets.
        left_out: Parameter name -> why it is no target.
        parameters: The number of the model's parameters.
        zeros: The number of parameters that are zero.
        together: All targets as one; coupled channels cross in the weights between them, which then count once.
    """

    granularity: str
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    parameters: int
    zeros: int
    together: Row

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self) | {"left_out": dict(self.left_out)}

    def _line(self) -> str:
        whole, units = self.together, units_word(self.granularity)
        of = f"{whole.pruned:,} of {whole.units:,} {units} of {counted(len(self.rows), 'target')}"
        return f"<SparsityReport: {whole.sparsity:.2%} pruned, {of}>"

    def _parts(self) -> Iterator[Table | str]:
        header = ("target", "shape", units_word(self.granularity), "pruned", "sparsity", "zeros")
        body = [
            (r.name, "x".join(map(str, r.shape)), f"{r.units:,}", f"{r.pruned:,}", f"{r.sparsity:.2%}", f"{r.zeros:,}")
            for r in self.rows
        ]
        whole = self.together
        body.append(("all targets", "", f"{whole.units:,}", f"{whole.pruned:,}", f"{whole.sparsity:.2%}", f"{whole.zeros:,}"))
        share = f"{self.zeros / self.parameters if self.parameters else 0.0:.2%}"
        body.append(("whole model", "", f"{self.parameters:,} weights", "", share, f"{self.zeros:,}"))
        yield Table(header, body, left=2, foot=2)
        if sum(row.zeros for row in self.rows) > whole.zeros:
            yield "zeros: a weight that two groups of channels share stands in the rows of both, and counts once in the whole"
        yield from (f"left out: {name} ({why})" for name, why in self.left_out.items())
        if whole.disobeying:
            yield (
                f"{whole.disobeying:,} of {whole.masked:,} masked weights are not zero: others were loaded, or they trained "
                "without the masks being held; the sparsity above is that of the masks, not of the model."
            )
        start = "Masked weights are zero; a" if whole.masked and not whole.disobeying else "A"
        yield f"{start} mask alone makes a network neither smaller nor faster."

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the sparsity of each target, with the whole as a line.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(7.0, max(2.0, 0.25 * len(self.rows) + 1)) if ax is None else ax
        axes.barh([r.name for r in self.rows], [r.sparsity for r in self.rows], color=SERIES[3])
        overall = self.together.sparsity
        axes.axvline(overall, color=SERIES[2], linestyle="--", label=f"all targets: {overall:.1%}")
        axes.set(xlim=(0, 1), xlabel=f"sparsity (share of {units_word(self.granularity)} pruned)")
        axes.xaxis.set_major_formatter(as_percent)
        axes.invert_yaxis()
        dress(axes, "Sparsity of each target", grid="x")
        legend_above(axes)
        return axes
