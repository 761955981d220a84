"""Functions and classes of the public fasterai, in terms of this library's catalogues.

Over 300 lines, since it is a list: each call by its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import criteria, granularities
from fasterai.core.checks import check_choice, from_catalogue
from fasterai.core.criteria import NORMALIZERS, Criterion
from fasterai.core.granularities import Named, allowed
from fasterai.core.types import Evidence, Layout
from fasterai.model.layouts import read_module, register_axes

__all__ = [
    "EPS",
    "Criteria",
    "Granularities",
    "Normalizer",
    "Reducer",
    "activation_criteria",
    "available_criterias",
    "available_schedules",
    "criterias",
    "grad_crit",
    "init_based_criteria",
    "magnitude_criteria",
    "unit_scores",
    "update_based_criteria",
]

EPS: float = torch.finfo(torch.float32).eps
criterias = tuple(criteria.__all__)
grad_crit = criteria.taylor

DATA_FNS = {"l2_norm": "activation", "max": "activation_max", "mean": "activation_mean"}

Transform = Callable[[Tensor], Tensor]
Combine = Callable[[Tensor, Tensor], Tensor]


def available_criterias() -> list[str]:
    """List the names of all criteria."""
    return list(criterias)


def available_schedules() -> list[str]:
    """List the names of all schedules."""
    from fasterai.core import schedules

    return list(schedules.__all__)


def _dims(dim: int | Sequence[int]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else tuple(dim)


class Reducer:
    """Reducers as functions of scores and dimensions."""

    @staticmethod
    def mean(scores: Tensor, dim: int | Sequence[int]) -> Tensor:
        """Return the mean over dimensions, which stay with size 1."""
        return scores.mean(_dims(dim), keepdim=True)

    @staticmethod
    def sum(scores: Tensor, dim: int | Sequence[int]) -> Tensor:
        """Return the sum over dimensions, which stay with size 1."""
        return scores.sum(_dims(dim), keepdim=True)


def _stretched(scores: Tensor) -> Tensor:
    """Scale scores to [0, 1] by their extremes; equal scores become 0."""
    low, high = scores.min(), scores.max()
    return torch.zeros_like(scores) if low == high else (scores - low) / (high - low)


def _standardised(scores: Tensor) -> Tensor:
    """Shift and scale scores to mean 0 and deviation 1 of the sample, which divides by n - 1; equal scores become 0."""
    if scores.numel() < 2 or scores.min() == scores.max():
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / scores.std()


class Normalizer:
    """Normalisers as functions of a target's unit scores, as the public fasterai means their names.

    `standardization` brings scores to [0, 1], and `gaussian` to mean 0 and deviation 1. A `Criterion`'s own names mean
    others: its `standardise` is of mean 0, and its `gaussian` the normal distribution function of that.
    """

    sum = staticmethod(NORMALIZERS["sum"])
    mean = staticmethod(NORMALIZERS["mean"])
    max = staticmethod(NORMALIZERS["max"])
    standardization = staticmethod(_stretched)
    gaussian = staticmethod(_standardised)


@dataclass(frozen=True)
class _Combined:
    """Score `f(weight)`, or `f(other)`, or `output_fn(f(weight), f(other))`; `f` gets copies."""

    f: Transform
    other: str | None = None
    output_fn: Combine | None = None
    return_other: bool = False

    @property
    def function(self) -> Transform:
        """The function of the weight, whose name messages have."""
        return self.f

    def __call__(self, e: Evidence) -> Tensor:
        if self.other is None:
            return self.f(e.weight.clone())
        other = self.f(getattr(e, self.other).clone())
        if self.return_other or self.output_fn is None:
            return other
        return self.output_fn(self.f(e.weight.clone()), other)


@dataclass(frozen=True)
class _Activated:
    """Score `f(weight)` times a statistic of the weight's input feature."""

    f: Transform
    statistic: str

    @property
    def function(self) -> Transform:
        """The function of the weight, whose name messages have."""
        return self.f

    def __call__(self, e: Evidence) -> Tensor:
        statistic: Tensor = getattr(e, self.statistic)
        return self.f(e.weight.clone()) * statistic


def Criteria(  # noqa: N802 - the familiar name
    f: Transform,
    reducer: Any = Reducer.mean,
    normalizer: Any = None,
    needs_init: bool = False,
    needs_update: bool = False,
    output_fn: Combine | None = None,
    return_init: bool = False,
    scale: None = None,
    needs_data: bool = False,
    data_fn: str = "l2_norm",
) -> Criterion:
    """Make a criterion from a function of the weight; `f` gets copies, so it may write into them.

    Args:
        f: Applied to the weight, and to the other weight where there is one.
        reducer: `Reducer.mean`, `Reducer.sum`, or their names.
        normalizer: A function of `Normalizer`, or its name.
        needs_init: The other weight is that of when the sparsifier was made.
        needs_update: The other weight is that of when the masks last moved.
        output_fn: Function that combines `f(weight)` and `f(other)`.
        return_init: The score is `f(other)` alone.
        scale: Must be left out: scores are compared as they are.
        needs_data: Multiply by a statistic of the input features.
        data_fn: The statistic over batch and positions: `l2_norm`, or the `max` or `mean` of the magnitude.

    Raises:
        ValueError: Both other weights are asked for, a name is unknown, or `scale` is given.
    """
    if needs_init and needs_update:
        raise ValueError("needs_init and needs_update must not both be True: there is one other weight")
    if scale is not None:
        raise ValueError(f"scale must be None, got {scale!r}: scores are compared as they are; pass normalizer=")
    names = {Reducer.mean: "mean", Reducer.sum: "sum"}
    reducer_name = check_choice("reducer", names.get(reducer, reducer), ("mean", "sum"))
    functions: dict[Any, str] = {NORMALIZERS[name]: name for name in ("sum", "mean", "max")}
    named = {"standardization": Normalizer.standardization, "gaussian": Normalizer.gaussian}
    given: Any = named.get(normalizer, normalizer) if isinstance(normalizer, str) else normalizer
    normalizer_name = functions.get(given, given)
    if needs_data:
        statistic = DATA_FNS[check_choice("data_fn", data_fn, DATA_FNS)]
        return Criterion(_Activated(f, statistic), frozenset({statistic}), reducer_name, normalizer_name)
    other = "initial" if needs_init else "previous" if needs_update else None
    function = _Combined(f, other, output_fn, return_init)
    return Criterion(function, frozenset({other} if other else ()), reducer_name, normalizer_name)


def unit_scores(m: nn.Module, criterion: Criterion, g: str, squeeze: bool = False) -> Tensor:
    """Return the unit scores of a module's weight, by a criterion of the weight alone; reduced dimensions have size 1.

    Args:
        m: A module whose weight is known.
        criterion: A criterion of the weight alone.
        g: The name of a granularity that the weight has.
        squeeze: Leave the dimensions of size 1 out.

    Raises:
        ValueError: The weight is not known, has no such units, or the criterion needs more than the weight.
    """
    layout = Granularities._read(m)
    granularity: Named = from_catalogue("g", check_choice("g", g, allowed(layout)), granularities)
    if criterion.needs:
        needs = ", ".join([*criterion.evidence_names, *criterion.gatherers])
        raise ValueError(f"criterion must read nothing but the weight, got one that needs {needs}")
    weight: Tensor = m._parameters["weight"].detach()  # type: ignore[union-attr]
    scores = criterion.normalize(granularity.reduce(criterion(Evidence("weight", weight)), layout, criterion.reducer))
    return scores.squeeze() if squeeze else scores


def magnitude_criteria(transform_fn: Transform, **kwargs: Any) -> Criterion:
    """Make a criterion of the weight alone."""
    return Criteria(transform_fn, **kwargs)


def init_based_criteria(
    transform_fn: Transform, output_fn: Combine | None = None, return_init: bool = False, **kwargs: Any
) -> Criterion:
    """Make a criterion of the weight and of its value at the time the sparsifier was made."""
    return Criteria(transform_fn, needs_init=True, output_fn=output_fn, return_init=return_init, **kwargs)


def update_based_criteria(transform_fn: Transform, output_fn: Combine | None = None, **kwargs: Any) -> Criterion:
    """Make a criterion of the weight and of its value at the last update of the masks."""
    return Criteria(transform_fn, needs_update=True, output_fn=output_fn, **kwargs)


def activation_criteria(transform_fn: Transform, data_fn: str = "l2_norm", **kwargs: Any) -> Criterion:
    """Make a criterion of the weight times the norm of its input feature."""
    return Criteria(transform_fn, needs_data=True, data_fn=data_fn, **kwargs)


def _axes_table(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return granularity name -> the axes that it keeps apart, in the order of the parameter's dimensions."""
    order = [next(iter(names)) for names in layout.axes]
    return {name: tuple(a for a in order if a in getattr(granularities, name).kept(layout)) for name in allowed(layout)}


def _layout(*axes: str) -> Layout:
    return Layout((2,) * len(axes), tuple(frozenset({a}) for a in axes))


class Granularities:
    """Known granularities, looked up by module as in the public fasterai; `register_axes` is the simpler call."""

    _granularities_Linear: Mapping[str, tuple[str, ...]] = _axes_table(_layout("out", "in"))
    _granularities_Conv2d: Mapping[str, tuple[str, ...]] = _axes_table(_layout("out", "in", "height", "width"))
    _granularities_ConvT2d: Mapping[str, tuple[str, ...]] = _axes_table(_layout("in", "out", "height", "width"))

    @staticmethod
    def get_dim(m: nn.Module, g: str) -> list[int]:
        """Return the dimensions of `weight[None]` that a granularity reduces; `[0]` if it reduces none.

        Raises:
            ValueError: The module's weight is not known, or has no such units.
        """
        layout = Granularities._read(m)
        granularity: Named = from_catalogue("g", check_choice("g", g, allowed(layout)), granularities)
        kept = granularity.kept(layout)
        return [i + 1 for i, names in enumerate(layout.axes) if not names & kept] or [0]

    @staticmethod
    def add_granularity(m_type: type[nn.Module], g: Mapping[str, Any]) -> None:
        """Register a module class whose weight is read as one of the tables of this class.

        A table names a weight's dimensions in PyTorch's order, `(out, in)` for Linear's. Hugging Face's `Conv1D` holds
        `(in, out)`: call `register_axes(Conv1D, weight=("in", "out"))` for it, so that its rows are its outputs.

        Raises:
            ValueError: `g` is no table of this class.
        """
        tables: dict[int, tuple[str, ...]] = {
            id(Granularities._granularities_Linear): ("out", "in"),
            id(Granularities._granularities_Conv2d): ("out", "in", "height", "width"),
            id(Granularities._granularities_ConvT2d): ("in", "out", "height", "width"),
        }
        if id(g) not in tables:
            raise ValueError(
                "g must be one of the tables of Granularities; for other axes call register_axes(m_type, weight=(...))"
            )
        axes = tables[id(g)]
        register_axes(m_type, kind="convolution" if len(axes) > 2 else "linear", weight=axes)

    @staticmethod
    def allowed_granularities(m: nn.Module) -> list[str]:
        """List the names of the granularities that a module's weight has."""
        return allowed(Granularities._read(m))

    @staticmethod
    def available_granularities() -> list[str]:
        """List the names of all granularities."""
        return list(granularities.__all__)

    @staticmethod
    def available_modules() -> tuple[type[nn.Module], ...]:
        """List the module classes that are known."""
        plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return tuple(dict.fromkeys([*(t for t in read_module.registry if t is not object), *plain]))

    @staticmethod
    def _read(m: nn.Module) -> Layout:
        reading = read_module(m)
        if reading is None or "weight" not in reading.layouts:
            raise ValueError(f"m must be a module whose weight is known, got {type(m).__name__}; register_axes makes it known")
        return reading.layouts["weight"]
