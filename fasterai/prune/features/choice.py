"""Choice of the features that a network keeps of its inputs: scores of all of them on one scale, and which go."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Coupled
from fasterai.core.selection import Scores, TensorScores
from fasterai.core.types import Layout, Limits
from fasterai.graph.channels import ChannelGraph
from fasterai.graph.labels import Flags
from fasterai.model.names import unwrap
from fasterai.model.targets import all_targets
from fasterai.prune.features.embeddings import CATEGORIES, Embedding
from fasterai.units.channel_pools import ChannelPool, channel_pools
from fasterai.units.choice import Goal, choose, limits_of
from fasterai.units.evidence import Source
from fasterai.units.scoring import Scorer

__all__ = ["FeatureSet", "Scoring", "choose_features", "choose_hidden", "score_features"]

#: Evidence that is in the weights alone, or in earlier ones.
OF_WEIGHTS = frozenset({"initial", "previous"})


class Scoring(NamedTuple):
    """Way to score channels and features.

    Attributes:
        criterion: How much a weight matters.
        source: What evidence is computed from.
        over: How the scores of several weights that read a feature make one: `sum`, `mean` or `max`.
    """

    criterion: Criterion
    source: Source
    over: str

    def __call__(self, model: nn.Module, pools: Sequence[ChannelPool]) -> list[Scores]:
        """Return the unit scores of each pool."""
        weights = [t for t in all_targets(unwrap(model)) if t.parameter.dim() > 1]
        return Scorer(self.criterion, self.granularity(), self.source, weights)(model, pools, {})

    def granularity(self, relative: bool = True) -> Coupled:
        """Return the granularity of channels; scores that are not relative are on one scale over all groups."""
        return Coupled(self.over, relative=relative)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FeatureSet:
    """Features that compete: those of one set of inputs that are read alike, or the categories of a tabular model.

    Attributes:
        name: The name of the set, for messages.
        scores: How much each matters, 0 or more.
        places: Argument -> the indices of each feature there, `(features, indices per feature)`.
        group: The position of its group in the graph; None for categories.
    """

    name: str
    scores: Tensor
    places: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    group: int | None = None

    def is_of(self, forced: Mapping[str, Sequence[int]]) -> Tensor:
        """Return flags of the features that have an index among given ones of an argument."""
        found = torch.zeros(len(self.scores), dtype=torch.bool)
        for argument, indices in self.places.items():
            found |= torch.as_tensor(np.isin(indices, list(forced.get(argument, ()))).any(1))
        return found


def score_features(
    model: nn.Module, graph: ChannelGraph, embeddings: Sequence[Embedding], scoring: Scoring
) -> list[FeatureSet]:
    """Score the features of all inputs that may lose some: the sum of the scores of the weights that read them.

    A category is read through its embedding: the scores of its columns are summed, each times the root of the mean square of
    what the embedding gives it, where the criterion looks at weights alone.
    """
    pools = channel_pools(model, graph, scoring.granularity(relative=False))
    entering = [i for i, group in enumerate(graph.groups) if group.inputs]
    inside = [g for one in embeddings for g in one.groups]
    asked = [pools[i] for i in entering] + [_read_alone(pools[g], graph) for g in inside]
    values = [s.tensor().detach().float().cpu() for s in scoring(model, asked)] if asked else []
    found = []
    for i, scores in zip(entering, values, strict=False):
        group = graph.groups[i]
        found.append(FeatureSet(group.name, scores, {argument: where for (argument, _), where in group.inputs.items()}, i))
    if embeddings:
        by_group = dict(zip(inside, values[len(entering) :], strict=True))
        scores = torch.stack([_of_embedding(one, by_group, scoring.criterion.needs <= OF_WEIGHTS) for one in embeddings])
        found.append(FeatureSet(CATEGORIES, scores, {CATEGORIES: np.arange(len(embeddings))[:, None]}))
    return found


def _of_embedding(one: Embedding, scores: Mapping[int, Tensor], is_of_weights: bool) -> Tensor:
    parts = [scores[g] * (size.cpu() if is_of_weights else 1) for g, size in zip(one.groups, one.sizes, strict=True)]
    return torch.stack([part.sum() for part in parts]).sum()


def _read_alone(pool: ChannelPool, graph: ChannelGraph) -> ChannelPool:
    """Return a pool that is scored by the weights that read its channels, not by those that make them."""
    readers = tuple(t for t in pool.targets if any((t.name, d) in graph.readers for d in range(t.parameter.dim())))
    return replace(pool, targets=tuple(t for t in readers if not t.name.startswith("embeds.")) or pool.targets)


def choose_features(
    features: Sequence[FeatureSet], context: Context, count: int, forced: Mapping[str, Sequence[int]]
) -> list[Flags]:
    """Choose the features to keep, so that `count` go; those that are forced stay.

    Raises:
        ValueError: The forced ones leave too few to go.
    """
    flags = [one.is_of(forced) for one in features]
    every = sum(len(one.scores) for one in features)
    if count > every - sum(int(f.sum()) for f in flags):
        rest = every - sum(int(f.sum()) for f in flags)
        raise ValueError(f"sparsity must leave the features of keep, got one that takes {count} of the {rest} others")
    top = max(float(one.scores.max()) for one in features) + 1
    scores = [TensorScores(one.name, one.scores + top * f) for one, f in zip(features, flags, strict=True)]
    layouts = [Layout((len(one.scores),), (frozenset({"out"}),)) for one in features]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only min_keep keeps units")  # its repair is none for features
        kept = context(scores, layouts, count / every, Limits(min_keep=1))
    if lost := [one.name for one, keep, f in zip(features, kept, flags, strict=True) if bool((f & ~keep).any())]:
        raise ValueError(
            f"sparsity must leave the features of keep, got one that takes some of {lost[0]}; pass context='global'"
        )
    return [keep.cpu().numpy() for keep in kept]


def choose_hidden(
    model: nn.Module, graph: ChannelGraph, left_out: Collection[int], goal: Goal, scoring: Scoring, round_to: int | None
) -> dict[int, Flags]:
    """Choose the hidden channels to keep: position of a group in the graph -> flags of its channels.

    Args:
        model: The model, whose given-up features are zero already.
        graph: Its channel graph.
        left_out: Positions of groups that are not to be chosen from.
        goal: The context and the share to remove.
        scoring: How they are scored.
        round_to: As for the `Pruner`.

    Raises:
        ValueError: No hidden channel may go.
    """
    hidden = [i for i, group in enumerate(graph.groups) if not group.inputs and i not in left_out]
    if not hidden:
        raise ValueError(f"hidden must be 0 for a model without channels that may be removed, got {goal.sparsity}")
    every = channel_pools(model, graph, scoring.granularity())
    pools = [every[i] for i in hidden]
    kept = choose(pools, scoring(model, pools), goal, limits_of(pools, round_to=round_to), by=scoring.criterion)
    return dict(zip(hidden, (keep.cpu().numpy() for keep in kept), strict=True))
