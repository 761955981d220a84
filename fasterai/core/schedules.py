"""Catalogue of schedules: the share of the asked sparsity that is reached at each position of the training.

A schedule is a frozen value: `schedule(position) -> share`, both in [0, 1]. Same position, same answer; nothing to reset.
To add one: a function `(start, end, position) -> value`, a frozen class that calls it, a ready-made value, their names in
`__all__`, a row in `tests/core/test_schedules.py` and a line in `docs/schedules.md`.

Over 300 lines, since it is a catalogue: one class for each schedule.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fasterai.core.checks import NamesReplacements, check_count, check_fraction, instead_of_class, noted
from fasterai.display import SERIES, Brief, as_percent, dress, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["agp", "alternating", "cos", "dsd", "iterative", "lin", "one_cycle", "one_shot"]


class Schedule(NamesReplacements, ABC):
    """Interface of schedules; `Schedule(function, start_pct, end_pct, start_val, end_val)` makes a `Custom` one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Schedule:
        """Make a `Custom` schedule where the base class itself is called, as users of the public fasterai do."""
        return super().__new__(Custom if cls is Schedule else cls)

    @abstractmethod
    def __call__(self, position: float) -> float:
        """Return the share of the asked sparsity at a position of the training, both in [0, 1].

        Raises:
            ValueError: `position` is not in [0, 1].
        """

    @styled()
    def plot(self, target: float = 1.0, num_points: int = 1000, ax: Axes | None = None) -> Axes:
        """Draw the sparsity over the training.

        Args:
            target: The sparsity asked for, in [0, 1].
            num_points: Number of positions to draw.
            ax: Axes to draw on, titled only if they have no title and no other line; a new figure if it is left out.
        """
        check_fraction("target", target)
        check_count("num_points", num_points, 2)
        axes = new_axes(5.0, 3.0) if ax is None else ax
        title = (
            "" if axes.lines or axes.get_title() else axes.get_title("left") or type(self).__name__
        )  # of two it would name one
        positions = [i / (num_points - 1) for i in range(num_points)]
        axes.plot(positions, [target * self(p) for p in positions], color=SERIES[2], linewidth=2.0, label=repr(self))
        axes.set(xlabel="position in the training", ylabel="sparsity", xlim=(0, 1), ylim=(-0.02, 1.02))
        axes.xaxis.set_major_formatter(as_percent)
        axes.yaxis.set_major_formatter(as_percent)
        dress(axes, title, grid="y")
        return axes


def _check_window(start_pct: float, end_pct: float) -> None:
    check_fraction("start_pct", start_pct)
    check_fraction("end_pct", end_pct)
    if start_pct > end_pct:
        raise ValueError(f"start_pct must be at most end_pct, got start_pct={start_pct!r}, end_pct={end_pct!r}")


def _inside(position: float, start_pct: float, end_pct: float) -> float | None:
    """Return the position within the window, in [0, 1]: None before the window, 1.0 after it.

    >>> _inside(0.75, 0.5, 1.0)  # halfway between 0.5 and 1.0
    0.5
    """
    check_fraction("position", position)
    if position < start_pct:
        return None
    if position >= end_pct:
        return 1.0
    return (position - start_pct) / (end_pct - start_pct)


def _on(pos: float, number: Callable[[float], float], array: Callable[[Any], Any]) -> float:
    """Apply a function of Python's to a number, or numpy's to an array of positions."""
    return number(pos) if isinstance(pos, int | float) else array(pos)  # type: ignore[no-any-return]


def sched_oneshot(start: float, end: float, pos: float) -> float:
    """Return `end` at every position: everything at once."""
    return end


def sched_iterative(start: float, end: float, pos: float, n_steps: int = 3) -> float:
    """Return `start + (end - start) ceil(pos n) / n`: `n_steps` equal stairs (Hubens, One-Cycle Pruning, author's code)."""
    return start + (end - start) * (_on(pos * n_steps, math.ceil, np.ceil) / n_steps)


def sched_agp(start: float, end: float, pos: float) -> float:
    """Return `end + (start - end)(1 - pos)^3` (Zhu & Gupta 2017, arXiv 1710.01878, equation 1)."""
    return end + (start - end) * (1 - pos) ** 3


def sched_onecycle(start: float, end: float, pos: float, α: float = 14, β: float = 6) -> float:  # noqa: PLC2401
    """Return `start + (end - start)(1 + e^(β-α)) / (1 + e^(β-α pos))` (Hubens et al. 2021, arXiv 2107.02086)."""
    return start + (end - start) * (1 + math.exp(β - α)) / (1 + _on(β - α * pos, math.exp, np.exp))


def sched_cos(start: float, end: float, pos: float) -> float:
    """Return the value of half a cosine from `start` to `end`, as in fastai."""
    return start + (1 + _on(math.pi * (1 - pos), math.cos, np.cos)) * (end - start) / 2


def sched_lin(start: float, end: float, pos: float) -> float:
    """Return the value of a straight line from `start` to `end`."""
    return start + pos * (end - start)


def sched_dsd(start: float, end: float, pos: float) -> float:
    """Return a cosine from `start` to `end` and back: dense, sparse, dense (after Han et al. 2016, arXiv 1607.04381)."""
    return start + (1 + _on(math.pi * (1 - 2 * pos), math.cos, np.cos)) * (end - start) / 2


class _Windowed(Schedule):
    """Curve from 0 to 1 within a window of the training; 0 before the window, the curve's last value after it."""

    start_pct: float
    end_pct: float

    def __post_init__(self) -> None:
        _check_window(self.start_pct, self.end_pct)

    @abstractmethod
    def curve(self, pos: float) -> float:
        """Return the share at a position within the window, both in [0, 1]."""

    def __call__(self, position: float) -> float:
        pos = _inside(position, self.start_pct, self.end_pct)
        return 0.0 if pos is None else self.curve(pos)


@dataclass(frozen=True)
class OneShot(_Windowed):
    """Single jump to the whole sparsity at `start_pct` of the training."""

    start_pct: float = 0.5
    end_pct: float = 1.0

    def curve(self, pos: float) -> float:
        return sched_oneshot(0.0, 1.0, pos)


@dataclass(frozen=True)
class Iterative(_Windowed):
    """Stairs: `n_steps` equal ones between `start_pct` and `end_pct`."""

    n_steps: int = 3
    start_pct: float = 0.2
    end_pct: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_steps", self.n_steps)

    def curve(self, pos: float) -> float:
        return sched_iterative(0.0, 1.0, pos, self.n_steps)


@dataclass(frozen=True)
class AGP(_Windowed):
    """Automated gradual pruning: steep at the start, flat at the end (Zhu & Gupta 2017)."""

    start_pct: float = 0.2
    end_pct: float = 1.0

    def curve(self, pos: float) -> float:
        return sched_agp(0.0, 1.0, pos)


@dataclass(frozen=True)
class OneCycle(_Windowed):
    """One-Cycle Pruning: a logistic rise with its inflection at `beta / alpha` (Hubens et al. 2021, arXiv 2107.02086).

    The author's README gives alpha 14 and beta 5, all released code 14 and 6; the default is the code's.

    Attributes:
        alpha: The slope, above 0.
        beta: The offset.
    """

    alpha: float = 14.0
    beta: float = 6.0
    start_pct: float = 0.0
    end_pct: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 500 or not abs(self.beta) <= 500:  # beyond, the exponential overflows
            raise ValueError(f"alpha must be in (0, 500] and beta in [-500, 500], got alpha={self.alpha!r}, beta={self.beta!r}")

    def curve(self, pos: float) -> float:
        return sched_onecycle(0.0, 1.0, pos, self.alpha, self.beta)


@dataclass(frozen=True)
class Cosine(_Windowed):
    """Half a cosine from 0 to 1."""

    start_pct: float = 0.0
    end_pct: float = 1.0

    def curve(self, pos: float) -> float:
        return sched_cos(0.0, 1.0, pos)


@dataclass(frozen=True)
class Linear(_Windowed):
    """Straight line from 0 to 1."""

    start_pct: float = 0.0
    end_pct: float = 1.0

    def curve(self, pos: float) -> float:
        return sched_lin(0.0, 1.0, pos)


@dataclass(frozen=True)
class DSD(_Windowed):
    """Dense-sparse-dense: up to 1 in the middle of the window and back to 0 at its end."""

    start_pct: float = 0.0
    end_pct: float = 1.0

    def curve(self, pos: float) -> float:
        return sched_dsd(0.0, 1.0, pos)


@dataclass(frozen=True)
class Alternating(Schedule):
    """Phases in turn, all of the sparsity and none of it: the first and the last one longer, the last one sparse.

    Dense up to `dense`, then `compressed` and `decompressed` in turn; dense again from `last`, sparse from `final` on. By
    default the phases of AC/DC in 100 epochs: dense up to epoch 10, five epochs each in turn, dense from 75, sparse from 85 on
    (Peste et al. 2021, arXiv 2106.12379; of a configuration of the authors' code). A phase begins with its position.

    >>> [alternating(position) for position in (0.05, 0.1, 0.15, 0.2, 0.7, 0.75, 0.8, 0.85)]
    [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]

    Attributes:
        dense: Where the first sparse phase begins, in [0, 1].
        compressed: The length of a sparse phase, in (0, 1].
        decompressed: The length of a dense phase, in (0, 1].
        last: Where the last dense phase begins, in [0, 1], at least `dense`.
        final: Where the last sparse phase begins, in [0, 1], at least `last`.
    """

    dense: float = 0.1
    compressed: float = 0.05
    decompressed: float = 0.05
    last: float = 0.75
    final: float = 0.85

    def __post_init__(self) -> None:
        for name in ("dense", "compressed", "decompressed", "last", "final"):
            check_fraction(name, getattr(self, name))
        for name in ("compressed", "decompressed"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not self.dense <= self.last <= self.final:
            given = f"dense={self.dense!r}, last={self.last!r}, final={self.final!r}"
            raise ValueError(f"last must be at least dense and at most final, got {given}")

    def __call__(self, position: float) -> float:
        position = check_fraction("position", position) + 1e-9  # 0.15 - 0.1 comes out below 0.05
        if position < self.dense or self.last <= position < self.final:
            return 0.0
        inside = (position - self.dense) % (self.compressed + self.decompressed)
        return 1.0 if position >= self.final or inside < self.compressed else 0.0

    @property
    def jumps(self) -> int:
        """The number of phases after the first, at most."""
        return 2 * math.ceil((self.last - self.dense) / (self.compressed + self.decompressed)) + 2


@dataclass(frozen=True, repr=False)
class Piecewise(Brief, Schedule):
    """Straight lines between points `(position, share)`.

    Before the first point the share is the first one's, after the last point the last one's. Two points at one position
    make a jump, which counts from that position on.

    >>> Piecewise(((0.2, 0.0), (0.6, 0.8), (0.6, 0.9), (1.0, 1.0)))(0.6)
    0.9
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((float(p), float(s)) for p, s in self.points))
        if not self.points:
            raise ValueError("points must be at least one pair (position, share), got none")
        for position, share in self.points:
            check_fraction("points' position", position)
            check_fraction("points' share", share)
        if any(a[0] > b[0] for a, b in zip(self.points, self.points[1:], strict=False)):
            raise ValueError(f"points must be in the order of their positions, got {self.points!r}")

    def __call__(self, position: float) -> float:
        check_fraction("position", position)
        if position < self.points[0][0]:
            return self.points[0][1]
        left = max(i for i, (p, _) in enumerate(self.points) if p <= position)
        p0, s0 = self.points[left]
        if left + 1 == len(self.points):
            return s0
        p1, s1 = self.points[left + 1]
        return s0 + (s1 - s0) * (position - p0) / (p1 - p0)


@dataclass(frozen=True, repr=False)
class Custom(Brief, Schedule):
    """Schedule from a function `f(start, end, pos)`; `Schedule(f, ...)` makes one.

    Inside the window the share is `f(start_val, end_val, pos)`, before it `start_val`, after it what `f` gives at `pos` 1.

    Attributes:
        sched_func: The function; `pos` in [0, 1] is the position inside the window.
        start_pct: Where in the training the window starts, in [0, 1].
        end_pct: Where it ends, in [0, 1].
        start_val: The share before the window, in [0, 1].
        end_val: The share that `f` goes to, in [0, 1].
    """

    sched_func: Callable[[float, float, float], float]
    start_pct: float = 0.0
    end_pct: float = 1.0
    start_val: float = 0.0
    end_val: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.sched_func):
            raise TypeError(f"sched_func must be a function (start, end, pos), got {self.sched_func!r}")
        _check_window(self.start_pct, self.end_pct)
        check_fraction("start_val", self.start_val)
        check_fraction("end_val", self.end_val)

    def __call__(self, position: float) -> float:
        pos = _inside(position, self.start_pct, self.end_pct)
        if pos is None:
            return self.start_val
        with noted(f"raised by the schedule's function {_name(self.sched_func)}, at position {position:g}"):
            value = self.sched_func(self.start_val, self.end_val, pos)
        return check_fraction("what sched_func returns", value)


@dataclass(frozen=True, repr=False)
class Phases(Brief, Schedule):
    """Several schedules one after the other: at each position the last one whose window has begun.

    A list of schedules, given where a schedule is expected, makes one.
    """

    schedules: tuple[Custom, ...]

    def __post_init__(self) -> None:
        if not self.schedules or not all(hasattr(s, "start_pct") for s in self.schedules):
            raise TypeError(f"schedules must be schedules with a window (start_pct, end_pct), got {self.schedules!r}")

    def __call__(self, position: float) -> float:
        check_fraction("position", position)
        begun = [s for s in self.schedules if s.start_pct <= position]
        return (begun[-1] if begun else self.schedules[0])(position)


@dataclass(frozen=True, repr=False)
class Position(Brief, Schedule):
    """Schedule from a plain function of the position."""

    function: Callable[[float], float]

    def __call__(self, position: float) -> float:
        check_fraction("position", position)
        with noted(f"raised by the schedule's function {_name(self.function)}, at position {position:g}"):
            value = self.function(position)
        return check_fraction("what the schedule returns", value)


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


one_shot = OneShot()
iterative = Iterative()
agp = AGP()
alternating = Alternating()
one_cycle = OneCycle()
cos = Cosine()
lin = Linear()
dsd = DSD()


def _takes_three(function: Callable[..., float]) -> bool:
    """Tell if a function has exactly three parameters without defaults, as `(start, end, pos)`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not tell
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 3


def as_schedule(schedule: Schedule | Callable[[float], float] | Sequence[Custom]) -> Schedule:
    """Make a schedule from a schedule, a function `(pos)` or `(start, end, pos)`, or a list of schedules with windows.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, type):
        raise TypeError(f"schedule must be a schedule, got the class {schedule.__name__}{instead_of_class(schedule)}")
    if isinstance(schedule, partial) and isinstance(schedule.func, Schedule):
        # partial(iterative, n_steps=5), as tutorials have it
        return replace(schedule.func, **schedule.keywords)  # type: ignore[type-var]
    if callable(schedule):
        return Custom(schedule) if _takes_three(schedule) else Position(schedule)  # type: ignore[arg-type]
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        return Phases(tuple(schedule))
    raise TypeError(f"schedule must be a schedule, its name, or a function of the position, got {schedule!r}")
