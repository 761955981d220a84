"""Labels on tensor dimensions: joined labels are kept or removed together, pinned labels are kept.

A dimension is described by an array with one label per index, by `FIXED` (its size may not change) or by `FREE` (it takes the
size that it meets, as `zeros(...)` does). Joining and pinning only take notes; `Labels.components` works them out in one go.

Two dimensions of three channels, joined and one label pinned, leave two components that may be removed:

>>> labels = Labels()
>>> out, read = labels.new(3), labels.new(3)  # rows of one weight: 0, 1, 2; columns of the next: 3, 4, 5
>>> _ = labels.join(out, read, "linear")
>>> labels.pin(read[2:], "it is an output of the network")  # label 5
>>> found = labels.components()
>>> found.of.tolist()  # 0 goes with 3, 1 with 4, 2 with 5
[0, 1, 2, 0, 1, 2]
>>> found.pinned
{2: 'it is an output of the network'}
>>> found.free(out).tolist()
[0, 1]

A label may be marked as zero (`zeroed`): what stands there is exactly zero wherever all weights of its channel are. The mark
is a bit of the label, so that it goes along through views, and each element of a dimension has its own:

>>> marked = zeroed(out)
>>> is_zeroed(marked).tolist(), is_zeroed(read).tolist()
([True, True, True], [False, False, False])
>>> is_zeroed(labels.join(marked, read, "add")).tolist()  # a sum is zero where both are
[False, False, False]
>>> plain(marked).tolist()
[0, 1, 2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

__all__ = ["FIXED", "FREE", "Array", "Components", "Dim", "Flags", "Labels", "Packed"]
__all__ += ["is_labelled", "is_zeroed", "plain", "zeroed"]

Array = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class _Kind:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


FIXED: Final = _Kind("FIXED")
FREE: Final = _Kind("FREE")


@dataclass(frozen=True)
class Packed:
    """Dimensions that were merged into one, several of which carry labels: views alone take them apart again.

    Attributes:
        dims: The dimensions.
        sizes: Their sizes.
        reason: The reason for which their labels stay where something else is done with it.
    """

    dims: tuple[Array | _Kind | Packed, ...]
    sizes: tuple[int, ...]
    reason: str


Dim = Array | _Kind | Packed
ZERO: Final = 1 << 60  # the mark of a label; all labels are smaller


def is_labelled(dim: Dim) -> bool:
    """Tell if a dimension carries labels, and is neither `FIXED` nor `FREE`."""
    return isinstance(dim, np.ndarray)


def plain(labels: Array) -> Array:
    """Return labels without marks, as numbers."""
    return labels & (ZERO - 1)


def zeroed(labels: Array, flags: Flags | bool = True) -> Array:
    """Return labels that are marked as zero where `flags` are set, and nowhere else."""
    return np.where(flags, labels | ZERO, plain(labels))


def is_zeroed(dim: Dim) -> Flags:
    """Tell for each label of a dimension if it is marked as zero; a `FIXED` or `FREE` one is not."""
    return dim >= ZERO if isinstance(dim, np.ndarray) else np.zeros(1, np.bool_)


@dataclass(frozen=True)
class Components:
    """Connected components of labels: labels that are joined, directly or through others.

    Attributes:
        of: Label -> number of its component.
        pinned: Number of a pinned component -> the first reason for it.
    """

    of: Array
    pinned: dict[int, str]

    def numbers(self, labels: Array) -> Array:
        """Return the number of the component of each label."""
        return self.of[plain(labels)]

    def free(self, labels: Array) -> Array:
        """Return the numbers of those components of some labels that are not pinned, each once."""
        found = np.unique(self.numbers(labels))
        return found[[c not in self.pinned for c in found.tolist()]] if found.size else found


class Labels:
    """Record of labels, of the joins between them, and of pins."""

    def __init__(self) -> None:
        self.count = 0
        self._edges: list[tuple[Array, Array]] = []
        self._pins: list[tuple[Array, str]] = []

    def new(self, size: int) -> Array:
        """Return `size` new labels for a dimension."""
        if size < 0:
            raise ValueError(f"size must not depend on data, got {size}")
        self.count += size
        return np.arange(self.count - size, self.count)

    def join(self, a: Dim, b: Dim, reason: str) -> Dim:
        """Join two dimensions of one size, index by index; a `FIXED` one pins the other. Marked as zero is what is so in both.

        Args:
            a: A dimension.
            b: Another of the same size.
            reason: The reason to note for the pin if one of them is fixed.

        Returns:
            The dimension that stands for both.
        """
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            if a is b:
                return a
            self._edges.append((plain(a).ravel(), plain(b).ravel()))
            return a & (b | (ZERO - 1))
        if isinstance(a, Packed) or isinstance(b, Packed):
            self.pin_all([a, b], reason)
            return FIXED
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            labelled, other = (a, b) if isinstance(a, np.ndarray) else (b, a)
            if other is FIXED:
                self.pin(labelled, reason)
            return other if other is FIXED else plain(np.asarray(labelled))
        return FIXED if FIXED in (a, b) else FREE

    def unify(self, rows: Array) -> Array:
        """Join all labels of each row: rows `(n, k)` become `(n,)`, one label for each row.

        >>> Labels().unify(np.array([[0, 3], [1, 4], [2, 5]])).tolist()
        [0, 1, 2]
        """
        if rows.shape[1] == 1:
            return rows[:, 0]
        bare = plain(rows)
        self._edges.append((np.repeat(bare[:, 0], rows.shape[1] - 1), bare[:, 1:].ravel()))
        return zeroed(bare[:, 0], np.logical_and.reduce(is_zeroed(rows), 1))

    def pin(self, dim: Dim, reason: str) -> None:
        """Pin the labels of a dimension, so that they are kept; the reason is for the user."""
        if isinstance(dim, np.ndarray):
            self._pins.append((plain(dim).ravel(), reason))
        if isinstance(dim, Packed):
            self.pin_all(dim.dims, dim.reason)

    def pin_all(self, dims: Sequence[Dim], reason: str) -> None:
        """Pin the labels of several dimensions."""
        for dim in dims:
            self.pin(dim, reason)

    def components(self) -> Components:
        """Work out the connected labels, and the components that are pinned."""
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
