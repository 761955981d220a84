"""The catalogue of penalties: what a unit's weights cost, and the proximal step of it.

A penalty sees the sizes of the units of a pool: sums over the weights of each. `v = c(w)` is the size of one weight by the
criterion, `|w|` by default. `G` is the number of a unit's weights, `E = sum_i v_i^2`, and `||w||` its root.
To add one: a frozen `Penalty`, a ready-made value, its name in `__all__`, a row in `tests/regularize/test_penalties.py` and a
line in `docs/regularization.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fasterai.core.checks import check_number

__all__ = ["group_lasso", "growing", "l1", "slimming"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a pool's units.

    Attributes:
        totals: A function that returns `sum_i v_i` of each unit, in the units' shape.
        squares: A function that returns `E = sum_i v_i^2` of each unit.
        count: `G`, one number or one for each unit.
        share: The part that the size of one weight has in its unit's score: `1 / G` for a mean, 1 for a sum.
    """

    totals: Callable[[], Tensor]
    squares: Callable[[], Tensor]
    count: Tensor
    share: Tensor


class Penalty(ABC):
    """A price of the units of one pool, and the step that lowers it exactly.

    Attributes:
        on_scales: True if its units are the scales of norms, and not weights.
        idle: What `apply_` takes where nothing is to change.
        silences: True if a step of 0 makes a whole unit zero.
    """

    on_scales: ClassVar[bool] = False
    idle: ClassVar[float] = 1.0
    silences: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, sizes: Sizes) -> Tensor:
        """Return the penalty of all units, a scalar with a gradient; the gradient of a unit of zeros is zero."""

    @abstractmethod
    def step(self, sizes: Sizes, rate: float | Tensor) -> Tensor:
        """Return what `apply_` takes for each unit, in the units' shape or as one number.

        Args:
            sizes: The units' sizes before the step.
            rate: The learning rate times the weight of the penalty.
        """

    def apply_(self, weight: Tensor, found: Tensor) -> None:
        """Take the step in weights, in place: multiply them by what `step` found."""
        weight.mul_(found)


@dataclass(frozen=True)
class L1(Penalty):
    """The scores of the units added up: `sum_g (1/G) sum_i v_i`.

    This is R(W) of Hubens et al. 2022 (FasterAI, Electronics 11, 3789), section on regularisation. The proximal step is a soft
    threshold of each weight by `rate / G`, so that its zeros are single weights.
    """

    idle: ClassVar[float] = 0.0

    def __call__(self, sizes: Sizes) -> Tensor:
        if sizes.share.dim():
            return (sizes.totals() * sizes.share).sum()
        return sizes.totals().sum() * sizes.share  # one pass less over units that are as many as weights

    def step(self, sizes: Sizes, rate: float | Tensor) -> Tensor:
        return sizes.share * rate

    def apply_(self, weight: Tensor, found: Tensor) -> None:
        _soften_(weight, found)


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """The norms of the units added up: `sum_g sqrt(G) ||w_g||` (Yuan & Lin 2006, the factor sqrt(G) as there, from memory).

    The proximal step scales a unit by `max(0, 1 - rate sqrt(G) / ||w_g||)`: units whose norm is at most `rate sqrt(G)` become
    exactly zero, and with them their bias, and the scale and shift of their norm. For units of one weight it is the same as
    `l1`.

    Attributes:
        scaled: False leaves the factor sqrt(G) out, so that large units are no dearer than small ones of the same norm.
        alpha: With more than 0 the norm of a unit counts `gamma_k` times, as in `growing`, but for norms: units that fall
            behind the largest of their pool are drawn to zero up to `2^alpha` times as fast. The two together are ours.
    """

    silences: ClassVar[bool] = True

    scaled: bool = True
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, at_least=0.0)

    def __call__(self, sizes: Sizes) -> Tensor:
        norms = _root(sizes.squares())
        return (norms * self._factor(sizes, norms)).sum()

    def step(self, sizes: Sizes, rate: float | Tensor) -> Tensor:
        norms = _root(sizes.squares())
        threshold = self._factor(sizes, norms) * rate
        found = torch.where(norms > threshold, 1 - threshold / norms, torch.zeros_like(norms))
        return found.masked_fill(threshold <= 0, self.idle)  # without a penalty units of zeros are no silent ones

    def _factor(self, sizes: Sizes, norms: Tensor) -> Tensor:
        factor = sizes.count.sqrt() if self.scaled else torch.ones_like(sizes.count)
        return factor * behind(norms, self.alpha) if self.alpha else factor


@dataclass(frozen=True)
class Growing(Penalty):
    """Weight decay that grows as a unit falls behind the others of its pool: `1/2 sum_k gamma_k E_k`.

    `gamma_k = 2^(alpha (I_max - I_k) / (I_max - I_min))` with `I_k = sqrt(E_k)` goes from 1 for the largest unit to `2^alpha`
    for the smallest, and is 1 for all if they are equal. It is a constant for the gradient, which is `gamma_k w`. Fang et al.
    2023 (DepGraph, arXiv 2301.12900), section on sparse training, with the root and the gradient as in the authors' code. The
    proximal step scales a unit by `1 / (1 + rate gamma_k)`, which makes no zeros.

    Attributes:
        alpha: The binary logarithm of the largest factor, at least 0.
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, at_least=0.0)

    def __call__(self, sizes: Sizes) -> Tensor:
        squares = sizes.squares()
        return (squares * behind(squares.detach().sqrt(), self.alpha)).sum() / 2

    def step(self, sizes: Sizes, rate: float | Tensor) -> Tensor:
        return 1 / (1 + behind(sizes.squares().sqrt(), self.alpha) * rate)


@dataclass(frozen=True)
class Slimming(Penalty):
    """The scales of the norms behind the units added up: `sum |scale|` (network slimming, Liu et al. 2017, arXiv 1708.06519).

    The proximal step is a soft threshold of each scale by `rate`. A channel whose scale is zero still puts out the shift.
    """

    on_scales: ClassVar[bool] = True
    idle: ClassVar[float] = 0.0

    def __call__(self, sizes: Sizes) -> Tensor:
        return sizes.totals().sum()

    def step(self, sizes: Sizes, rate: float | Tensor) -> Tensor:
        return torch.ones_like(sizes.count) * rate

    def apply_(self, weight: Tensor, found: Tensor) -> None:
        _soften_(weight, found)


def behind(norms: Tensor, alpha: float) -> Tensor:
    """Return `2^(alpha (I_max - I_k) / (I_max - I_min))` for the norms of a pool's units, as constants; 1 if all are equal."""
    norms = norms.detach()
    gap, spread = norms.max() - norms, norms.max() - norms.min()
    return torch.exp2(alpha * torch.where(spread > 0, gap / spread, torch.zeros_like(norms)))


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with the gradient 0 at 0, where that of the root is infinite."""
    is_zero = squares == 0
    return torch.where(is_zero, torch.ones_like(squares), squares).sqrt().masked_fill(is_zero, 0.0)


def _soften_(weight: Tensor, threshold: Tensor) -> None:
    """Move weights towards zero by a threshold, at most to zero, in place."""
    weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_(min=0))


l1 = L1()
group_lasso = GroupLasso()
growing = Growing()
slimming = Slimming()
