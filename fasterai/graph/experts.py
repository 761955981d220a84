"""Mixtures of experts in a network: which slices of which parameters are one expert, and which layer gates them.

The labels of the channel graph tell it: the outputs of a gate's layer run through a softmax, or a choice of the highest, and
meet the first dimension of stacks (expert, out, in). So any form of the product is known that the graph's rules know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fasterai.display import Shown, Table, counted
from fasterai.graph.channels import ChannelGraph, Group, Place, followed
from fasterai.graph.labels import Array, Components
from fasterai.graph.rules import Trace, Value

__all__ = ["ExpertGraph", "expert_graph"]

#: Dimensions of a parameter that holds matrices of several experts.
STACK = 3


@dataclass(frozen=True, repr=False)
class ExpertGraph(Shown):
    """Mixtures of experts in a network.

    Attributes:
        graph: The channel graph with a group for each mixture, whose channels are its experts.
        gates: Name of a mixture -> the parameters whose outputs are its gate, each with the dimension of its outputs.
        stacks: Name of a mixture -> the parameters that hold its experts' matrices.
        top_k: Name of a mixture -> how many experts an input is sent to, where the gate chooses some.
    """

    graph: ChannelGraph
    gates: Mapping[str, tuple[Place, ...]]
    stacks: Mapping[str, tuple[str, ...]]
    top_k: Mapping[str, int]

    @property
    def experts(self) -> dict[str, int]:
        """Name of a mixture -> number of its experts. A mixture is named after its gate's weight."""
        return {g.name: g.channels for g in self.graph.groups}

    def _line(self) -> str:
        return f"<ExpertGraph: {counted(sum(self.experts.values()), 'expert')} in {counted(len(self.experts), 'mixture')}>"

    def _parts(self) -> Iterator[Table | str]:
        body = [
            (name, str(count), str(self.top_k.get(name, "all")), ", ".join(self.stacks[name]))
            for name, count in self.experts.items()
        ]
        yield Table(("mixture", "experts", "chosen", "stacks"), body) if body else "no mixture of experts"


def expert_graph(model: nn.Module, inputs: tuple[Any, ...]) -> ExpertGraph:
    """Find the mixtures of experts of a network whose experts are stacked: parameters (expert, out, in), in any order of axes.

    Args:
        model: The model, wrapped or not; not changed.
        inputs: Its positional arguments.

    Raises:
        TypeError: The model is no module.
        ValueError: It is lazy, does not run on the inputs, or cannot be exported.
    """
    graph, trace, components, weights = followed(model, inputs, experts=True)
    gated = _numbers(trace.gates, components)
    found = [g for g in graph.groups if _numbers_of(g, components, weights) <= gated and _stacks(g, weights)]
    groups = [replace(g, name=_gates(g, trace)[0][0]) for g in found if _gates(g, trace)]
    chosen = [(_numbers([dim], components), count) for dim, count in trace.routes.values()]
    top_k = {g.name: max((k for of, k in chosen if _numbers_of(g, components, weights) <= of), default=0) for g in groups}
    return ExpertGraph(
        replace(graph, groups=tuple(groups), pinned={}),
        {g.name: _gates(g, trace) for g in groups},
        {g.name: _stacks(g, weights) for g in groups},
        {name: k for name, k in top_k.items() if k},
    )


def _numbers(dims: list[Any], components: Components) -> set[int]:
    return {int(n) for dim in dims if isinstance(dim, np.ndarray) for n in np.unique(components.numbers(dim))}


def _numbers_of(group: Group, components: Components, weights: Mapping[str, Value]) -> set[int]:
    """Return the numbers of the components that are a group's channels."""
    (name, d), indices = next(iter(group.places.items()))
    labels: Array = np.asarray(weights[name].dims[d])
    return _numbers([labels[indices.ravel()]], components)


def _stacks(group: Group, weights: Mapping[str, Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n, _ in group.places if weights[n].is_weight and len(weights[n].shape) >= STACK))


def _gates(group: Group, trace: Trace) -> tuple[Place, ...]:
    return tuple(place for place in group.places if place in trace.layers and place not in trace.readers)
