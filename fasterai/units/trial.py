"""A trial of a criterion when it is chosen, so that one that cannot score or compare is refused before a training has begun."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.types import Evidence, Target

__all__ = ["check_compared", "try_criteria"]

#: Targets of more weights are not tried: the trial of a criterion is to cost nothing to speak of.
MOST_WEIGHTS = 2**22


def try_criteria(criteria: Iterable[Criterion], targets: Sequence[Target]) -> None:
    """Refuse a criterion of the weight alone that cannot score any target; others have no evidence yet.

    It is called with a copy of the smallest target of each number of dimensions, until one of them is scored. The random
    generators stay as they were.

    Raises:
        TypeError: The criterion returns no tensor, or reads evidence that it does not ask for.
        ValueError: Its scores have another shape, or are NaN or infinite where the weights are plain numbers.
    """
    smallest: dict[int, Target] = {}
    for target in sorted(targets, key=lambda t: t.parameter.numel()):
        if target.parameter.numel() <= MOST_WEIGHTS:
            smallest.setdefault(target.parameter.dim(), target)
    for criterion in criteria:
        if not criterion.needs and criterion.ufunc is None:
            _try(criterion, list(smallest.values()))


def check_compared(criteria: Iterable[Criterion], granularity: Granularity, targets: Sequence[Target]) -> None:
    """Refuse a criterion whose rule compares units with each other where there is nothing that it could compare.

    Raises:
        ValueError: No target has several units of several weights, or the rule looks at outputs, and units are something else.
    """
    for criterion in criteria:
        if getattr(criterion.unit_rule, "compares", False) and not granularity.shares_weights and targets:
            if not any(_is_comparable(granularity, t) for t in targets):
                raise ValueError(
                    f"granularity must have several units of several weights each for {criterion.unit_rule!r}, "
                    f"got {granularity!r}; take 'filter', 'row', or 'coupled'"
                )
            if criterion.reads_outputs and not all(granularity.drops_outputs(t.layout) for t in targets):
                raise ValueError(
                    f"granularity must have outputs as its units for {criterion.unit_rule!r}, which compares these, "
                    f"got {granularity!r}; take 'filter' of convolutions, 'row' of matrices, or 'coupled'"
                )


def _is_comparable(granularity: Granularity, target: Target) -> bool:
    units = math.prod(granularity.unit_shape(target.layout))
    return 1 < units < target.parameter.numel()


def _try(criterion: Criterion, targets: Sequence[Target]) -> None:
    first: Exception | None = None
    for target in targets:
        try:
            _score(criterion, target)
        except Exception as error:  # of the user's own code; it may be meant for other targets
            first = first or error
        else:
            return
    if first is not None:
        raise first


def _score(criterion: Criterion, target: Target) -> None:
    weight = target.parameter.detach().clone()
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        scores = criterion(Evidence(target.name, weight.clone(), layout=target.layout))
    if _is_plain(weight) and not bool(scores.isfinite().all()):
        raise ValueError(
            f"criteria must return finite scores, got NaN or infinity from {criterion.title} for {target.name}, whose weights "
            "are finite"
        )


def _is_plain(weight: Tensor) -> bool:
    """Tell if weights are such as an initialisation draws: finite, none of them zero, not all equal."""
    return bool(weight.isfinite().all() & (weight != 0).all() & (weight != weight.flatten()[:1]).any())
