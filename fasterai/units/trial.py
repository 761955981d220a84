"""A trial of a criterion when it is chosen, so that one that cannot score is refused before a training has begun."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fasterai.core.criteria import Criterion
from fasterai.core.types import Evidence, Target

__all__ = ["try_criteria"]

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
