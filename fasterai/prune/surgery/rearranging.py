"""Code of einops' `Rearrange` layers in torch's own operations, as a trace needs it: sizes in their patterns can be put right.

`Rearrange("b n (h d) -> b h n d", h=4)` is a view, a permutation and a view:

>>> layer = SimpleNamespace(pattern="b n (h d) -> b h n d", axes_lengths={"h": 4})
>>> rearranged(layer, torch.zeros(2, 3, 8)).shape
torch.Size([2, 4, 3, 2])
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from operator import mul
from types import SimpleNamespace  # noqa: F401
from typing import Any

import torch  # noqa: F401

__all__ = ["can_be_written_out", "rearranged"]


def can_be_written_out(module: Any) -> bool:
    """Tell if a module is a `Rearrange` of einops whose pattern names every axis."""
    kind = type(module)
    is_layer = any((c.__module__, c.__name__) == ("einops.layers.torch", "Rearrange") for c in kind.__mro__)
    return is_layer and "..." not in module.pattern and "…" not in module.pattern


def rearranged(self: Any, input: Any) -> Any:
    """Return a tensor rearranged by a layer's pattern."""
    left, right = (_groups(side) for side in self.pattern.split("->"))
    shape, sizes = input.shape, {"1": 1, **self.axes_lengths}
    for i, group in enumerate(left):
        known = [sizes[axis] for axis in group if axis in sizes]
        unknown = [axis for axis in group if axis not in sizes]
        sizes |= {axis: shape[i] // _product(known) if known else shape[i] for axis in unknown}
    axes = [axis for group in left for axis in group if axis != "1"]
    order = [axes.index(axis) for group in right for axis in group if axis != "1"]
    apart = input.reshape([sizes[axis] for axis in axes]).permute(order)
    return apart.reshape([_product(sizes[axis] for axis in group) for group in right])


def _groups(side: str) -> list[list[str]]:
    """Split one side of a pattern into dimensions, each of one axis or several.

    >>> _groups("b () (h d) 1")
    [['b'], ['1'], ['h', 'd'], ['1']]
    """
    return [(together or alone).split() or ["1"] for together, alone in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def _product(sizes: Iterable[Any]) -> Any:
    return reduce(mul, sizes)
