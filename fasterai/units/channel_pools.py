"""Pools of coupled channels: one pool for each group of channels that several parameters have to lose together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.granularities import Coupled
from fasterai.core.types import Layout, Target
from fasterai.graph.channels import ChannelGraph, Group
from fasterai.model.cuts import Cut, input_place
from fasterai.model.names import unwrap
from fasterai.model.sharded import Place
from fasterai.model.targets import all_targets
from fasterai.units.pool import Pool, WeightScores, at_least_float32, of_living, unseen

__all__ = ["OVER", "ChannelPool", "channel_pools", "warn_of_rounding"]

#: Multiples of channels that kernels are written for, on a CPU and a GPU alike, and how many a pool has to have for it.
ROUND_TO, ENOUGH = 8, 32
OVER: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
}


@dataclass(frozen=True)
class ChannelPool(Pool):
    """A group of coupled channels, whose units are the channels.

    Attributes:
        name: The name of the first weight that makes the channels as its outputs.
        targets: The weights that the channels run through, as outputs of one layer and inputs of the next.
        makers: The names of those weights that make the channels as their outputs.
        layout: The layout of the first maker, or a bare row of channels where one channel is not one of its outputs.
        shape: `(channels,)`.
        group: The indices, in each parameter and dimension, that belong to each channel.
        granularity: The operation that makes one score of a channel's slices, and the choice to divide by the group's mean.
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
    def places(self) -> tuple[Place, ...]:
        return tuple(self.parameters.values())

    @property
    def trains(self) -> bool:
        """True if all parameters that its channels run through train, biases and norms included."""
        return all(t.parameter.requires_grad for t in self.parameters.values())

    @property
    def weights(self) -> int:
        none = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        gone: dict[str, Tensor] = {}
        for name, mask in self.masks(none):
            gone[name] = gone.get(name, torch.zeros_like(self.tensor(name), dtype=torch.bool)) | ~mask
        return sum(int(g.sum()) for g in gone.values())

    def step(self, round_to: int | None, first: int | None = None) -> int:
        """Return the multiple that the number of kept channels is rounded up to.

        By default 8, which suits the hardware, for at least 32 units, and 1 for fewer and for features of an input. A unit may
        be a head of several channels: with a width of 4 channels and `round_to=8`, the number of kept heads is rounded up to a
        multiple of 2.
        """
        if round_to is None:
            round_to = 1 if self.group.inputs else ROUND_TO if (first or self.count) >= ENOUGH else 1
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
        stacked = torch.stack(parts)
        # The largest of parts that are squared later is that of the largest magnitude.
        return OVER[self.granularity.over](stacked.abs() if scores.is_signed and self.granularity.over == "max" else stacked)

    def vectors_of_units(self) -> Tensor:
        scored = {t.name for t in self.targets}
        slices = []
        for (name, d), indices in self.group.places.items():
            if name in scored:
                weight = at_least_float32(self.tensor(name)).movedim(d, 0)
                own = weight[torch.as_tensor(indices, device=weight.device)]
                slices.append(own.reshape(self.count, -1).to(self.device))
        return torch.cat(slices, dim=1)

    def outputs_of_units(self, outputs: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for (name, d), indices in self.group.places.items():
            made = outputs.get(name)
            if made is not None and d == _outputs_dim(self.parameters[name]) and len(made) == self.tensor(name).shape[d]:
                own = made[torch.as_tensor(indices, device=made.device)]
                parts.append(own.reshape(self.count, -1).to(self.device))
        if not parts:
            raise unseen(self.name)
        return of_living(torch.cat(parts, dim=1), self.vectors_of_units())

    @property
    def is_looked_at(self) -> bool:
        return True

    def on_one_scale(self, scores: Tensor, scale: Tensor) -> Tensor:
        return torch.where(scale > 0, scores / scale, scores) if self.granularity.relative else scores

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
        """Yield (parameter, dimension, flags of the indices to keep along it) for each place that the channels run through."""
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
        along = {p: np.searchsorted(cut[p], i[stay]) if p in cut else i[stay] for p, i in self.group.along.items()}
        inputs = {}
        for place, indices in self.group.inputs.items():
            now = cut.get(input_place(*place))
            inputs[place] = indices[stay] if now is None else np.searchsorted(now, indices[stay])
        return replace(
            self,
            targets=tuple(fresh[t.name] for t in self.targets if t.name in fresh),
            layout=_layout(fresh.get(self.name), int(stay.sum())),
            shape=(int(stay.sum()),),
            group=replace(self.group, places=places, inputs=inputs, along=along),
            parameters={n: fresh[n] for n in self.parameters if n in fresh},
        )

    def cut_keep(self, keep: Tensor, cut: Cut, after: Pool) -> Tensor:
        return keep[torch.as_tensor(self._staying(cut), device=keep.device)]

    def _staying(self, cut: Cut) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return flags of the channels that have all of their indices left after a cut."""
        stay = np.ones(self.shape, np.bool_)
        for place, indices in self.group.places.items():
            if place in cut:
                stay &= np.isin(indices, cut[place]).all(1)
        return stay


def channel_pools(model: nn.Module, graph: ChannelGraph, granularity: Coupled) -> tuple[ChannelPool, ...]:
    """Make a pool of each group of coupled channels of a model."""
    known = {t.name: t for t in all_targets(unwrap(model))}
    return tuple(_channel_pool(group, graph, known, granularity) for group in graph.groups)


def _channel_pool(group: Group, graph: ChannelGraph, known: Mapping[str, Target], granularity: Coupled) -> ChannelPool:
    parameters = {n: known[n] for n in dict.fromkeys(n for n, _ in group.places) if n in known}
    matrices = [t for t in parameters.values() if t.parameter.dim() > 1]
    scored = [t for t in matrices if t.kind != "other"] or matrices or list(parameters.values())
    making = {n for n, d in group.places if (n, d) not in graph.readers and n in parameters and not _reads(parameters[n], d)}
    makers = frozenset(t.name for t in scored if t.name in making)
    if not (makers or group.inputs):
        makers = frozenset(t.name for t in scored)
    first = next((t for t in scored if t.name in makers), None)
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


def _reads(target: Target, d: int) -> bool:
    """Tell if a dimension of what a layer makes its weight of is that of its inputs."""
    axes = target.layout.axes
    return bool(target.aliases) and target.kind != "embedding" and len(axes) == target.parameter.dim() and axes[d] == {"in"}


def _outputs_dim(target: Target) -> int:
    """Return the dimension of a weight that runs over its outputs."""
    return 1 if target.layout.axes[0] == {"in"} else 0


def _layout(maker: Target | None, channels: int) -> Layout:
    """Return the maker's layout if each of its outputs is one channel, else the layout of a bare row of channels."""
    if maker is not None and maker.layout.size("out") == channels:
        return maker.layout
    return Layout((channels,), (frozenset({"out"}),))


def warn_of_rounding(asked: int, gone: int, count: int, round_to: int | None) -> None:
    """Warn if rounding keeps more than one in a hundred of all channels that were to be removed."""
    if round_to != 1 and asked - gone > count / 100:
        where = f"in groups of at least {ENOUGH} " if round_to is None else ""
        warn(
            f"asked to prune {asked:,} of {count:,} channels, pruned {gone:,} ({gone / count:.1%}): {where}kept channels are "
            f"rounded up to multiples of {round_to or ROUND_TO}; pass round_to=1 for exact counts"
        )
