"""The units of pools as penalties see them: differentiable sums over each unit, and the way back from units to weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.granularities import Keep
from fasterai.core.types import Target
from fasterai.graph.channels import NORMS
from fasterai.regularize.penalties import Sizes
from fasterai.units.channel_pools import ChannelPool
from fasterai.units.pool import Pool, WeightScores
from fasterai.units.target_pools import TargetPool

__all__ = ["ChannelUnits", "ScaleUnits", "TargetUnits", "Units", "scale_units", "weight_units"]


Spread = Callable[[Tensor, float], Tensor]


class Units(ABC):
    """The units of one pool, or the scales of a norm behind them.

    Attributes:
        pool: The pool.
        count: The number of weights of a unit, one number or one for each.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @property
    @abstractmethod
    def count(self) -> Tensor:
        """The number of weights of a unit: one number, or one for each unit."""

    @abstractmethod
    def sums(self, values: WeightScores) -> Tensor:
        """Return the sums of values over the weights of each unit, with their gradient."""

    @abstractmethod
    def places(self) -> Iterator[tuple[nn.Parameter, Tensor, Spread]]:
        """Yield (parameter, view of it without gradient, function that spreads values of units over the view).

        The function takes the values, in the units' shape or as one number, and the value of what belongs to no unit.
        """

    def sizes(self, values: WeightScores, squares: WeightScores, is_mean: bool) -> Sizes:
        """Return what a penalty sees."""
        count = self.count
        share = 1 / count if is_mean else torch.ones_like(count)
        return Sizes(cache(partial(self.sums, values)), cache(partial(self.sums, squares)), count, share)


class TargetUnits(Units):
    """The units of one target."""

    def __init__(self, pool: TargetPool) -> None:
        super().__init__(pool)
        self.target, self.granularity = pool.target, pool.granularity

    @property
    def count(self) -> Tensor:
        layout, device = self.target.layout, self.target.parameter.device
        if isinstance(self.granularity, Keep):
            return torch.tensor(math.prod(layout.shape) / self.pool.count, device=device)
        return self.granularity.reduce(torch.ones(layout.shape, device=device), layout, "sum")  # smaller ones at the edges

    def sums(self, values: WeightScores) -> Tensor:
        return self.granularity.reduce(values.of(self.target), self.target.layout, "sum")

    def places(self) -> Iterator[tuple[nn.Parameter, Tensor, Spread]]:
        def spread(found: Tensor, rest: float) -> Tensor:
            return self.granularity.expand(found, self.target.layout) if found.dim() else found

        yield self.target.parameter, self.pool.tensor(self.target.name), spread


class ChannelUnits(Units):
    """The channels of one group of coupled channels: all slices of the weights that they are scored by, each counted."""

    def __init__(self, pool: ChannelPool) -> None:
        super().__init__(pool)
        scored = {t.name: t for t in pool.targets}
        self._slices: list[tuple[Target, int, Tensor]] = []
        for (name, d), indices in pool.group.places.items():
            if name in scored:
                where = torch.as_tensor(indices, device=scored[name].parameter.device)
                self._slices.append((scored[name], d, where))
        sizes = (t.parameter.numel() // t.parameter.shape[d] * where.shape[1] for t, d, where in self._slices)
        self._count = torch.tensor(float(sum(sizes)), device=pool.device)

    @property
    def count(self) -> Tensor:
        return self._count

    def sums(self, values: WeightScores) -> Tensor:
        parts = [values.along(target, d)[where].sum(1).to(self.pool.device) for target, d, where in self._slices]
        return torch.stack(parts).sum(0)

    def places(self) -> Iterator[tuple[nn.Parameter, Tensor, Spread]]:
        for target, d, where in self._slices:
            weight = target.parameter

            yield (
                weight,
                weight.detach(),
                partial(_spread, where, weight.shape[d], [-1 if i == d else 1 for i in range(weight.dim())]),
            )


class ScaleUnits(Units):
    """The scales of a norm behind the units of a pool, each of them a unit."""

    def __init__(self, pool: Pool, place: Any, where: Tensor | None = None) -> None:
        super().__init__(pool)
        self.place, self._where = place, where

    @property
    def count(self) -> Tensor:
        return torch.ones((), device=self.place.parameter.device)

    def sums(self, values: WeightScores) -> Tensor:
        found = values.of(self.place)  # type: ignore[arg-type]
        return found if self._where is None else found[self._where]

    def places(self) -> Iterator[tuple[nn.Parameter, Tensor, Spread]]:
        scale = self.place.parameter
        where = torch.arange(len(scale), device=scale.device) if self._where is None else self._where
        yield scale, scale.detach(), partial(_spread, where[:, None], len(scale), [-1])


def _spread(where: Tensor, length: int, shape: Sequence[int], found: Tensor, rest: float) -> Tensor:
    """Put values of units, `(units,)` or one number, at their indices `(units, indices per unit)` along one dimension."""
    full = torch.full((length,), rest, dtype=found.dtype, device=where.device)
    full[where] = found.to(where.device).reshape(-1, 1).expand(where.shape)
    return full.view(*shape)


def weight_units(pools: Sequence[Pool]) -> list[Units]:
    """Return the units of pools.

    Raises:
        TypeError: A pool is of a kind that has no sums over its units.
    """
    found: list[Units] = []
    for pool in pools:
        if isinstance(pool, ChannelPool):
            found.append(ChannelUnits(pool))
        elif isinstance(pool, TargetPool):
            found.append(TargetUnits(pool))
        else:
            raise TypeError(f"granularity must make units of targets or of coupled channels, got a {type(pool).__name__}")
    return found


def scale_units(pools: Sequence[Pool]) -> list[Units]:
    """Return the scales of the norms behind the units of pools; empty where none is known."""
    found: list[Units] = []
    seen: set[int] = set()
    for pool in pools:
        places: Sequence[Any] = pool.places  # targets and partners, which hold parameters
        for place in places:
            if place.attribute != "weight" or place.parameter.dim() != 1 or not _is_norm(place.module):
                continue
            if isinstance(pool, ChannelPool):
                where = torch.as_tensor(pool.group.places[place.name, 0], device=place.parameter.device).reshape(-1)
                found.append(ScaleUnits(pool, place, where))
            elif id(place.parameter) not in seen:
                found.append(ScaleUnits(pool, place))
            seen.add(id(place.parameter))
    return found


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
