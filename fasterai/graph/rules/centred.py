"""Patterns of operations: a mean that is taken away, and squares of what is left, as a variance written by hand has them."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from fasterai.graph.rules.reshaping import matching
from fasterai.graph.rules.trace import argument_of, called, shape_of

__all__ = ["is_centred", "squared"]

VIEWS = ("view", "reshape", "flatten", "_unsafe_view")
SAME = (*VIEWS, "unsqueeze", "expand", "expand_as")
GETS = ("getitem", "<built-in function getitem>")


def squared(node: Any) -> Any:
    """Return what an operation squares; None where it does something else."""
    if called(node) not in ("pow", "square", "mul") or (called(node) == "pow" and node.args[1] != 2):
        return None
    return None if called(node) == "mul" and node.args[1] is not node.args[0] else node.args[0]


def is_centred(node: Any, dims: Collection[int]) -> bool:
    """Tell if a tensor is one whose mean along some dimensions was taken away, so that its entries along these sum to zero.

    It may be a view, as one of a weight `(O, I, *K)` by `(O, I K)`, and the mean one of means.
    """
    found = _behind_views(node, set(dims))
    if found is None:
        return False
    node, over = found
    if called(node) != "sub" or len(node.args) != 2 or node.kwargs or not all(hasattr(one, "target") for one in node.args):
        return False
    x, mean = node.args
    shape = shape_of(x)
    taken = _averaged(mean, x)
    if taken is None:
        return False
    mean = mean.args[0] if called(mean) in ("expand", "expand_as") else mean
    left = list(shape_of(mean))
    return {d for d in taken if shape[d] > 1} == over and left == [1 if d in taken else n for d, n in enumerate(shape)]


def _behind_views(node: Any, dims: set[int]) -> tuple[Any, set[int]] | None:
    """Return the tensor that a node is a view of, and which of its dimensions some of the view's are, those of size 1 aside."""
    dims = {d for d in dims if shape_of(node)[d] > 1}
    while called(node) in VIEWS and math.prod(shape_of(node)) == math.prod(shape_of(node.args[0])):
        old: set[int] = set()
        for before, after in matching(shape_of(node.args[0]), shape_of(node)):
            wide = {d for d in after if shape_of(node)[d] > 1}
            if wide & dims and not wide <= dims:
                return None
            old.update(d for d in before if wide & dims and shape_of(node.args[0])[d] > 1)
        node, dims = node.args[0], old
    return node, dims


def _averaged(mean: Any, x: Any) -> set[int] | None:
    """Return the dimensions of `x` that a mean of it runs over; None where it is none."""
    dims: set[int] = set()
    rank = len(shape_of(x))
    while mean is not x:
        if called(mean) in GETS and mean.args[1] == 1 and called(mean.args[0]) == "var_mean":
            mean = mean.args[0]
        given = argument_of(mean, "dim", mean.args[1:], mean.kwargs) if called(mean) in ("mean", "var_mean") else None
        if given is not None and given != [] and len(shape_of(mean.args[0])) == rank:
            dims |= {d % rank for d in ([given] if isinstance(given, int) else given)}
        elif not (
            called(mean) in SAME or (called(mean) == "mul" and isinstance(mean.args[1], int | float))
        ):  # put right before
            return None
        mean = mean.args[0]
    return dims
