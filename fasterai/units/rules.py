"""The catalogue of rules: how the masks of a training follow from those before.

A rule is a frozen value. How many units go is the context's answer, exact with every rule; the rule says whether pruned units
may take the place of kept ones, and at which steps. To add one: a frozen class below, its ready-made value if it needs no
settings, its name in `__all__`, a case in `tests/units/test_choice.py` and a line in `docs/contexts.md`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_count, check_fraction, from_catalogue
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.types import Evidence

__all__ = ["free", "nested"]


@dataclass(frozen=True)
class Moment:
    """A moment of a training.

    Attributes:
        step: Steps of the optimizer that are done.
        position: The share of the training that is done, in (0, 1].
    """

    step: int
    position: float


class Rule(ABC):  # noqa: B024 - each answer has a default, that of `nested`
    """How the masks of a training follow from those before; a frozen value.

    Every rule prunes exactly as many units as the context asks for. The moment is None for pruning at once.
    """

    def is_due(self, moment: Moment) -> bool:
        """Tell if the masks move at this moment, also where as many units are asked for as before."""
        return False

    def chooses_anew(self, moment: Moment | None) -> bool:
        """Tell if the masks so far have no say in the choice, so that pruned units compete like all others."""
        return False

    def exchanged(self, moment: Moment | None) -> float:
        """Return the share of each pool's kept units that pruned ones take the place of, in [0, 1]."""
        return 0.0

    def growing(self, moment: Moment | None) -> Criterion | None:
        """Return how pruned units are ranked that may take the place of kept ones."""
        return None

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """What it scores units by, besides the sparsifier's criterion."""
        return ()


@dataclass(frozen=True)
class Nested(Rule):
    """What is pruned stays pruned while the sparsity rises, and what is kept stays kept while it falls."""


@dataclass(frozen=True)
class _Periodic(Rule):
    """A rule by which masks move every few steps, up to a position.

    Attributes:
        every: Optimizer steps from one move to the next.
        until: The position of the training, in [0, 1], from which on the rule is that of `nested`.
    """

    every: int = 1
    until: float = 1.0

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_fraction("until", self.until)

    def is_due(self, moment: Moment) -> bool:
        return moment.position <= self.until and moment.step % self.every == 0


@dataclass(frozen=True)
class Free(_Periodic):
    """The masks are chosen anew at each move, of all units: what is pruned may return, for what scores less.

    The scores are those of the weights as the optimizer's step has left them, pruned ones included, and these return with that
    value. A participant that goes before the sparsifier may keep dense weights and put them there, as SR-STE does
    (Zhou et al. 2021, arXiv 2102.04010).

    Attributes:
        every: Optimizer steps from one move to the next; the masks also move when the asked number changes.
        until: The position of the training from which on masks stay, but for what the schedule asks.
    """

    def chooses_anew(self, moment: Moment | None) -> bool:
        return moment is None or moment.position <= self.until


def _large_gradient(e: Evidence) -> Tensor:
    assert e.gradient is not None
    return e.gradient.abs()


large_gradient = Criterion(_large_gradient, frozenset({"gradient"}), elementwise=True)  # |g|: Evci et al. 2020 (RigL)


@dataclass(frozen=True)
class DropAndGrow(_Periodic):
    """In each pool the lowest kept units are dropped, and as many pruned ones grow, the best by a second criterion.

    The count of each pool stays what the context makes it. Grown units start at zero. What is dropped does not grow at the same
    move; where fewer are pruned than were to be dropped, fewer are. With `grow="random"`, drawn anew at each move, this is SET
    (Mocanu et al. 2018, arXiv 1707.04780); with the gradient RigL (Evci et al. 2020, arXiv 1911.11134), which may also take
    back what it has just dropped.

    Attributes:
        every: Optimizer steps from one move to the next.
        until: The last position of the training at which units are exchanged.
        fraction: The share of the kept units that is exchanged, in [0, 1], or a function from the position to it.
        grow: A criterion, its name or a function of the weight: which pruned units grow, the highest first.
    """

    every: int = 100
    until: float = 0.75
    fraction: float | Callable[[float], float] = 0.3
    grow: Criterion | Callable[[Tensor], Tensor] | str = large_gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fraction):
            check_fraction("fraction", self.fraction)
        object.__setattr__(self, "grow", as_criterion(from_catalogue("grow", self.grow, criterion_catalogue)))

    def exchanged(self, moment: Moment | None) -> float:
        if moment is None or not self.is_due(moment):
            return 0.0
        if callable(self.fraction):
            return check_fraction("what fraction returns", self.fraction(moment.position))
        return self.fraction

    def growing(self, moment: Moment | None) -> Criterion | None:
        (grow,) = self.criteria
        anew: Any = getattr(grow.function, "anew", None)
        return grow if anew is None or moment is None else replace(grow, function=anew(moment.step))

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        assert isinstance(self.grow, Criterion)
        return (self.grow,)


nested = Nested()
free = Free()
