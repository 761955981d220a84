"""Pools of one target's units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fasterai.core.granularities import Granularity
from fasterai.core.types import Layout, Target
from fasterai.model.cuts import Cut, sliced
from fasterai.model.sharded import Place
from fasterai.units.partners import Partner, kept_outputs
from fasterai.units.pool import Pool, WeightScores

__all__ = ["TargetPool"]


@dataclass(frozen=True)
class TargetPool(Pool):
    """The units of one target.

    Attributes:
        target: The target.
        granularity: What a unit is.
        partners: What falls silent with its outputs.
    """

    target: Target
    granularity: Granularity
    partners: tuple[Partner, ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.target.name

    @property
    def targets(self) -> tuple[Target, ...]:  # type: ignore[override]
        return (self.target,)

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.target, *self.partners)

    @property
    def makers(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.target.name})

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self.target.layout

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.granularity.unit_shape(self.target.layout)

    @property
    def weights(self) -> int:
        return self.target.parameter.numel()

    @property
    def is_whole(self) -> bool:
        return self.granularity.is_whole(self.target.layout)

    def tensor(self, name: str) -> Tensor:
        if name == self.name:
            return self.target.parameter.detach().view(self.target.layout.shape)
        return next(p.parameter for p in self.partners if p.name == name).detach()

    def score(self, scores: WeightScores) -> Tensor:
        by_part = scores.by_part(self.target)
        if by_part is None:
            return self.granularity.reduce(scores.of(self.target), self.target.layout, scores.reducer)
        return self.granularity.reduce_parts(by_part, self.target.layout, scores.reducer)

    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield self.target.name, self.granularity.expand(keep, self.target.layout)

    def vectors(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        for partner in self.partners:
            yield partner.name, kept_outputs(keep, self.target)

    def cut(self, cut: Cut, fresh: Mapping[str, Target]) -> TargetPool:
        there = {id(t.parameter) for t in fresh.values()}  # a norm may have been folded since
        partners = tuple(p for p in self.partners if id(p.module._parameters.get(p.attribute)) in there)
        return replace(self, target=fresh[self.name], partners=partners)

    def cut_keep(self, keep: Tensor, cut: Cut, after: Pool) -> Tensor:
        layout = self.target.layout
        shape = [math.prod(layout.shape[:2]), *layout.shape[2:]] if len(layout.names) < len(layout.shape) else layout.shape
        whole = self.granularity.expand(keep, layout).expand(layout.shape).reshape(shape)
        left = sliced(whole, cut, self.name).float()
        return self.granularity.reduce(left, after.layout, "sum") > 0
