"""Unit scores of one target, either held in a tensor or computed part by part as they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.types import Evidence

if TYPE_CHECKING:
    from fasterai.core.criteria import Criterion

__all__ = ["PIECE", "Array", "EvidenceScores", "Mark", "NotFiniteError", "Scores", "TensorScores", "count_true", "not_finite"]

PIECE = 1 << 17  # half a MiB of float32: weights, scores and flags of a piece share a second-level cache
Array = np.ndarray[Any, np.dtype[Any]]


class Mark(Enum):
    """The meaning of the masks so far for the next choice."""

    NONE = 0  # none: all units are chosen among anew
    PRUNED_FIRST = 1  # more are to be pruned: pruned units stay pruned
    KEPT_LAST = 2  # fewer are to be pruned: kept units stay kept


class Scores(ABC):
    """The unit scores of one target.

    Attributes:
        name: The target's name.
        shape: The shape of the units.
        keep: The decision so far, bool of that shape; None before the first.
    """

    name: str
    shape: tuple[int, ...]
    keep: Tensor | None

    @property
    def count(self) -> int:
        """The number of units."""
        return math.prod(self.shape)

    @cached_property
    def pruned(self) -> int:
        """The number of units that are pruned so far."""
        return 0 if self.keep is None else self.count - count_true(self.keep)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the scores are on."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """Return all scores, of shape `shape`."""

    @abstractmethod
    def part(self, where: slice, scratch: Array) -> Array:
        """Return the scores of some units in their flat order.

        The result may lie in `scratch`, so that it is valid only until the next call.
        """

    @property
    def nonnegative(self) -> bool:
        """True if no score is below 0."""
        return False

    @property
    def is_strided(self) -> bool:
        """True if scores some places apart cost no more than neighbours."""
        return False

    def marked(self, where: slice, mark: Mark, scratch: Array, check: bool = False) -> tuple[Array, Array | None]:
        """Return the scores of some units, and flags of those that may be removed; None for the flags if all may be.

        While the number of pruned units rises, only units that are kept so far may be removed. While it falls, all may be,
        and kept units get the score infinity, so that they are removed last.

        Raises:
            ValueError: `check` is asked for and a score is NaN or infinite.
        """
        part = self.part(where, scratch)
        # A maximum is one pass over the cache and carries NaN; isfinite would write a second array.
        if check and part.size and not (math.isfinite(part.max()) and (self.nonnegative or math.isfinite(part.min()))):
            raise not_finite(self.name)
        if self.keep is None or mark is Mark.NONE:
            return part, None
        keep = self._flat_keep[where]
        return (part, keep) if mark is Mark.PRUNED_FIRST else (np.where(keep, part.dtype.type(np.inf), part), None)

    @cached_property
    def _flat_keep(self) -> Array:
        assert self.keep is not None
        flat: Array = self.keep.reshape(-1).numpy()
        return flat


def count_true(mask: Tensor) -> int:
    """Count the entries of a bool tensor that are True."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


class NotFiniteError(ValueError):
    """The error for scores that cannot be ranked.

    Attributes:
        name: The name of the scores, a target's or a group's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"scores must be finite, got NaN or infinity for {name}; look for NaN or infinite weights there")
        self.name = name

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str]]:
        return type(self), (self.name,)


def not_finite(name: str) -> NotFiniteError:
    """Return the error for scores of a target that cannot be ranked."""
    return NotFiniteError(name)


@dataclass(frozen=True)
class TensorScores(Scores):
    """Scores held in a tensor."""

    name: str
    values: Tensor
    keep: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensor(self) -> Tensor:
        return self.values

    def part(self, where: slice, scratch: Array) -> Array:
        return self._flat[where]

    @cached_property
    def _flat(self) -> Array:
        flat: Array = self.values.reshape(-1).numpy()  # a copy of another memory format, made once
        return flat


@dataclass(frozen=True)
class EvidenceScores(Scores):
    """Scores of single weights, computed part by part and never held; for elementwise criteria on a CPU.

    Attributes:
        evidence: The evidence of the target; its tensors are contiguous.
        criterion: An elementwise criterion without normaliser.
    """

    name: str
    evidence: Evidence
    criterion: Criterion
    keep: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.evidence.weight.shape)

    @property
    def device(self) -> torch.device:
        return self.evidence.weight.device

    def tensor(self) -> Tensor:
        return self.criterion(self.evidence)

    @property
    def nonnegative(self) -> bool:
        return self.criterion.nonnegative

    @property
    def is_strided(self) -> bool:
        return self.criterion.ufunc is not None and self.evidence.weight.dtype is torch.float32

    @cached_property
    def _weights(self) -> Array:
        flat: Array = self.evidence.weight.view(-1).numpy()
        return flat

    def part(self, where: slice, scratch: Array) -> Array:
        part: Array
        if self.criterion.ufunc is not None and self.is_strided:
            weights = self._weights[where]
            part = self.criterion.ufunc(weights, out=scratch[: weights.size])
        else:
            part = self.criterion(self.evidence.map(lambda x: x.view(-1)[where])).numpy()
        return part
