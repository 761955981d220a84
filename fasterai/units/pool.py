"""Pools of units that compete under one name, and shares given to them by name.

To add units that span several parameters: a `Pool` that can score them, say what their masks are, and be cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fasterai.core.scores import Scores
from fasterai.core.types import Layout, Target
from fasterai.model.cuts import Cut
from fasterai.model.sharded import Place
from fasterai.model.targets import resolve

__all__ = ["Pool", "WeightScores", "at_least_float32", "by_pool"]


class WeightScores:
    """The scores of targets' weights, each worked out once where several pools want them.

    Args:
        score: Target -> scores of the shape of its weight.
        reducer: `mean` or `sum` over the weights of a unit.
        by_part: Target -> its scores in the layout's view, worked out where they are read; None if that cannot be done.
    """

    def __init__(
        self,
        score: Callable[[Target], Tensor],
        reducer: str,
        by_part: Callable[[Target], Scores | None] = lambda target: None,
    ) -> None:
        self.of = score
        self.reducer = reducer
        self.by_part = by_part
        self._along: dict[tuple[str, int], Tensor] = {}

    def along(self, target: Target, dim: int) -> Tensor:
        """The scores of the indices of a dimension of the parameter, over all others."""
        if (target.name, dim) not in self._along:
            scores = self.of(target).reshape(target.parameter.shape)
            for d in {*range(min(2, scores.dim())), dim}:  # the two that channels run along
                others = [i for i in range(scores.dim()) if i != d]
                reduced = scores.mean(others) if self.reducer == "mean" else scores.sum(others)
                self._along[target.name, d] = reduced if others else scores
        return self._along[target.name, dim]


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor with half precision widened; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Pool(ABC):
    """Units that compete under one name.

    Attributes:
        name: The target's name, or that of the weight that makes the channels.
        targets: The weights that the units are scored by.
        makers: Names of targets that the pool may be called by.
        layout: How the contexts read it.
        shape: Of its units.
    """

    name: str
    targets: tuple[Target, ...]
    makers: frozenset[str]
    layout: Layout
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many units there are."""
        return math.prod(self.shape)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the parameters are held that its masks are multiplied into."""
        return self.targets

    @property
    def trains(self) -> bool:
        """Whether all of its weights train."""
        return all(t.parameter.requires_grad for t in self.targets)

    @property
    @abstractmethod
    def weights(self) -> int:
        """How many weights its units are made of."""

    @property
    def is_whole(self) -> bool:
        """Whether it is one single unit by definition."""
        return False

    def step(self, round_to: int | None, first: int | None = None) -> int:
        """What kept units are rounded up to a multiple of, of `first` units before any went; by default single ones are not."""
        return round_to or 1

    @property
    def device(self) -> torch.device:
        """Where its decisions are held."""
        return self.targets[0].parameter.device

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """The shape that reports show: of the parameter, or of the units where they span several."""
        return self.shape

    def laid_out(self, keep: Tensor) -> Tensor:
        """Return decisions in the order of memory in which their masks are read."""
        return keep

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The weight or vector of a name as its mask sees it: detached, in its layout's view, looked up anew each time."""

    @abstractmethod
    def score(self, scores: WeightScores) -> Tensor:
        """The scores of its units."""

    @abstractmethod
    def vectors_of_units(self) -> Tensor:
        """Return the weights that each unit is made of: `(units, features)`, in float32 at least; never to be written to."""

    def on_one_scale(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        """The scores as they are compared with those of other pools; as they are, unless the pool says otherwise."""
        return scores

    @abstractmethod
    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name of a weight, mask that broadcasts against `tensor(name)`), for decisions of the units' shape."""

    @abstractmethod
    def vectors(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name of a bias or a norm's scale or shift, which of its entries stay)."""

    def is_left(self, fresh: Mapping[str, Target]) -> bool:
        """Whether the model still has any of its weights."""
        return any(t.name in fresh for t in self.targets)

    @abstractmethod
    def cut(self, cut: Cut, fresh: Mapping[str, Target]) -> Pool:
        """The same pool after parameters have got smaller; `fresh` are the targets as they are now, at least one of its own."""

    @abstractmethod
    def cut_keep(self, keep: Tensor, cut: Cut, after: Pool) -> Tensor:
        """Decisions for what is left of the units, which `after` is the pool of."""


def by_pool(pools: Sequence[Pool], values: Mapping[str, float], targets: Sequence[Target], argument: str) -> dict[str, float]:
    """Shares by name or glob of a target that makes units, or by a pool's own name, as shares by pool name.

    Raises:
        ValueError: A name matches nothing; the known ones are listed. Or layers whose channels are coupled, or a tied
            parameter, were given different shares.
    """
    makers = [t for t in targets if not pools or any(t.name in p.makers for p in pools)]
    own = {p.name for p in pools} - {t.name for t in makers}
    shares = resolve({n: v for n, v in values.items() if n not in own}, makers, argument)
    if not pools:
        return shares
    result: dict[str, float] = {}
    for pool in pools:
        given = {n: shares[n] for n in sorted(pool.makers & shares.keys())}
        if len(set(given.values())) > 1:
            shown = ", ".join(f"{n}: {s:g}" for n, s in given.items())
            raise ValueError(f"{argument} must give layers whose channels are coupled one share, got {shown}")
        if given:
            result[pool.name] = next(iter(given.values()))
    return result | {n: v for n, v in values.items() if n in own}
