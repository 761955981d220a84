"""Decisions of a network by values, held while two states of it are compared.

Rounding moves a score by 1e-7 and may change the order of two boxes by it, after which outputs have nothing in common. So the
decisions of the first state are noted, with what they were made from: the second has to make them from the same numbers, up
to rounding, and goes on with the first one's. Its outputs are then compared as any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.model.outputs import movement

__all__ = ["Decisions"]

#: Operations that make steps of numbers.
STEPS = frozenset({"floor", "ceil", "round", "trunc", "sign", "heaviside"})
#: Operations that take shapes or types of numbers alone.
SHAPES = frozenset({"is_same_size", "sym_size", "size", "dim", "numel", "sym_numel", "stride", "is_contiguous"})


class Decision(NamedTuple):
    """One decision: the operation, the numbers that it was made from, and what came of it."""

    operation: str
    read: list[Tensor]
    made: Any


class Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record of the decisions of one run; with those of another run these are repeated.

    Attributes:
        made: The decisions of this run, where it is not given another's.
        moved: How far the numbers that decisions were made from are off those of the other run, as a share of their scale.
    """

    def __init__(self, others: Decisions | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Decision] = []
        self.moved = 0.0
        self._others: Iterator[Decision] | None = None if others is None else iter(others.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not read or not _decides(func, result):
            return result
        if self._others is None:
            self.made.append(Decision(str(func), [x.clone() for x in read], _copied(result)))
            return result
        other = next(self._others, None)
        if other is None or other.operation != str(func):  # it has taken another way: its outputs will show what that does
            self._others = iter(())
            return result
        if [x.shape for x in read] != [x.shape for x in other.read]:  # of channels, of which there are fewer now
            return result
        pairs = [(a.nan_to_num(0.0, *ENDS), b.nan_to_num(0.0, *ENDS)) for a, b in zip(other.read, read, strict=True)]
        self.moved = max([self.moved, *(movement(a, b).share for a, b in pairs)])
        return _copied(other.made)


ENDS = (float("inf"), -float("inf"))


def _decides(func: Any, result: Any) -> bool:
    """Tell if an operation makes whole numbers, truth values, steps or a number of Python from numbers."""
    name = func._schema.name.partition("::")[2].rstrip("_")
    if name in STEPS:
        return True
    if name in SHAPES or name.endswith("_like") or name.startswith("new_"):
        return False
    leaves = tree_leaves(result)
    return any(not x.dtype.is_floating_point and not x.is_complex() if isinstance(x, Tensor) else x is not None for x in leaves)


def _copied(result: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result)
