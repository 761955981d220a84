"""Reshaping: dimensions merged into one, and one dimension split into several.

A tensor (2, 3) whose columns carry the labels 0, 1, 2 is flattened to (6,). Its entries carry the labels 0 1 2 0 1 2: to
remove channel 1 is to remove entries 1 and 4, and the rows stay equally long.

>>> trace = Trace({})
>>> columns = trace.labels.new(3)
>>> flat = _merge(trace, "flatten", [FREE, columns], [2, 3])
>>> flat.tolist()
[0, 1, 2, 0, 1, 2]

Viewed as (2, 3) again, the labels repeat along the rows, so the columns carry them as before:

>>> _split(trace, "view", flat, [2, 3])
[FIXED, array([0, 1, 2])]

Six labels of their own, viewed as two rows of three, leave a choice: whole rows are removed, or whole columns. `Trace.choices`
decides, by default for the rows. Row 0 goes as one then, with its labels 3, 4, 5 joined.

>>> six = trace.labels.new(6)
>>> _split(trace, "view", six, [2, 3])  # the labels 3 and 6 stand for the rows 3 4 5 and 6 7 8
[array([3, 6]), FIXED]
>>> trace.labels.components().of[six].tolist()
[3, 3, 3, 4, 4, 4]
>>> trace.options  # the view had two ways
{'split (2, 3)': 2}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, FREE, Array, Dim, Packed, is_labelled, plain
from fasterai.graph.rules.trace import Trace, Value, rule, shape_of, unknown_tensor

__all__ = ["matching"]


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def reshape(trace: Trace, node: Any, x: Value, *rest: Any, **keywords: Any) -> Value:
    shape = shape_of(node)
    if math.prod(shape) != math.prod(x.shape):
        return unknown_tensor(trace, node, x)  # in another type
    x = _unpacked(x)
    dims: list[Dim] = []
    for number, (before, after) in enumerate(matching(x.shape, shape)):
        flat = _merge(trace, node.name, [x.dims[i] for i in before], [x.shape[i] for i in before])
        dims += _split(trace, f"{node.name}/{number}", flat, [shape[j] for j in after])
    if rest and isinstance(rest[0], Value):  # `view_as(other)` takes the other's sizes
        dims = [
            trace.labels.join(mine, its, f"{node.name} meets a dimension of fixed size")
            for mine, its in zip(dims, rest[0].dims, strict=True)
        ]
    return Value(shape, tuple(dims))


def _unpacked(x: Value) -> Value:
    """Return a value with each dimension that was merged of several taken apart again."""
    parts = [(d.sizes, d.dims) if isinstance(d, Packed) else ((n,), (d,)) for n, d in zip(x.shape, x.dims, strict=True)]
    return Value(tuple(n for sizes, _ in parts for n in sizes), tuple(d for _, dims in parts for d in dims))


def matching(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest runs of dimensions, before and after, that hold the same number of elements.

    >>> matching([4, 2, 3], [4, 6])  # 4 stays, 2 x 3 becomes 6
    [([0], [0]), ([1, 2], [1])]
    """
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        n, m = math.prod(before[k] for k in left), math.prod(after[k] for k in right)
        while n != m:
            if n < m:
                n, left, i = n * before[i], [*left, i], i + 1
            else:
                m, right, j = m * after[j], [*right, j], j + 1
        runs.append((left, right))
    return runs


def _merge(trace: Trace, name: str, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Return the labels of several dimensions merged into one: the labels of one repeat along the others."""
    labelled = [i for i, d in enumerate(dims) if is_labelled(d) and sizes[i] > 1]
    for i, d in enumerate(dims):
        if sizes[i] == 1:
            trace.labels.pin(d, f"{name} relies on its size of 1") if len(dims) > 1 else None
    if len(dims) == 1:
        return dims[0]
    if not labelled:
        made = [i for i, d in enumerate(dims) if d is FREE and sizes[i] > 1]
        if len(made) != 1:
            return FREE if all(d is FREE for d in dims) else FIXED
        # What is made to fit, as a mask that is repeated for each head, is found again where it is split off.
        labelled = made
        dims = [trace.labels.new(n) if i == made[0] else d for i, (d, n) in enumerate(zip(dims, sizes, strict=True))]
    if len(labelled) > 1:
        return Packed(tuple(dims), tuple(sizes), f"{name} merges two dimensions that could both shrink")
    (at,) = labelled
    shape = [1] * len(sizes)
    shape[at] = sizes[at]
    merged: Array = np.broadcast_to(np.asarray(dims[at]).reshape(shape), tuple(sizes)).reshape(-1)
    return merged


def _split(trace: Trace, name: str, flat: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Return the labels of one dimension split into several: one of the factors carries them, the others are fixed."""
    if not isinstance(flat, np.ndarray) or len(sizes) < 2:
        return [flat] * len(sizes) if len(sizes) != 0 else []
    factors = [k for k, size in enumerate(sizes) if size > 1]
    if not factors:
        trace.labels.pin(flat, f"{name} relies on its size of 1")
        return [FIXED] * len(sizes)
    rows = [np.moveaxis(flat.reshape(sizes), k, 0).reshape(sizes[k], -1) for k in factors]
    # Where labels only repeat along the other factors, nothing is lost and nothing is to be decided.
    repeated = [i for i, r in enumerate(rows) if (plain(r) == plain(r[:, :1])).all()]
    way = repeated[0] if repeated else trace.choose(f"split {tuple(sizes[k] for k in factors)}", len(factors))
    dims: list[Dim] = [FIXED] * len(sizes)
    dims[factors[way]] = trace.labels.unify(rows[way])
    return dims
