"""Arguments of a regulariser, read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fasterai.core import criteria as criterion_catalogue
from fasterai.core import schedules
from fasterai.core.checks import check_choice, check_number, entry_or_repr, from_catalogue, not_one_of
from fasterai.core.criteria import Criterion, as_criterion, large_final
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.core.types import Evidence
from fasterai.regularize import penalties
from fasterai.regularize.penalties import Penalty
from fasterai.sparse.goal import read_granularity

__all__ = ["HOW", "Settings", "read_settings"]

HOW = ("loss", "gradient", "proximal")

#: Evidence that a penalty can have: others belong to a moment of pruning, or to data.
HELD = frozenset({"initial"})


@dataclass(frozen=True)
class Settings:
    """Arguments of a regulariser, as it uses them.

    Attributes:
        criteria: The criteria.
        granularities: The granularities; each is paired with each criterion.
        weight: The strength at share 1 of the schedule.
        schedule: The share of it at each position; None for all of it throughout.
        penalty: The price of units.
        how: `loss`, `gradient` or `proximal`.
    """

    criteria: tuple[Criterion, ...]
    granularities: tuple[Granularity, ...]
    weight: float
    schedule: Schedule | None
    penalty: Penalty
    how: str


def read_settings(criteria: Any, granularity: Any, weight: Any, schedule: Any, penalty: Any, how: Any) -> Settings:
    """Return the arguments as they are used.

    Raises:
        ValueError: One is unknown or out of range, or two do not go together.
        TypeError: One is of the wrong type.
    """
    price = from_catalogue("penalty", penalty, penalties)
    if not isinstance(price, Penalty):
        raise not_one_of("penalty", f"one of {', '.join(penalties.__all__)}, or a Penalty", penalty)
    check_choice("how", how, HOW)
    chosen = tuple(as_criterion(from_catalogue("criteria", c, criterion_catalogue)) for c in _several("criteria", criteria))
    for criterion in chosen:
        _check_criterion(criterion)
        _check_together(criterion, price, how)
    found = tuple(read_granularity(g) for g in _several("granularity", granularity))
    for one in found:
        if isinstance(one, Coupled) and one.over != "sum":
            raise ValueError(f"granularity must be 'coupled' for a penalty, which sums over a channel's slices, got {one!r}")
    curve = None if schedule is None else as_schedule(from_catalogue("schedule", schedule, schedules))
    return Settings(chosen, found, check_number("weight", weight, at_least=0.0), curve, price, how)


def _several(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        return (value,)
    if not value:
        raise ValueError(f"{name} must be one or a list of at least one, got {value!r}")
    return value


def _check_criterion(criterion: Criterion) -> None:
    """Refuse a criterion that is no price: one without a gradient, with scores below 0, or of evidence that is not there.

    It is tried on numbers from -2 to 2, beside initial weights of other values.
    """
    name = entry_or_repr(criterion, criterion_catalogue)
    beyond = [*(n for n in criterion.evidence_names if n not in HELD), *criterion.gatherers]
    if beyond:
        raise ValueError(
            f"criteria must be of the weight, or of the weight and the initial one, got {name}, which needs "
            f"{', '.join(beyond)}; take 'large_final'"
        )
    if criterion.unit_rule is not None or criterion.normalizer is not None:
        raise ValueError(f"criteria must be without unit_rule and normalizer for a penalty, got {name}")
    weight = torch.linspace(-2.0, 2.0, 4 * 2 * 3 * 3).reshape(4, 2, 3, 3).requires_grad_()
    scores = criterion(Evidence("weight", weight, initial=weight.detach().flip(0) * 0.5 + 0.3))
    gradient = torch.autograd.grad(scores.sum(), weight, allow_unused=True)[0] if scores.requires_grad else None
    if gradient is None or not bool(gradient.any()):
        raise ValueError(f"criteria must have a gradient by the weight for a penalty, got {name}, which has none")
    if not bool((scores >= 0).all()):
        raise ValueError(
            f"criteria must score no weight below 0 for a penalty, got {name}: lowering it would let weights grow without end"
        )


def _check_together(criterion: Criterion, penalty: Penalty, how: str) -> None:
    name = entry_or_repr(criterion, criterion_catalogue)
    if how == "proximal" and criterion != large_final and criterion != large_final.using(reducer="sum"):
        raise ValueError(
            f"criteria must be 'large_final' for how='proximal', whose step is known for |w| alone, got {name}; pass "
            "how='loss' or how='gradient'"
        )
    if penalty.on_scales and criterion.needs:
        raise ValueError(f"criteria must be of the weight alone for penalty={penalty!r}, got {name}")
