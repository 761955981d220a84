"""Pools of one target's units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasterai.core.granularities import Granularity
from fasterai.core.types import Layout, Target
from fasterai.model.cuts import Cut, sliced
from fasterai.model.masks import like
from fasterai.model.sharded import Place
from fasterai.units.partners import Partner, kept_outputs
from fasterai.units.pool import Pool, WeightScores, at_least_float32, of_living, unseen

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

    @property
    def shown_shape(self) -> tuple[int, ...]:
        return tuple(self.target.parameter.shape)

    def laid_out(self, keep: Tensor) -> Tensor:
        return like(self.target.parameter, keep)

    def tensor(self, name: str) -> Tensor:
        if name == self.name:
            return self.target.parameter.detach().view(self.target.layout.shape)
        return next(p.parameter for p in self.partners if p.name == name).detach()

    def score(self, scores: WeightScores) -> Tensor:
        by_part = scores.by_part(self.target)
        if by_part is None:
            return self.granularity.reduce(scores.of(self.target), self.target.layout, scores.reducer)
        return self.granularity.reduce_parts(by_part, self.target.layout, scores.reducer)

    def vectors_of_units(self) -> Tensor:
        weight, shape = at_least_float32(self.tensor(self.name)), self.layout.shape
        if all(units in (1, n) for units, n in zip(self.shape, shape, strict=True)):
            own = [d for d, units in enumerate(self.shape) if units > 1]
            others = [d for d in range(len(shape)) if d not in own]
            return weight.permute(*own, *others).reshape(self.count, -1)
        # Units that divide a dimension, such as blocks; at the edges they may be smaller, and are filled up with zeros.
        numbers = torch.arange(self.count, device=weight.device).view(self.shape)
        numbers = self.granularity.expand(numbers, self.layout).expand(shape).reshape(-1)
        order = numbers.argsort(stable=True)
        counts = numbers.bincount(minlength=self.count)
        place = torch.arange(len(order), device=weight.device) - (counts.cumsum(0) - counts)[numbers[order]]
        vectors = weight.new_zeros(self.count, int(counts.max()))
        vectors[numbers[order], place] = weight.reshape(-1)[order]
        return vectors

    def outputs_of_units(self, outputs: Mapping[str, Tensor]) -> Tensor:
        if self.name not in outputs:
            raise unseen(self.name)
        return of_living(outputs[self.name], self.vectors_of_units())

    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield self.target.name, self.granularity.expand(keep, self.target.layout)

    def vectors(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        for partner in self.partners:
            yield partner.name, kept_outputs(keep, self.target, self.granularity)

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
