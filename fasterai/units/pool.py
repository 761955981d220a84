"""Pools of units that compete under one name, and shares given to them by name.

To add units that span several parameters: a `Pool` that scores them, makes their masks, and can be cut.
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

__all__ = ["Pool", "WeightScores", "at_least_float32", "by_pool", "of_living", "unseen"]


class WeightScores:
    """The scores of targets' weights, each computed once where several pools read them.

    Args:
        score: Target -> scores of the shape of its weight.
        reducer: `mean` or `sum` over the weights of a unit.
        is_signed: True if they are parts of a unit's score, of either sign, whose sum is then squared.
        by_part: Target -> its scores in the layout's view, computed part by part as they are read; None if that is impossible.
    """

    def __init__(
        self,
        score: Callable[[Target], Tensor],
        reducer: str,
        by_part: Callable[..., Scores | None] = lambda target, so_far=None: None,
        is_signed: bool = False,
    ) -> None:
        self.of = score
        self.reducer = reducer
        self.is_signed = is_signed
        self.by_part = by_part
        self._along: dict[tuple[str, int], Tensor] = {}

    def along(self, target: Target, dim: int) -> Tensor:
        """Combine the scores of a parameter's weights into one for each index of a dimension; the result is remembered."""
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


def of_living(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return outputs of units with zeros for those whose weights are all zero: a bias that is left is nothing of theirs."""
    return outputs * (weights != 0).any(1, keepdim=True).to(outputs.device)


def unseen(name: str) -> ValueError:
    """Return the error for a pool of which no layer has put anything out."""
    return ValueError(
        f"targets must be layers whose outputs can be watched, got {name}, which the model did not call on the data; leave it "
        "out with targets=, or take on='weights'"
    )


class Pool(ABC):
    """Units that compete under one name.

    Attributes:
        name: The target's name, or that of the weight that makes the channels.
        targets: The weights that the units are scored by.
        makers: The names of targets under which users may give the pool a share.
        layout: The layout that contexts read.
        shape: The shape of its units.
    """

    name: str
    targets: tuple[Target, ...]
    makers: frozenset[str]
    layout: Layout
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of units."""
        return math.prod(self.shape)

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that hold the parameters that its masks are multiplied into."""
        return self.targets

    @property
    def trains(self) -> bool:
        """True if all of its weights train."""
        return all(t.parameter.requires_grad for t in self.targets)

    @property
    @abstractmethod
    def weights(self) -> int:
        """The number of weights of all of its units, each counted once."""

    @property
    def is_whole(self) -> bool:
        """True if it is one single unit by definition."""
        return False

    def step(self, round_to: int | None, first: int | None = None) -> int:
        """Return the multiple that the number of kept units is rounded up to.

        Args:
            round_to: The multiple that the user gave; None for the pool's own, which is 1 unless it says otherwise.
            first: The number of units before any were removed; None if none have been.
        """
        return round_to or 1

    @property
    def device(self) -> torch.device:
        """The device that its decisions are on."""
        return self.targets[0].parameter.device

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """The shape that reports show: of the parameter, or of the units if they span several parameters."""
        return self.shape

    def laid_out(self, keep: Tensor) -> Tensor:
        """Return decisions in the memory format in which their masks are read."""
        return keep

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return the weight or vector of a name in the view that its mask broadcasts against: detached, looked up each time."""

    @abstractmethod
    def score(self, scores: WeightScores) -> Tensor:
        """Return the scores of its units."""

    @abstractmethod
    def vectors_of_units(self) -> Tensor:
        """Return the weights of each unit, `(units, features)`, in float32 at least; they must not be written to."""

    @abstractmethod
    def outputs_of_units(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return what each unit puts out, `(units, samples)`; zeros for units of zero weights, as pruned ones are.

        Args:
            outputs: Target's name -> what each of its outputs is on data, `(outputs, samples)`.

        Raises:
            ValueError: The outputs of no layer of the pool are known.
        """

    @property
    def is_looked_at(self) -> bool:
        """True if its scores depend on which units of other pools are left, so that first looks at it are remembered."""
        return False

    def on_one_scale(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Divide scores by the scale of the pool's, if those of other pools are on others."""
        return scores

    @abstractmethod
    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name of a weight, mask that broadcasts against `tensor(name)`), for decisions of the units' shape."""

    @abstractmethod
    def vectors(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name of a bias, or a norm's scale or shift; flags of its entries to keep)."""

    def is_left(self, fresh: Mapping[str, Target]) -> bool:
        """Tell if the model still has any of its weights.

        Args:
            fresh: Name -> target, of the model as it is now.
        """
        return any(t.name in fresh for t in self.targets)

    @abstractmethod
    def cut(self, cut: Cut, fresh: Mapping[str, Target]) -> Pool:
        """Return the same pool after parameters have got smaller.

        Args:
            cut: The indices that each parameter has kept.
            fresh: Name -> target, of the model as it is now; at least one is a target of this pool.
        """

    @abstractmethod
    def cut_keep(self, keep: Tensor, cut: Cut, after: Pool) -> Tensor:
        """Return the decisions for the units that are left after a cut; `after` is the pool of these units."""


def by_pool(pools: Sequence[Pool], values: Mapping[str, float], targets: Sequence[Target], argument: str) -> dict[str, float]:
    """Match shares to pools: from shares by target's name, glob or pool's own name, make shares by pool's name.

    Raises:
        ValueError: A name matches nothing; the known ones are listed. Or layers whose channels are coupled, or a tied
            parameter, were given different shares.
    """
    makers = [t for t in targets if not pools or any(t.name in p.makers for p in pools)]
    own = {p.name for p in pools} - {t.name for t in makers}
    try:
        shares = resolve({n: v for n, v in values.items() if n not in own}, makers, argument)
    except ValueError as error:
        raise ValueError(
            f"{error}; groups with names of their own are {', '.join(sorted(own))}" if own else str(error)
        ) from None
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
