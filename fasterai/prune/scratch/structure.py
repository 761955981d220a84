"""Structure of a network in a search: its groups of channels, wider, chosen for a budget, and cut."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.analyze.cost import Cost, cost
from fasterai.core.checks import warn
from fasterai.core.contexts import global_
from fasterai.core.granularities import Coupled
from fasterai.core.selection import TensorScores
from fasterai.display import Brief
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.labels import Flags
from fasterai.model.supported import check_runs, said
from fasterai.prune.check import Sound, largest_sound, plan_of
from fasterai.prune.choice.budget import REACHED, Budget, fit_budget
from fasterai.prune.goal import free_pools
from fasterai.prune.scratch.widening import widen_
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan
from fasterai.units.channel_pools import ChannelPool, channel_pools
from fasterai.units.choice import Goal, choose, limits_of

__all__ = ["Structure", "check_budget", "choose_channels", "cut_", "find_structure", "share_of", "warn_of_share", "widened"]

Inputs = tuple[Any, ...]


@dataclass(frozen=True, repr=False)
class Structure(Brief):
    """A network with the groups of its channels that may go.

    Attributes:
        model: The network.
        inputs: Its positional arguments.
        graph: Its channel graph, with these groups alone.
        pools: The groups as pools of channels.
    """

    model: nn.Module
    inputs: Inputs
    graph: ChannelGraph
    pools: tuple[ChannelPool, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Group's name -> number of its channels."""
        return {pool.name: pool.count for pool in self.pools}


def find_structure(model: nn.Module, inputs: Inputs, ignored: Iterable[str], exact: bool) -> Structure:
    """Find the groups of channels of a network that may go.

    Raises:
        ValueError: There are none, or the network cannot be followed.
    """
    graph = channel_graph(model, inputs, exact)
    pools = free_pools(channel_pools(model, graph, Coupled()), graph, frozenset(ignored))
    return Structure(model, inputs, replace(graph, groups=tuple(pool.group for pool in pools)), pools)


def widened(of: Structure, factor: float, ignored: Iterable[str], exact: bool) -> Structure:
    """Return a wider copy of a network: each group has `round(factor * channels)`.

    Raises:
        ValueError: The network does not run with more channels.
    """
    model = copy.deepcopy(of.model)
    wanted = {name: round(factor * count) for name, count in of.counts.items()}
    repair = "pass a wider network as model, and this one as dense="
    try:
        widen_(model, of.graph, {name: wanted[name] - count for name, count in of.counts.items()})
        check_runs(model, of.inputs)
    except Exception as error:
        raise ValueError(
            f"expand must be 1 for a network whose code fixes its widths, got {factor:g}: {said(error)}; {repair}"
        ) from error
    found = find_structure(model, of.inputs, ignored, exact)
    if wrong := [name for name, count in wanted.items() if found.counts.get(name) != count]:
        has = found.counts.get(wrong[0], "no group")
        raise ValueError(
            f"expand must be 1 for a network that does not follow, got {factor:g}, where {wrong[0]} should have "
            f"{wanted[wrong[0]]} channels and has {has}; {repair}"
        )
    return found


def check_budget(of: Structure, budget: Budget, dense: nn.Module, whole: Cost, round_to: int) -> None:
    """Refuse a budget that a network meets with all of its channels, or exceeds with one of each group.

    Raises:
        ValueError: It does.
    """
    share = share_of(budget, cost(of.model, of.inputs), whole)
    if share <= budget.share:
        raise ValueError(f"budget must be below what the searched network has, {share:.3f} of the dense one, got {budget!r}")
    equal = torch.zeros(sum(of.counts.values()))
    choose_channels(of, equal, equal, budget, dense, round_to)


def share_of(budget: Budget, small: Cost, dense: Cost) -> float:
    """Return the share of the dense network's cost that another one has, in what the budget is of."""
    found, whole = (one.macs if budget.kind == "macs" else one.parameters for one in (small, dense))
    return found / max(1, whole)


def choose_channels(
    of: Structure, gates: Tensor, averages: Tensor, budget: Budget, dense: nn.Module, round_to: int
) -> list[Flags]:
    """Choose the channels with the highest gates of the whole network, as many as a budget allows, one of each group at least.

    Args:
        of: The searched network.
        gates: Its gates, group by group, `(N,)`.
        averages: The order of those that are equal, `(N,)`.
        budget: The share of `dense` that may be left.
        dense: The network that it is a share of.
        round_to: A multiple that the channels of a group are rounded up to.
    """
    ranks = _ranks(gates, averages)
    scores = [
        TensorScores(pool.name, part.reshape(pool.shape))
        for pool, part in zip(of.pools, torch.split(ranks, [pool.count for pool in of.pools]), strict=True)
    ]
    limits = limits_of(of.pools, round_to=round_to)

    def kept(sparsity: float) -> list[Flags]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `min_keep`: most choices are discarded
            return [keep.cpu().numpy() for keep in choose(of.pools, scores, Goal(global_, sparsity), limits)]

    return fit_budget(of.model, of.graph, of.inputs, kept, budget, dense)


def _ranks(gates: Tensor, averages: Tensor) -> Tensor:
    """Rank gates from the lowest, 0, to the highest; equal ones by their averages, and then by position.

    >>> _ranks(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.3, 0.9, 0.1])).tolist()
    [1.0, 2.0, 0.0]
    """
    order = np.lexsort((averages.numpy(), gates.numpy()))
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[torch.from_numpy(order)] = torch.arange(len(order), dtype=torch.float64)
    return ranks


def cut_(of: Structure, kept: Sequence[Flags]) -> tuple[Plan, Sound]:
    """Take the other channels out of a network, whatever it computes then.

    Returns:
        The plan, and which channels stay; those of a group without which the network fails are put back.
    """
    sound = largest_sound(of.model, of.graph, kept, of.inputs, exact=False)
    plan = plan_of(of.model, of.graph, sound)
    Surgery(of.model, plan)
    return plan, sound


def warn_of_share(budget: Budget, share: float, refused: Mapping[str, str]) -> None:
    """Warn if what is left is above the budget, or more than 1 % of the dense network below it."""
    if budget.share - REACHED <= share <= budget.share:
        return
    why = f"channels of {', '.join([*refused][:3])} cannot go" if refused else "one channel more would exceed it"
    warn(f"{budget!r} was asked for, {share:.4f} is left: {why}")
