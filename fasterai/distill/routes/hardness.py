"""Hardness of a teacher's anchors for a student, and the greedy choice of the next one by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.core.batch import Batch
from fasterai.display import Brief
from fasterai.distill.losses.loss import as_rows
from fasterai.model.inputs import as_batch
from fasterai.model.running import device_of, evaluating

__all__ = ["Greedy", "held_out_batches", "next_anchor", "outputs_of", "relative_entropy"]


@dataclass(frozen=True, repr=False, eq=False)
class Greedy(Brief):
    """Greedy choice of anchors by hardness: after anchor i, the latest j with `H_ij <= (1 + delta) * H_ii`, or i + 1.

    `H_ij` is the mean of `KL(anchor j || student)` over held-out samples, for the student that has learned from anchor i.
    After Jin et al. 2019 (RCO), whose exact wording of this rule was not read.

    Args:
        delta: How much harder than its present anchor the next one may be, at least 0.
        data: The held-out samples: batches as a loader yields them, `x`, `(x, y)` or a dict. The student does not train on
            them; labels are not read.

    Raises:
        ValueError: `delta` is below 0 or not finite, or there is no data.
        TypeError: An argument is of the wrong type.
    """

    delta: float = 0.8
    data: Iterable[Any] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check_delta(self.delta)
        check_data(self.data)


def _check_delta(delta: object) -> None:
    if isinstance(delta, bool) or not isinstance(delta, Real):
        raise TypeError(f"delta must be a number of at least 0, got {delta!r} ({type(delta).__name__})")
    if not (math.isfinite(delta) and float(delta) >= 0):
        raise ValueError(f"delta must be at least 0 and finite, got {delta!r}")


def check_data(data: object) -> None:
    """Refuse what yields no batches.

    Raises:
        TypeError: It cannot be gone through, or only once.
        ValueError: It is empty.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(f"data must be a list or loader of batches, got a {type(data).__name__}; pass data=[(x, y), ...]")
    if iter(data) is data:
        raise TypeError("data must be gone through again after each stage, got an iterator; pass list(data)")
    if isinstance(data, Sequence) and not len(data):
        raise ValueError("data must hold batches of held-out samples, got none; pass data=[(x, y), ...]")


def next_anchor(hardness: Sequence[float], current: int, delta: float) -> int | None:
    """Return the anchor to go on with; None after the last one.

    Args:
        hardness: The hardness of each anchor for the student as it is.
        current: The anchor that it has learned from last.
        delta: How much harder the next one may be.

    >>> next_anchor([0.1, 0.10, 0.15, 0.3], 0, 0.8), next_anchor([0.1, 0.2, 0.3], 0, 0.8), next_anchor([0.1, 0.2], 1, 0.8)
    (2, 1, None)
    """
    if current == len(hardness) - 1:
        return None
    bound = (1 + delta) * hardness[current]
    return max((j for j in range(current + 1, len(hardness)) if hardness[j] <= bound), default=current + 1)


def held_out_batches(data: Iterable[Any]) -> list[Batch]:
    """Return the batches of held-out samples, which all anchors then see alike."""
    batches = [as_batch(item) for item in data]
    if not batches:
        raise ValueError("data must hold batches of held-out samples, got none; pass data=[(x, y), ...]")
    return batches


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return a network's logits of batches as rows `(N, C)`, of eval mode, on the network's device."""
    found = []
    with evaluating(model):
        for batch in batches:
            device = device_of(model, batch.inputs)
            inputs, keywords = tree_map(
                lambda x, to=device: x.to(to) if isinstance(x, Tensor) else x, (batch.inputs, dict(batch.keywords))
            )
            keywords.pop("labels", None)
            found.append(as_rows(Batch(outputs=model(*inputs, **keywords)).logits))
    return found


def relative_entropy(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> float:
    """Return the mean of `KL(teacher || student)` over rows of logits, in nats.

    Raises:
        ValueError: It is no finite number, or the shapes of the logits differ.
    """
    total, rows = 0.0, 0
    for theirs, own in zip(teacher, student, strict=True):
        if theirs.shape != own.shape:
            raise ValueError(
                f"student must have the outputs of its teacher, got {tuple(own.shape)} where it has {tuple(theirs.shape)}"
            )
        log_p, log_q = (x.to("cpu", torch.float64).log_softmax(1) for x in (theirs, own))
        total += float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        rows += len(theirs)
    if not math.isfinite(total):
        raise ValueError("hardness must be finite, got outputs with NaN or infinity of the student or of an anchor")
    return total / rows
