"""Labels on tensor dimensions: what is joined stays or goes together, what is pinned stays.

A dimension is described by an array with one label per index, by `FIXED` (its size may not change) or by `FREE` (it was
made to fit, as `zeros(...)` is). Joining and pinning only take notes; `Labels.components` works them out in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

__all__ = ["FIXED", "FREE", "Array", "Components", "Dim", "Flags", "Labels", "is_labelled"]

Array = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class _Kind:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


FIXED: Final = _Kind("FIXED")
FREE: Final = _Kind("FREE")
Dim = Array | _Kind


def is_labelled(dim: Dim) -> bool:
    """Whether a dimension carries labels."""
    return isinstance(dim, np.ndarray)


@dataclass(frozen=True)
class Components:
    """Labels joined by any path.

    Attributes:
        of: Label -> number of its component.
        pinned: Number of a pinned component -> the first reason for it.
    """

    of: Array
    pinned: dict[int, str]

    def free(self, labels: Array) -> Array:
        """The numbers of the components of some labels that are not pinned, each once."""
        found = np.unique(self.of[labels])
        return found[[c not in self.pinned for c in found.tolist()]] if found.size else found


class Labels:
    """Hands out labels and notes what is joined and what is pinned."""

    def __init__(self) -> None:
        self.count = 0
        self._edges: list[tuple[Array, Array]] = []
        self._pins: list[tuple[Array, str]] = []

    def new(self, size: int) -> Array:
        """Fresh labels for a dimension."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def join(self, a: Dim, b: Dim, reason: str) -> Dim:
        """Two dimensions of one size go together; a fixed one pins the other.

        Args:
            a: A dimension.
            b: Another of the same size.
            reason: Why the other is pinned if one of them is fixed.

        Returns:
            What stands for both.
        """
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            if a is not b:
                self._edges.append((a.ravel(), b.ravel()))
            return a
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            labelled, other = (a, b) if isinstance(a, np.ndarray) else (b, a)
            if other is FIXED:
                self.pin(labelled, reason)
            return other if other is FIXED else labelled
        return FIXED if FIXED in (a, b) else FREE

    def unify(self, rows: Array) -> Array:
        """All labels of a row go together; rows `(n, k)` become `(n,)`."""
        if rows.shape[1] > 1:
            self._edges.append((np.repeat(rows[:, 0], rows.shape[1] - 1), rows[:, 1:].ravel()))
        return rows[:, 0]

    def pin(self, dim: Dim, reason: str) -> None:
        """A dimension stays as it is."""
        if isinstance(dim, np.ndarray):
            self._pins.append((dim.ravel(), reason))

    def pin_all(self, dims: Sequence[Dim], reason: str) -> None:
        """All of some dimensions stay as they are."""
        for dim in dims:
            self.pin(dim, reason)

    def components(self) -> Components:
        """What goes together, and what stays."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        ends = [np.concatenate(side) for side in zip(*self._edges, strict=True)] or [np.zeros(0, np.int64)] * 2
        links = coo_matrix((np.ones(ends[0].size, np.bool_), (ends[0], ends[1])), shape=(self.count, self.count))
        _, of = connected_components(links, directed=False)
        pinned: dict[int, str] = {}
        for labels, reason in self._pins:
            for component in np.unique(of[labels]).tolist():
                pinned.setdefault(component, reason)
        return Components(of.astype(np.int64), pinned)
