"""The N largest of every M neighbouring inputs, and weights split by them: what context `NM` chooses, at a step's cost.

A place stays if it beats M - N others of its group; of two equal ones the later wins. On a CPU two places are compared in flat
memory: what lies `k` inputs on lies `k * run` numbers on, so that whole pieces of the cache's size are compared at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.contexts import NM
from fasterai.core.scores import TensorScores
from fasterai.core.types import Layout

__all__ = ["groups_dim", "keep_largest", "split_"]

PIECE = 1 << 16  # numbers of float32 that stay in the second-level cache with what is made of them
MOST = 64  # numbers in a group that are compared pair by pair; larger groups are sorted
Array = np.ndarray[Any, np.dtype[Any]]


def groups_dim(layout: Layout) -> int:
    """Return the dimension of a weight's view that groups run along: the inputs that one output reads."""
    return max(i for i, names in enumerate(layout.axes) if "in" in names)


@torch.no_grad()
def split_(weight: Tensor, hidden: Tensor, keep: Tensor, dim: int, n: int, m: int) -> None:
    """Keep the n largest of every m along a dimension, and move the rest into another tensor.

    Args:
        weight: The weights; all but the largest become zero.
        hidden: Of the same shape; becomes what was taken out, zero elsewhere.
        keep: Bool of the same shape; becomes True where a weight stays.
        dim: The dimension, whose length is a multiple of m.
        n: The number of weights that stay in a group, from 1 to m.
        m: The length of a group.
    """
    if n == m:
        hidden.zero_()
        keep.fill_(True)
    elif _is_flat(weight, hidden, keep) and m <= MOST:
        _split_flat(_flat(weight), _flat(hidden), _flat(keep), weight.stride(dim), n, m)
    else:
        keep.copy_(keep_largest(weight, dim, n, m))
        torch.where(keep, torch.zeros((), dtype=weight.dtype, device=weight.device), weight, out=hidden)
        weight.masked_fill_(~keep, 0)


def keep_largest(weight: Tensor, dim: int, n: int, m: int) -> Tensor:
    """Return where the n largest of every m along a dimension are: bool of the weight's shape; of equal ones the last stay.

    >>> keep_largest(torch.tensor([3.0, -1.0, 1.0, -4.0]), 0, 2, 4).int().tolist()
    [1, 0, 0, 1]
    """
    sizes = weight.detach().abs()
    if m > MOST:
        return NM(n, m)._winners(TensorScores("", sizes, None), dim, False)
    groups = sizes.movedim(dim, -1).unflatten(-1, (-1, m))  # type: ignore[no-untyped-call]
    beaten = torch.arange(m, dtype=torch.uint8, device=weight.device).expand(groups.shape).clone()
    for k in range(1, m):
        wins = (groups[..., :-k] > groups[..., k:]).view(torch.uint8)
        beaten[..., :-k] += wins
        beaten[..., k:] -= wins
    return (beaten >= m - n).flatten(-2).movedim(-1, dim)


def _is_flat(weight: Tensor, *others: Tensor) -> bool:
    """Tell if tensors are on a CPU, in the same order of memory, without gaps, and the first is of float32."""
    if weight.device.type != "cpu" or weight.dtype is not torch.float32:
        return False
    if any(x.stride() != weight.stride() or x.device != weight.device for x in others):
        return False
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(weight.stride(), weight.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _flat(x: Tensor) -> Array:
    found: Array = torch.as_strided(x.detach(), (x.numel(),), (1,)).numpy()
    return found


def _split_flat(weight: Array, hidden: Array, keep: Array, run: int, n: int, m: int) -> None:
    group = run * m
    step = max(1, PIECE // group) * group
    counters: dict[int, _Counter] = {}
    for i in range(0, weight.size, step):
        part, out = weight[i : i + step], hidden[i : i + step]
        counter = counters.get(part.size)
        if counter is None:
            counter = counters[part.size] = _Counter(part.size, run, m)
        counter.count(part)
        np.less(counter.beaten, m - n, counter.falls)
        np.copyto(counter.sizes, counter.falls)
        np.multiply(counter.sizes, part, out)
        np.subtract(part, out, part)
        np.logical_not(counter.falls, keep[i : i + step])


class _Counter:
    """Counts for each number of a piece how many of its group it beats; all views of its memory are made once.

    Every number is taken to beat all before it; where an earlier one is larger, it has one more and the later one less. For a
    group (3, 1, 1, 4): 0 1 2 3 at first; 3 beats two later ones, so that it is 2 0 1 3.
    """

    def __init__(self, size: int, run: int, m: int) -> None:
        self.sizes, self.falls = np.empty(size, np.float32), np.empty(size, np.bool_)
        self.beaten = np.empty(size, np.uint8)
        self._places, inside = _tables(size, run, m)
        wins = np.empty(size, np.bool_)
        self._rounds = []
        for k in range(1, m):
            later, end = k * run, size - k * run
            flags = wins[:end]
            sizes, beaten = (self.sizes[:end], self.sizes[later:]), (self.beaten[:end], self.beaten[later:])
            self._rounds.append((*sizes, flags, inside[k - 1, :end], flags.view(np.uint8), *beaten))

    def count(self, part: Array) -> None:
        """Write the counts into `beaten`."""
        np.abs(part, self.sizes)
        np.copyto(self.beaten, self._places)
        for first, second, wins, inside, flags, one, other in self._rounds:
            np.greater(first, second, wins)
            np.logical_and(wins, inside, wins)
            np.add(one, flags, one)
            np.subtract(other, flags, other)


@lru_cache(maxsize=16)
def _tables(length: int, run: int, m: int) -> tuple[Array, Array]:
    """Return each number's place in its group, and for k = 1 ... m - 1 whether what lies k inputs on is of the same group."""
    places = (np.arange(length) // run % m).astype(np.uint8)
    inside = places < np.arange(m - 1, 0, -1)[:, None]
    return places, inside
