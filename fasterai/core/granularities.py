"""The catalogue of granularities: ways to group the weights of a target into units, which are kept or removed as a whole.

A granularity names the axes that get decisions of their own; all weights along the other axes share one. It is a pair of
inverse views: `reduce` (a target's scores -> scores of its units) and `expand` (a decision per unit -> the target's mask).
Over 300 lines, since a catalogue is one file: four classes of small methods, and a value for each name.
To add one: a frozen value below, its name in `__all__`, a row in `tests/core/test_granularities.py` and a line in
`docs/granularities.md`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.checks import check_choice, check_count
from fasterai.core.scores import Scores, TensorScores
from fasterai.core.sums import sum_parts
from fasterai.core.types import Layout

__all__ = [
    "channel",
    "column",
    "coupled",
    "filter",
    "horizontal_slice",
    "kernel",
    "layer",
    "row",
    "shared_channel",
    "shared_column",
    "shared_horizontal_slice",
    "shared_kernel",
    "shared_row",
    "shared_vertical_slice",
    "shared_weight",
    "vertical_slice",
    "weight",
]

AXES = ("expert", "out", "in", "depth", "height", "width")


class Granularity(ABC):
    """A way to group the weights of a target into units; the weights of a unit share one decision."""

    @abstractmethod
    def fits(self, layout: Layout) -> bool:
        """Tell if a parameter of this layout has such units."""

    @abstractmethod
    def unit_shape(self, layout: Layout) -> tuple[int, ...]:
        """Return the shape of the units' scores: as many dimensions as the layout's view, size 1 where a decision is shared.

        Filters of a convolution weight `(8, 3, 5, 5)` have the unit shape `(8, 1, 1, 1)`.
        """

    @abstractmethod
    def reduce(self, scores: Tensor, layout: Layout, reducer: str = "mean") -> Tensor:
        """Combine the scores of each unit's weights into one.

        Args:
            scores: One score per weight, in any shape with the parameter's number of elements.
            layout: The layout of the parameter.
            reducer: `mean` or `sum` over the weights of a unit.

        Returns:
            Scores of shape `unit_shape(layout)`.
        """

    def reduce_parts(self, scores: Scores, layout: Layout, reducer: str = "mean") -> Tensor:
        """Return the same as `reduce`, from scores in the layout's view that are computed part by part as they are read."""
        return self.reduce(scores.tensor(), layout, reducer)

    @abstractmethod
    def expand(self, keep: Tensor, layout: Layout) -> Tensor:
        """Return a mask that broadcasts against `parameter.view(layout.shape)`.

        Args:
            keep: One decision per unit, shape `unit_shape(layout)`.
            layout: The layout of the parameter.
        """

    def drops_outputs(self, layout: Layout) -> bool:
        """Tell if a pruned unit makes whole outputs of the layer zero."""
        return False

    def is_whole(self, layout: Layout) -> bool:
        """Tell if the whole target is one unit by definition."""
        return False

    @property
    def is_weight(self) -> bool:
        """True if every weight is a unit of its own."""
        return False

    @property
    def is_coarse(self) -> bool:
        """True if units are so large that by default only the main layers are pruned."""
        return not self.is_weight

    @property
    def shares_weights(self) -> bool:
        """True if a weight may belong to two units, as one between two groups of coupled channels does."""
        return False


@dataclass(frozen=True)
class Keep(Granularity):
    """One unit for every combination of indices of the named axes.

    `Keep("out")` makes each output of any layer a unit; a convolution weight `(8, 3, 5, 5)` has 8 units of 75 weights.

    Attributes:
        axes: Some of `expert`, `out`, `in`, `depth`, `height`, `width`, at least one.

    Raises:
        ValueError: No axis is given, which would make each parameter one unit (`layer`), or an unknown one.
    """

    axes: frozenset[str]

    def __init__(self, *axes: str) -> None:
        if not axes:
            raise ValueError(
                f"axes must be at least one of {', '.join(AXES)}, got none; granularity='layer' takes whole parameters"
            )
        self._set(axes)

    def _set(self, axes: Iterable[str]) -> None:
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"axes must be of {', '.join(AXES)}, got {axis!r}")
        object.__setattr__(self, "axes", frozenset(axes))

    def __repr__(self) -> str:
        return f"Keep({', '.join(repr(a) for a in AXES if a in self.axes)})"

    def fits(self, layout: Layout) -> bool:
        return self.axes <= layout.names

    def kept(self, layout: Layout) -> frozenset[str]:
        return self.axes

    def unit_shape(self, layout: Layout) -> tuple[int, ...]:
        kept = self.kept(layout)
        return tuple(n if names & kept else 1 for n, names in zip(layout.shape, layout.axes, strict=True))

    def _summed(self, layout: Layout) -> list[int]:
        """List the dimensions of the view along which weights share a decision."""
        kept = self.kept(layout)
        return [i for i, names in enumerate(layout.axes) if not names & kept]

    def reduce(self, scores: Tensor, layout: Layout, reducer: str = "mean") -> Tensor:
        dims = self._summed(layout)
        scores = scores.reshape(layout.shape)
        if not dims:
            return scores
        if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64) and not scores.requires_grad:
            return self.reduce_parts(TensorScores("", scores), layout, reducer)
        return scores.mean(dims, keepdim=True) if reducer == "mean" else scores.sum(dims, keepdim=True)

    def reduce_parts(self, scores: Scores, layout: Layout, reducer: str = "mean") -> Tensor:
        dims = self._summed(layout)
        if not dims:
            return scores.tensor()
        sums = sum_parts(scores, dims)
        return sums.div_(math.prod(layout.shape[d] for d in dims)) if reducer == "mean" else sums

    def expand(self, keep: Tensor, layout: Layout) -> Tensor:
        return keep

    def drops_outputs(self, layout: Layout) -> bool:
        # Only axes that the layout has count: `row` keeps `expert` too, which a matrix has not.
        return not self.is_weight and self.kept(layout) & layout.names <= {"out"}

    def is_whole(self, layout: Layout) -> bool:
        return not self.kept(layout) & layout.names


@dataclass(frozen=True, init=False, repr=False)
class Named(Keep):
    """A granularity under its name in the field.

    On a convolution it keeps the axes given first; on a matrix, which has no kernel axes, those given second. A depth axis
    (3-d convolutions) is kept with the other kernel axes; an expert axis is kept wherever outputs or inputs are.
    """

    name: str
    matrix: frozenset[str] | None

    def __init__(self, name: str, kernel: str, matrix: str | None = None) -> None:
        self._set(kernel.split())
        if self.axes & {"height", "width"}:
            object.__setattr__(self, "axes", self.axes | {"depth"})
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "matrix", None if matrix is None else frozenset(matrix.split()))

    def __repr__(self) -> str:
        return self.name

    def fits(self, layout: Layout) -> bool:
        if layout.has_kernel or self.is_weight:
            return True
        return self.matrix is not None and self.matrix <= layout.names

    def kept(self, layout: Layout) -> frozenset[str]:
        if layout.has_kernel:
            return self.axes
        assert self.matrix is not None
        return self.matrix | {"expert"} if self.matrix else self.matrix

    @property
    def is_weight(self) -> bool:
        return self.name == "weight"


@dataclass(frozen=True, init=False, repr=False)
class Coupled(Keep):
    """Channels that several parameters have to lose together: those of a residual sum, a depthwise convolution, heads.

    A `Sparsifier` finds these groups by following the model's operations (`fasterai.graph.channels`). For a parameter alone,
    as in this class, the channels are its outputs.

    Attributes:
        over: The operation that makes one score of those of a channel's slices, one slice for each weight that it runs through:
            `sum`, `mean` or `max`.
        relative: True to divide scores by the mean of their group, so that groups of few and many, small and large weights
            compare. If False, a context that lets groups compete removes nearly all channels of some groups.
    """

    over: str
    relative: bool

    def __init__(self, over: str = "sum", relative: bool = True) -> None:
        super().__init__("out")
        object.__setattr__(self, "over", check_choice("over", over, ("sum", "mean", "max")))
        object.__setattr__(self, "relative", relative)

    @property
    def is_coarse(self) -> bool:
        return False

    @property
    def shares_weights(self) -> bool:
        return True

    def __repr__(self) -> str:
        if self.relative:
            return "coupled" if self.over == "sum" else f"Coupled({self.over!r})"
        return f"Coupled({self.over!r}, relative=False)"


@dataclass(frozen=True)
class Block(Granularity):
    """Blocks of `rows` outputs by `columns` inputs, for each kernel position; at the edges they may be smaller.

    Attributes:
        rows: Neighbouring outputs in one block.
        columns: Neighbouring inputs in one block.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_count("rows", self.rows)
        check_count("columns", self.columns)

    @property
    def is_coarse(self) -> bool:
        return False

    def fits(self, layout: Layout) -> bool:
        return {"out", "in"} <= layout.names

    def _steps(self, layout: Layout) -> list[int]:
        """Return the size of a block along each dimension of the view; 1 along the groups of a grouped convolution."""
        sizes = {frozenset({"out"}): self.rows, frozenset({"in"}): self.columns}
        return [sizes.get(names, 1) for names in layout.axes]

    def unit_shape(self, layout: Layout) -> tuple[int, ...]:
        return tuple(-(-n // step) for n, step in zip(layout.shape, self._steps(layout), strict=True))

    def _pool(self, x: Tensor, layout: Layout) -> Tensor:
        """Sum a tensor in the layout's view over each block."""
        for dim, step in enumerate(self._steps(layout)):
            if step > 1:
                x = x.movedim(dim, -1)
                x = F.pad(x, (0, -x.shape[-1] % step))
                x = x.reshape(*x.shape[:-1], -1, step).sum(-1).movedim(-1, dim)
        return x

    def reduce(self, scores: Tensor, layout: Layout, reducer: str = "mean") -> Tensor:
        total = self._pool(scores.reshape(layout.shape), layout)
        if reducer == "sum":
            return total
        return total / self._pool(torch.ones(layout.shape, dtype=total.dtype, device=total.device), layout)

    def expand(self, keep: Tensor, layout: Layout) -> Tensor:
        for dim, (step, length) in enumerate(zip(self._steps(layout), layout.shape, strict=True)):
            if step > 1:
                keep = keep.repeat_interleave(step, dim).narrow(dim, 0, length)
        return keep


weight = Named("weight", "out in height width", "out in")
shared_weight = Named("shared_weight", "in height width")
channel = Named("channel", "out height width")
column = Named("column", "out in width", "in")
row = Named("row", "out in height", "out")
kernel = Named("kernel", "out in")
filter = Named("filter", "out")
shared_channel = Named("shared_channel", "height width")
shared_column = Named("shared_column", "in width")
shared_row = Named("shared_row", "in height")
vertical_slice = Named("vertical_slice", "out width")
horizontal_slice = Named("horizontal_slice", "out height")
shared_vertical_slice = Named("shared_vertical_slice", "width")
shared_horizontal_slice = Named("shared_horizontal_slice", "height")
shared_kernel = Named("shared_kernel", "in")
layer = Named("layer", "", "")
coupled = Coupled()


def allowed(layout: Layout) -> list[str]:
    """List the names of the granularities that fit a parameter of this layout."""
    return [name for name in __all__ if name != "coupled" and globals()[name].fits(layout)]
