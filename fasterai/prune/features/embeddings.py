"""Categories of fastai's tabular models: each has an embedding, and goes with all of it.

`TabularModel` looks column i of `x_cat` up in `embeds[i]`. No weight is shared between columns, so that leaving an entry of the
list out, with its columns of the layers behind, changes nothing once those columns are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.graph.channels import ChannelGraph, Group, Place
from fasterai.graph.labels import Array
from fasterai.model.names import unwrap
from fasterai.prune.surgery.operate import operate
from fasterai.prune.surgery.plan import make_plan

__all__ = ["CATEGORIES", "Embedding", "drop_embeddings_", "embeddings_of", "is_tabular", "kept_embeddings"]

#: The argument of fastai's tabular models that holds the categories.
CATEGORIES = "x_cat"


@dataclass(frozen=True)
class Embedding:
    """Category of a tabular model: its columns in the layers behind.

    Attributes:
        index: Its place in `embeds`, which is that in `x_cat`.
        groups: Positions in the graph's groups of the channels that its embedding makes.
        sizes: The root of the mean square of each channel of each of these groups, over the categories.
    """

    index: int
    groups: tuple[int, ...]
    sizes: tuple[Tensor, ...]


def is_tabular(model: nn.Module) -> bool:
    """Tell if a model is fastai's `TabularModel`; fastai is not imported for it."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(unwrap(model)).__mro__}
    return ("fastai.tabular.model", "TabularModel") in kinds


def embeddings_of(model: nn.Module, graph: ChannelGraph) -> list[Embedding]:
    """Find the categories of a tabular model, with the channels that each of them makes.

    Raises:
        ValueError: Channels of an embedding are pinned, so that its columns are not known.
    """
    found = []
    for i, embedding in enumerate(unwrap(model).embeds):  # type: ignore[arg-type]
        place = (f"embeds.{i}.weight", 1)
        groups = tuple(g for g, group in enumerate(graph.groups) if place in group.places)
        known = sum(graph.groups[g].places[place].size for g in groups)
        if known != embedding.weight.shape[1]:
            why = graph.pinned.get(place, "its channels are read by what fixes their number")
            raise ValueError(f"features must be without {CATEGORIES} for this model, since embeds.{i} has to stay: {why}")
        found.append(Embedding(i, groups, tuple(_sizes(embedding.weight, graph.groups[g].places[place]) for g in groups)))
    return found


@torch.no_grad()
def _sizes(table: Tensor, indices: Array) -> Tensor:
    root = table.detach().float().pow(2).mean(0).sqrt()
    return root[torch.as_tensor(indices, device=table.device)].mean(1)


def drop_embeddings_(model: nn.Module, graph: ChannelGraph, embeddings: Sequence[Embedding], gone: Sequence[int]) -> None:
    """Remove categories: their entries of the list, and their columns in the layers behind, which have to be zero.

    Args:
        model: The tabular model; changed in place.
        graph: Its channel graph.
        embeddings: All of its categories.
        gone: The places of those to remove.
    """
    inner, tables = unwrap(model), {f"embeds.{i}.weight" for i in gone}
    groups = {g for one in embeddings if one.index in gone for g in one.groups}
    behind = [replace(group, places=_without(group.places, tables), name=group.name) for group in graph.groups]
    kept = [np.full(group.channels, g not in groups) for g, group in enumerate(graph.groups)]
    operate(inner, make_plan(inner, replace(graph, groups=tuple(map(_or_empty, behind, graph.groups))), kept))
    _keep(inner, [i for i in range(len(embeddings)) if i not in gone])


def _keep(model: Any, indices: Sequence[int]) -> None:
    tables = model.embeds
    model.embeds = nn.ModuleList(tables[i] for i in indices)
    model.n_emb = sum(tables[i].embedding_dim for i in indices)


@contextmanager
def kept_embeddings(model: Any, keep: Sequence[int], size: int) -> Iterator[None]:
    """Keep some of the embeddings of a tabular model; if an error is raised inside, it has them all again.

    Args:
        model: Any model; one that is not tabular, or has another number of embeddings than `size`, is unchanged.
        keep: The places of those to keep.
        size: Their number.
    """
    if not is_tabular(model) or len(model.embeds) != size:
        yield
        return
    before = model.embeds, model.n_emb
    _keep(model, keep)
    try:
        yield
    except BaseException:
        model.embeds, model.n_emb = before
        raise


def _without(places: Mapping[Place, Array], tables: set[str]) -> dict[Place, Array]:
    return {place: indices for place, indices in places.items() if place[0] not in tables}


def _or_empty(behind: Group, whole: Group) -> Group:
    """Return a group without the tables, unless it has no other place: then nothing of it is cut."""
    return behind if behind.places else whole
