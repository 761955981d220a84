"""L3. Pools of units: those of one target, or coupled channels of one kind. A context chooses among them by the pool's name.

To add units that span several parameters: a `Pool` that can score them, say what their masks are, and be cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.cuts import Cut, sliced
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.targets import all_targets, resolve, unwrap
from fasterai.core.types import Layout, Target
from fasterai.prune.graph import ChannelGraph, Group
from fasterai.sparse.partners import Partner, kept_outputs

__all__ = ["ChannelPool", "Pool", "TargetPool", "WeightScores", "by_pool", "channel_pools", "warn_of_rounding"]

#: Multiples of channels that kernels are written for, on a CPU and a GPU alike, and how many a pool has to have for it.
ROUND_TO, ENOUGH = 8, 32
OVER: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
}


class WeightScores:
    """The scores of targets' weights, each worked out once where several pools want them.

    Args:
        score: Target -> scores of the shape of its weight.
        reducer: `mean` or `sum` over the weights of a unit.
    """

    def __init__(self, score: Callable[[Target], Tensor], reducer: str) -> None:
        self.of = score
        self.reducer = reducer
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

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The weight or vector of a name as its mask sees it: detached, in its layout's view, looked up anew each time."""

    @abstractmethod
    def score(self, scores: WeightScores) -> Tensor:
        """The scores of its units."""

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
        return self.granularity.reduce(scores.of(self.target), self.target.layout, scores.reducer)

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


@dataclass(frozen=True)
class ChannelPool(Pool):
    """Coupled channels of one kind.

    Attributes:
        name: The first weight that makes them.
        targets: The weights that they run through.
        makers: Those of them that make the channels.
        layout: That of the first maker, where the channels are its outputs.
        shape: `(channels,)`.
        group: Which indices of which parameters belong to each channel.
        granularity: How the scores of a channel's slices become one, and whether they are held against the group's mean.
        parameters: Name -> target, for every parameter that the channels run through, vectors included.
    """

    name: str
    targets: tuple[Target, ...]
    makers: frozenset[str]
    layout: Layout
    shape: tuple[int, ...]
    group: Group
    granularity: Coupled
    parameters: Mapping[str, Target] = field(repr=False)

    @property
    def trains(self) -> bool:
        """Whether all that its channels run through trains, biases and norms included."""
        return all(t.parameter.requires_grad for t in self.parameters.values())

    @property
    def weights(self) -> int:
        none = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        gone: dict[str, Tensor] = {}
        for name, mask in self.masks(none):
            gone[name] = gone.get(name, torch.zeros_like(self.tensor(name), dtype=torch.bool)) | ~mask
        return sum(int(g.sum()) for g in gone.values())

    def step(self, round_to: int | None, first: int | None = None) -> int:
        """By default a multiple that suits the hardware, unless there were few; heads count by their width."""
        if round_to is None:
            round_to = ROUND_TO if (first or self.count) >= ENOUGH else 1
        width = min((i.shape[1] for (n, _), i in self.group.places.items() if n in self.makers), default=1)
        return round_to // math.gcd(round_to, width)

    def tensor(self, name: str) -> Tensor:
        return self.parameters[name].parameter.detach()

    def score(self, scores: WeightScores) -> Tensor:
        scored = {t.name: t for t in self.targets}
        parts = []
        for (name, d), indices in self.group.places.items():
            if name in scored:
                along = scores.along(scored[name], d)
                per_channel = along[torch.as_tensor(indices, device=along.device)]
                parts.append((per_channel.mean(1) if scores.reducer == "mean" else per_channel.sum(1)).to(self.device))
        return OVER[self.granularity.over](torch.stack(parts))

    def on_one_scale(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        if not self.granularity.relative:
            return scores
        kept = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep
        mean = (scores.abs() * kept).sum() / kept.sum()
        return torch.where(mean > 0, scores / mean, scores)

    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, d, kept in self._kept(keep):
            dims = self.parameters[name].parameter.dim()
            if dims > 1:
                yield name, kept.view([-1 if i == d else 1 for i in range(dims)])

    def vectors(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, _, kept in self._kept(keep):
            if self.parameters[name].parameter.dim() == 1:
                yield name, kept

    def _kept(self, keep: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, dimension, which of its indices stay)."""
        for (name, d), indices in self.group.places.items():
            if name in self.parameters:
                parameter = self.parameters[name].parameter
                kept = torch.ones(parameter.shape[d], dtype=torch.bool, device=parameter.device)
                where = torch.as_tensor(indices, device=parameter.device)
                kept[where] = keep.to(parameter.device)[:, None].expand(where.shape)
                yield name, d, kept

    def cut(self, cut: Cut, fresh: Mapping[str, Target]) -> ChannelPool:
        stay = self._staying(cut)
        places = {}
        for place, indices in self.group.places.items():
            if place[0] in self.parameters and place[0] not in fresh:
                continue
            left = indices[stay]
            # A place's indices move up where others before them have gone.
            places[place] = np.searchsorted(cut[place], left) if place in cut else left
        return replace(
            self,
            targets=tuple(fresh[t.name] for t in self.targets if t.name in fresh),
            layout=_layout(fresh.get(self.name), int(stay.sum())),
            shape=(int(stay.sum()),),
            group=Group(places, self.group.name),
            parameters={n: fresh[n] for n in self.parameters if n in fresh},
        )

    def cut_keep(self, keep: Tensor, cut: Cut, after: Pool) -> Tensor:
        return keep[torch.as_tensor(self._staying(cut), device=keep.device)]

    def _staying(self, cut: Cut) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which channels have all of their indices left."""
        stay = np.ones(self.shape, np.bool_)
        for place, indices in self.group.places.items():
            if place in cut:
                stay &= np.isin(indices, cut[place]).all(1)
        return stay


def channel_pools(model: nn.Module, graph: ChannelGraph, granularity: Coupled) -> tuple[ChannelPool, ...]:
    """The coupled channels of a model, as pools."""
    known = {t.name: t for t in all_targets(unwrap(model))}
    return tuple(_channel_pool(group, graph, known, granularity) for group in graph.groups)


def _channel_pool(group: Group, graph: ChannelGraph, known: Mapping[str, Target], granularity: Coupled) -> ChannelPool:
    parameters = {n: known[n] for n in dict.fromkeys(n for n, _ in group.places) if n in known}
    matrices = [t for t in parameters.values() if t.parameter.dim() > 1]
    scored = [t for t in matrices if t.kind != "other"] or matrices or list(parameters.values())
    making = {n for n, d in group.places if (n, d) not in graph.readers and n in parameters}
    makers = frozenset(t.name for t in scored if t.name in making) or frozenset(t.name for t in scored)
    first = next(t for t in scored if t.name in makers)
    return ChannelPool(
        name=group.name,
        targets=tuple(scored),
        makers=makers,
        layout=_layout(first, group.channels),
        shape=(group.channels,),
        group=group,
        granularity=granularity,
        parameters=parameters,
    )


def _layout(maker: Target | None, channels: int) -> Layout:
    """The maker's layout where each of its outputs is one channel, a bare row of channels elsewhere."""
    if maker is not None and maker.layout.size("out") == channels:
        return maker.layout
    return Layout((channels,), (frozenset({"out"}),))


def warn_of_rounding(asked: int, gone: int, count: int, round_to: int | None) -> None:
    """Say that rounding keeps channels that were to go, if it is more than one in a hundred of all."""
    if asked - gone > count / 100:
        where = f"in groups of at least {ENOUGH} " if round_to is None else ""
        warn(
            f"{asked / count:.1%} of the channels were to go, {gone / count:.1%} do: {where}the kept channels are rounded up "
            f"to multiples of {round_to or ROUND_TO}; pass round_to=1 for exact counts"
        )


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
