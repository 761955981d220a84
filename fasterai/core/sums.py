"""Sums of scores over dimensions, on a CPU: in one pass, in pieces that fit into the cache, in an order of its own.

Equal units sum up to equal scores wherever they are, and a unit scores the same in every memory format: each sum is made of the
same additions in the same order. Dimensions of a kernel are short, so they are summed by adding up slices, `x[:, 0] + x[:, 1] +
...`: a reduction along a dimension of 3 spends nine tenths of its time on starting anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fasterai.core.scores import PIECE, Array, Scores

__all__ = ["sum_parts"]

SHORT = 64  # dimensions up to this length are summed slice by slice


def sum_parts(scores: Scores, dims: Sequence[int]) -> Tensor:
    """Return the sums of a target's scores over some dimensions, which stay with size 1.

    Args:
        scores: On a CPU, read part by part and held nowhere.
        dims: At least one, rising.
    """
    shape = scores.shape
    sizes = tuple(1 if d in dims else n for d, n in enumerate(shape))
    if not scores.count:
        return torch.zeros(sizes, dtype=scores.tensor().dtype)
    # Leading dimensions that stay are one; a leading one that goes is added up piece by piece.
    lead = 1 if 0 in dims else next(d for d in range(len(shape)) if d in dims)
    outer, inner, dims = math.prod(shape[:lead]), shape[lead:], [d - lead + 1 for d in dims]
    size = math.prod(inner)
    step = max(1, PIECE // size)
    scratch = np.empty(min(step, outer) * size, np.float32)
    pieces = [(start, min(outer, start + step)) for start in range(0, outer, step)]
    if dims[0] == 0:
        total = sum(_read(scores, piece, inner, scratch).sum(0, keepdims=True) for piece in pieces)
        found = [_sum(total, dims[1:])]
    elif scores.is_strided and size <= SHORT and len(_runs(dims)) == 1:
        length = math.prod(inner[: len(dims)])
        found = [_sum_strided(scores, piece, length, size // length, scratch) for piece in pieces]
    else:
        found = [_sum(_read(scores, piece, inner, scratch), dims) for piece in pieces]
    return torch.from_numpy(np.concatenate(found)).view(sizes)


def _read(scores: Scores, piece: tuple[int, int], inner: Sequence[int], scratch: Array) -> Array:
    size = math.prod(inner)
    return scores.part(slice(piece[0] * size, piece[1] * size), scratch).reshape(-1, *inner)


def _sum_strided(scores: Scores, piece: tuple[int, int], length: int, after: int, scratch: Array) -> Array:
    """Return the sums `(n, after)` of scores `(n, length, after)` over their middle, each slice worked out as it is added."""
    start, end = piece
    size = length * after
    sums: Array = np.empty((end - start, after), np.float32)
    for j in range(after):
        for i in range(length):
            part = scores.part(slice(start * size + i * after + j, end * size, size), scratch)
            if i:
                np.add(sums[:, j], part, out=sums[:, j])
            else:
                sums[:, j] = part
    return sums


def _sum(x: Array, dims: Sequence[int]) -> Array:
    """Return the sums of a contiguous array over some dimensions but the first, which stay with size 1."""
    for first, last in reversed(_runs(dims)):
        shape = x.shape
        length, after = math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :])
        x = _sum_middle(x.reshape(-1, length, after))
        x = x.reshape(*shape[:first], *[1] * (last + 1 - first), *shape[last + 1 :])
    return x


def _runs(dims: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of neighbours.

    >>> _runs([1, 3, 4])
    [(1, 1), (3, 4)]
    """
    firsts = [d for d in dims if d - 1 not in dims]
    lasts = [d for d in dims if d + 1 not in dims]
    return list(zip(firsts, lasts, strict=True))


def _sum_middle(x: Array) -> Array:
    """Return the sums `(n, after)` of an array `(n, length, after)` over its middle."""
    _, length, after = x.shape
    sums: Array = np.empty((len(x), after), x.dtype)
    if after > SHORT:
        return np.add.reduce(x, axis=1, out=sums)
    for j in range(after):
        if length > SHORT or length == 1:
            np.add.reduce(x[:, :, j], axis=1, out=sums[:, j])
        else:
            np.add(x[:, 0, j], x[:, 1, j], out=sums[:, j])
            for i in range(2, length):
                np.add(sums[:, j], x[:, i, j], out=sums[:, j])
    return sums
