"""Makers of pools: for each granularity, the units that it makes of the targets, and the example inputs that it needs for it.

To add units that span several parameters: a `Maker`, registered for its granularity with `maker_of`, and its `Pool`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import singledispatch
from typing import Any, ClassVar

from torch import nn

from fasterai.core.checks import warn
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.loop import Fit
from fasterai.core.types import Target
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.features import FeaturesLike, check_features, check_may_go
from fasterai.model.inputs import arguments, batch_inputs
from fasterai.model.norms import Flow, watch
from fasterai.model.targets import Selection
from fasterai.units.channel_pools import ChannelPool, channel_pools
from fasterai.units.partners import Partner, find_partners, without_outputs
from fasterai.units.pool import Pool
from fasterai.units.target_pools import TargetPool

__all__ = ["ChannelMaker", "Maker", "TargetMaker", "maker_of"]


class Maker(ABC):
    """The maker of the pools of a granularity.

    Attributes:
        is_seen: True if the model has been followed with example inputs.
        needs_inputs: True if there are no pools before that.
        rounds_by_default: True if kept units are rounded up to a multiple although the user gives none.
    """

    needs_inputs: ClassVar[bool] = False
    rounds_by_default: ClassVar[bool] = False
    is_seen: bool = False

    @abstractmethod
    def look(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Follow the model with example inputs, and note its data flow.

        Raises:
            ValueError: The model does not run on them, or cannot be followed.
        """

    @abstractmethod
    def look_at_batch(self, model: nn.Module, fit: Fit) -> None:
        """Follow the model with the first batch of a training; it may be a part of the model that is trained.

        Raises:
            ValueError: The pools need the data flow, and the batch does not show it.
        """

    @abstractmethod
    def make(self, model: nn.Module, selection: Selection) -> tuple[Selection, tuple[Pool, ...]]:
        """Return the targets and their pools, as far as the data flow is known; parameters left out come with the reason.

        Raises:
            ValueError: There is no unit that may be removed; the message says why.
        """

    def take_features(self, features: FeaturesLike) -> None:
        """Take dimensions of inputs whose indices are to be units too.

        Raises:
            ValueError: The granularity has no such units.
        """
        raise ValueError(f"features must be left out but for granularity 'coupled', got {features!r}")

    def check_seen(self) -> None:
        """Refuse to go on without example inputs, if they are needed.

        Raises:
            ValueError: There are no pools, since no example inputs have been given.
        """


class TargetMaker(Maker):
    """The maker of one pool per target; example inputs show norms that read a target, and targets that make the output."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self.flow: Flow | None = None

    @property
    def is_seen(self) -> bool:  # type: ignore[override]
        return self.flow is not None

    def look(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.flow = watch(model, inputs)

    def look_at_batch(self, model: nn.Module, fit: Fit) -> None:
        whole = fit.model or model
        try:
            assert fit.batch is not None
            self.flow = watch(whole, arguments(whole, fit.batch), part=model)
        except ValueError as error:
            warn(f"the loop's batch does not show the data flow ({error}); pass example_inputs=")

    def make(self, model: nn.Module, selection: Selection) -> tuple[Selection, tuple[Pool, ...]]:
        if self.flow is not None:
            selection = without_outputs(selection, self.granularity, self.flow)
        partners: dict[str, list[Partner]] = {t.name: [] for t in selection.targets}
        for partner in find_partners(model, selection, self.granularity, self.flow):
            partners[partner.target].append(partner)
        pools = (TargetPool(t, self.granularity, tuple(partners[t.name])) for t in selection.targets)
        return selection, tuple(pools)


class ChannelMaker(Maker):
    """The maker of one pool per group of coupled channels; example inputs show the groups."""

    needs_inputs = True
    rounds_by_default = True
    features: FeaturesLike = None  # pickles of earlier versions have none

    def __init__(self, granularity: Coupled) -> None:
        self.granularity = granularity
        self.graph: ChannelGraph | None = None

    def look(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        graph = channel_graph(model, inputs, features=self.features)
        check_may_go(self.features, model, inputs, graph.inputs)
        self.graph = graph

    def take_features(self, features: FeaturesLike) -> None:
        self.features = check_features(features)

    def look_at_batch(self, model: nn.Module, fit: Fit) -> None:
        self.look(model, batch_inputs(model, fit))

    def make(self, model: nn.Module, selection: Selection) -> tuple[Selection, tuple[Pool, ...]]:
        graph, self.graph = self.graph, None  # its pools are cut with the model from now on, it is not
        if graph is None:
            return selection, ()
        chosen = {t.name for t in selection.targets}
        found = channel_pools(model, graph, self.granularity)
        raw = set() if selection.named else {t.name for t in selection.targets if t.kind == "other"}
        pools = tuple(p for p in found if p.makers & chosen or _is_read_by(p, chosen) or _makes(p, graph) & raw)
        if not pools:
            why = "; ".join(f"{t.name}: {_why_pinned(t, graph)}" for t in selection.targets[:3])
            raise ValueError(f"targets must make channels that can be removed, got none that do ({why})")
        self.is_seen = True
        weights = {t.name: t for p in pools for t in p.targets}
        lengths = {t.name for t in selection.targets if _goes_along(t, pools)}
        return Selection(tuple(weights.values()), _left_out(selection, {*weights, *lengths}, graph), selection.named), pools

    def check_seen(self) -> None:
        if not self.is_seen:
            raise ValueError(
                "example_inputs must be given for granularity 'coupled', got None: the channels are found by following them "
                "through the model; a callback of fastai or Lightning has a batch for it"
            )


def _makes(pool: ChannelPool, graph: ChannelGraph) -> set[str]:
    """Return the names of all parameters that make a pool's channels, such as raw ones beside embeddings."""
    return {name for name, d in pool.group.places if (name, d) not in graph.readers}


def _is_read_by(pool: ChannelPool, chosen: Collection[str]) -> bool:
    """Tell if a pool holds features of an input, and a chosen target reads them."""
    return bool(pool.group.inputs) and any(t.name in chosen for t in pool.targets)


def _left_out(selection: Selection, weights: Collection[str], graph: ChannelGraph) -> dict[str, str]:
    pinned = {t.name: _why_pinned(t, graph) for t in selection.targets if t.name not in weights}
    return {n: why for n, why in {**selection.left_out, **pinned}.items() if n not in weights}


def _goes_along(target: Target, pools: Sequence[ChannelPool]) -> bool:
    """Tell if a weight that scores nothing has its outputs in a group of channels all the same, as a weight norm's has."""
    place = target.name, 1 if target.layout.axes[0] == {"in"} else 0
    return any(place in pool.group.places or place in pool.group.along for pool in pools)


def _why_pinned(target: Target, graph: ChannelGraph) -> str:
    """Return the reason for which the outputs of a target must be kept."""
    outputs = 1 if target.layout.axes[0] == {"in"} else 0
    return graph.pinned.get((target.name, outputs), "its channels may not go")


@singledispatch
def maker_of(granularity: Granularity) -> Maker:
    """Return the maker of the pools of a granularity."""
    return TargetMaker(granularity)


@maker_of.register
def _(granularity: Coupled) -> Maker:
    return ChannelMaker(granularity)
