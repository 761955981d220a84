"""The catalogue of rules: ways in which new masks of a training follow from the masks before.

A rule is a frozen value. The context alone sets the number of units to prune, which is exact with every rule. The rule decides
if pruned units may take the place of kept ones, and at which steps.
To add one: a frozen class below, its ready-made value if it needs no settings, its name in `__all__`, a case in
`tests/units/test_choice.py` and a line in `docs/contexts.md`.
"""

from __future__ import annotations

import math
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
    """The base of all rules: the way in which new masks of a training follow from the masks before.

    Every rule prunes exactly as many units as the context asks for. The moment is None for pruning at once.
    """

    def is_due(self, moment: Moment) -> bool:
        """Tell if the masks change at this moment even though as many units are to be pruned as before."""
        return False

    def chooses_anew(self, moment: Moment | None) -> bool:
        """Tell if the choice ignores the masks so far, so that pruned units compete like all others."""
        return False

    def exchanged(self, moment: Moment | None) -> float:
        """Return the share of each pool's kept units that are replaced by pruned ones, in [0, 1]."""
        return 0.0

    def growing(self, moment: Moment | None) -> Criterion | None:
        """Return the criterion that ranks pruned units to replace kept ones; None if there is none."""
        return None

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The criteria that it scores units by, besides the sparsifier's criterion."""
        return ()


@dataclass(frozen=True)
class Nested(Rule):
    """A rule by which pruned units stay pruned while the sparsity rises, and kept units stay kept while it falls."""


@dataclass(frozen=True)
class _Periodic(Rule):
    """A rule by which masks change every few steps, up to a position.

    Attributes:
        every: The number of optimizer steps from one change to the next.
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
    """A rule by which all units are chosen anew at each change: pruned units return if they score higher than kept ones.

    The scores are those of the weights after the optimizer's step, pruned ones included; a unit returns with these weights. A
    participant before the sparsifier may hold dense weights and put them there, as SR-STE does (Zhou et al. 2021,
    arXiv 2102.04010).

    Attributes:
        every: The number of optimizer steps from one change to the next; masks also change when the asked number does.
        until: The position of the training from which on masks change only as the schedule asks.
    """

    def chooses_anew(self, moment: Moment | None) -> bool:
        return moment is None or moment.position <= self.until


def _large_gradient(e: Evidence) -> Tensor:
    assert e.gradient is not None
    return e.gradient.abs()


large_gradient = Criterion(_large_gradient, frozenset({"gradient"}), elementwise=True)  # |g|: Evci et al. 2020 (RigL)


@dataclass(frozen=True)
class Falling:
    """A share that falls to 0 along half a cosine: `first / 2 * (1 + cos(pi * position / until))`, as that of RigL.

    >>> Falling(0.3, until=0.75)(0.375)
    0.15

    Attributes:
        first: The share at position 0, in [0, 1].
        until: The position of the training, in [0, 1], from which on it is 0.
    """

    first: float = 0.3
    until: float = 0.75

    def __post_init__(self) -> None:
        check_fraction("first", self.first)
        check_fraction("until", self.until)

    def __call__(self, position: float) -> float:
        """Return the share at a position of the training."""
        return 0.0 if position >= self.until else self.first / 2 * (1 + math.cos(math.pi * position / self.until))


@dataclass(frozen=True)
class DropAndGrow(_Periodic):
    """A rule that exchanges units in each pool: it drops the lowest kept ones and grows as many pruned ones.

    A second criterion ranks the pruned units. The context sets the number of kept units of each pool. Grown units start at
    zero. A dropped unit does not grow at the same change. If fewer units are pruned than are to be exchanged, only as many are.
    With `grow="random"`, drawn anew at each change, this is SET (Mocanu et al. 2018, arXiv 1707.04780). With the gradient it is
    RigL (Evci et al. 2020, arXiv 1911.11134), except that RigL may grow a unit again that it has just dropped.
    The participants of these names begin with random masks, and clear what an optimizer keeps for grown units.

    Attributes:
        every: The number of optimizer steps from one change to the next.
        until: The last position of the training at which units are exchanged.
        fraction: The share of the kept units that is exchanged, in [0, 1], or a function from the position to it.
        grow: The criterion that ranks the pruned units, its name, or a function of the weight; the highest grow.
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
