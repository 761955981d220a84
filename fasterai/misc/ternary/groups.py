"""Division of a weight into groups: a view of it in which one dimension runs inside of a group.

Groups of N run along the inputs, apart for each output and kernel position. Where the inputs do not divide, zeros fill the last
group; a ternary group has no use for zeros, so that they change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.checks import check_count
from fasterai.core.types import Layout

__all__ = ["Division", "Group", "check_group", "divide"]

#: Number of weights of a group along the inputs, or one of `WIDE`.
Group = int | str
#: Groups that are no part of the inputs: all weights of an output, all of a layer.
WIDE = ("filter", "tensor")


@dataclass(frozen=True)
class Division:
    """A weight seen as `(A, M, N, B)`: M groups of N in each of A x B rows along the inputs.

    Attributes:
        view: Shape of the weight's layout.
        order: The order of its dimensions in which those of a group stand together.
        rows: A, what stands before them.
        length: Weights along a row, at most `M N`.
        columns: B, what stands behind them.
        size: N.
    """

    view: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    length: int
    columns: int
    size: int

    @property
    def along(self) -> int:
        """Number of groups along a row, M."""
        return -(-self.length // self.size)

    @property
    def groups(self) -> int:
        """Number of all groups."""
        return self.rows * self.along * self.columns

    def split(self, weight: Tensor) -> Tensor:
        """Return the weight as `(A, M, N, B)`: a view where that is possible, with zeros at the ends of rows."""
        x = weight.detach().reshape(self.view).permute(self.order).reshape(self.rows, self.length, self.columns)
        if lacking := self.along * self.size - self.length:
            x = F.pad(x, (0, 0, 0, lacking))
        return x.reshape(self.rows, self.along, self.size, self.columns)

    def join(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Return groups `(A, M, N, B)` as a weight of a shape; `split` taken back."""
        x = groups.reshape(self.rows, self.along * self.size, self.columns)[:, : self.length]
        x = x.reshape([self.view[d] for d in self.order])
        return x.permute([self.order.index(d) for d in range(len(self.order))]).reshape(shape)

    def counts(self, like: Tensor) -> Tensor:
        """Return the numbers of weights in the groups of a row, `(M, 1)`: N, and fewer in the last one if zeros fill it."""
        counts = like.new_full((self.along, 1), self.size, dtype=torch.float32)
        counts[-1] = self.length - (self.along - 1) * self.size
        return counts


def check_group(group: object) -> Group:
    """Return a group if it is a whole number of at least 1, `filter` or `tensor`, or refuse it.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 1, or another word.
    """
    if isinstance(group, str):
        if group not in WIDE:
            raise ValueError(f"group must be a whole number of at least 1, or one of {', '.join(WIDE)}, got {group!r}")
        return group
    return check_count("group", group)


def divide(layout: Layout, group: Group) -> Division:
    """Divide a weight into groups.

    Args:
        layout: The weight's layout; it has inputs of its own (`axes` of `in` alone).
        group: Weights of a group along the inputs, at most all of them; `filter` for all weights of an output together,
            `tensor` for all of the layer.
    """
    shape, dims = layout.shape, range(len(layout.shape))
    if group == "tensor":
        return Division(shape, tuple(dims), 1, prod(shape), 1, max(prod(shape), 1))
    if isinstance(group, str):
        outer = [d for d in dims if layout.axes[d] & {"out", "expert"}]
        order = (*outer, *(d for d in dims if d not in outer))
        length = prod(shape[d] for d in dims if d not in outer)
        return Division(shape, order, prod(shape[d] for d in outer), length, 1, max(length, 1))
    place = max(d for d in dims if layout.axes[d] == {"in"})
    length = shape[place]
    return Division(shape, tuple(dims), prod(shape[:place]), length, prod(shape[place + 1 :]), max(min(group, length), 1))
