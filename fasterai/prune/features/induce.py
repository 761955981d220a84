"""Induced feature selection: the inputs that a network can do without, taken out of it and out of its data.

Inspired by Hubens et al. 2023 (Induced Feature Selection by Structured Pruning, arXiv 2303.10999), of which the abstract was
read: structured sparsity is imposed on weights, the inputs that only zero weights read are tracked back, and both are removed.
The scores over all layers that read an input, the exact counts and the treatment of categories are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.analyze.comparison import compare
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_choice, check_count, check_fraction, from_catalogue, warn
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.features import FeaturesLike
from fasterai.graph.inputs import input_tensors
from fasterai.model.inputs import positional
from fasterai.model.names import unwrap
from fasterai.model.outputs import check_same
from fasterai.model.supported import check_whole
from fasterai.prune.check import largest_sound
from fasterai.prune.features.choice import FeatureSet, Scoring, choose_features, choose_hidden, score_features
from fasterai.prune.features.embeddings import CATEGORIES, Embedding, drop_embeddings_, embeddings_of
from fasterai.prune.features.front import SelectedModel
from fasterai.prune.features.induced import DENSE, SMALL, Induced
from fasterai.prune.features.inputs import by_argument, find_features
from fasterai.prune.features.names import read_features, read_names
from fasterai.prune.features.selector import InputSelector
from fasterai.prune.goal import OVER_PLACES, check_context
from fasterai.prune.removal import Removal, mask_channels_, silent_channels, take_out
from fasterai.units.choice import Goal
from fasterai.units.evidence import Source

__all__ = ["induce"]

Named = Mapping[str, Any]


def induce(
    model: nn.Module,
    example_inputs: Any,
    sparsity: float,
    criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
    context: Context | str = "global",
    *,
    hidden: float = 0.0,
    keep: Iterable[int | str] | Named = (),
    features: FeaturesLike = None,
    names: Iterable[str] | Named | None = None,
    score: Callable[[nn.Module], float] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    over_places: str = "sum",
    round_to: int | None = None,
    exact: bool = True,
    measure: bool = True,
) -> Induced:
    """Make a network that reads fewer features of its inputs: the lowest are taken out of a copy of it, and out of the data.

    A feature is a column of a table, a pixel of a flat image, a channel of an image, or a category of fastai's `TabularModel`,
    which goes with its whole embedding. Its score is the sum of the scores of the weights that read it, over all layers that
    do. Features that no layer reads, as after a training under masks, score lowest. Hidden channels that are silent then go
    as well, and a share of the others on request. The removal is checked as that of channels is.

    Args:
        model: The model; not changed.
        example_inputs: A tensor, or tuple of positional arguments, that the model runs on.
        sparsity: The share of the features to remove, in [0, 1); exactly `round(sparsity * n)` of them, or more where more are
            read by nobody.
        criteria: The criterion that says how much a weight matters, its name, or a function of the weight.
        context: `global` ranks the features of all inputs together, `local` those of each input alone; or another context.
        hidden: The share of the hidden channels to remove, in [0, 1), by the same criterion and context.
        keep: Features that stay: indices or names, or a dict of these by argument.
        features: The dimension of the features, by argument, as `{"x": 1}`; by default the only one that it can be.
        names: The features' names, or a dict of these by argument.
        score: A function of a model that takes whole inputs, such as its accuracy; for the report.
        data: Batches `(x, y)` for criteria that need data.
        loss: The loss function for criteria that need gradients of `data`.
        over_places: As for `Pruner`: how the scores of several layers that read a feature make one, `sum`, `mean` or `max`.
        round_to: A multiple that the kept hidden channels of a group are rounded up to, as for `Pruner`.
        exact: As for `remove`.
        measure: True to count and time the model before and after.

    Returns:
        The small model, the selectors of its inputs, and a report.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range or unknown, a feature does not exist, several dimensions could be meant, all
            features would go, or the model cannot be followed.
    """
    shares = _share("sparsity", sparsity), _share("hidden", hidden)
    goal = Goal(check_context(context, shares[1]), shares[1])
    criterion = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
    inputs = positional(example_inputs)
    scoring = Scoring(
        criterion, Source(data=data, loss=loss, inputs=inputs), check_choice("over_places", over_places, OVER_PLACES)
    )
    round_to = None if round_to is None else check_count("round_to", round_to)
    small = copy.deepcopy(unwrap(check_whole(model)))
    tensors = input_tensors(small, inputs)
    dims, followed, graph = find_features(small, inputs, features, exact)
    sizes = {name: tensors[name].shape[d] for name, d in dims.items()}
    known = by_argument("names", names, sizes, lambda found, name: read_names(found, sizes[name]))
    forced = by_argument("keep", keep, sizes, lambda found, name: read_features("keep", found, sizes[name], known.get(name)))
    embeddings = embeddings_of(small, graph) if dims.keys() - followed.keys() else []
    sets = score_features(small, graph, embeddings, scoring)
    kept = choose_features(sets, goal.context, _count(shares[0], sizes, sets), forced)
    gone = _mask_features_(small, graph, sets, kept, embeddings)
    if shares[1]:
        _mask_hidden_(small, graph, [g for i in gone for g in embeddings[i].groups], goal, scoring, round_to)
    removal = _take_out(small, graph, inputs, embeddings, gone, followed, forced, exact=exact, measure=measure)
    left = {name: _left(name, sizes[name], removal, gone) for name in dims}
    selectors = {name: InputSelector(left[name], sizes[name], d, known.get(name)) for name, d in dims.items()}
    whole = _whole(small, selectors, inputs, tensors)
    scores = {"score": score} if score is not None else {}
    models = {DENSE: unwrap(model), SMALL: whole}
    comparison = compare(models, inputs, scores=scores, latency=False) if measure or scores else None
    sizes_of = tuple(sum(p.numel() for p in one.parameters()) for one in (unwrap(model), small))
    weights = _input_bytes(tensors, {}), _input_bytes(tensors, selectors)
    return Induced(small, selectors, removal, _scores(sets, sizes), whole, weights, (sizes_of[0], sizes_of[1]), comparison)


def _share(name: str, value: float) -> float:
    if check_fraction(name, value) == 1:
        raise ValueError(f"{name} must be below 1, got {value!r}: it would leave nothing to read")
    return float(value)


def _count(sparsity: float, sizes: Mapping[str, int], sets: Sequence[FeatureSet]) -> int:
    """Return the number of features to remove: the share of all, those that have to stay included."""
    free = sum(len(one.scores) for one in sets)
    found = {name: {i for one in sets for i in one.places.get(name, np.zeros((0, 1), int)).ravel().tolist()} for name in sizes}
    total = free + sum(size - len(found[name]) for name, size in sizes.items())
    count = round(sparsity * total)
    if count >= total:
        raise ValueError(f"sparsity must leave at least one of the {total} features, got {sparsity:g}")
    return count


@torch.no_grad()
def _mask_features_(
    model: nn.Module,
    graph: ChannelGraph,
    sets: Sequence[FeatureSet],
    kept: Sequence[np.ndarray[Any, Any]],
    embeddings: Sequence[Embedding],
) -> list[int]:
    """Set all that reads the features which are not kept to zero; return the places of categories among them."""
    flags = [np.ones(group.channels, np.bool_) for group in graph.groups]
    gone: list[int] = []
    for one, keep in zip(sets, kept, strict=True):
        if one.group is not None:
            flags[one.group] = keep
        else:
            gone = np.flatnonzero(~keep).tolist()
    for g in (g for i in gone for g in embeddings[i].groups):
        flags[g] = np.zeros(graph.groups[g].channels, np.bool_)
    mask_channels_(model, graph, flags)
    return gone


def _mask_hidden_(
    model: nn.Module, graph: ChannelGraph, left_out: Sequence[int], goal: Goal, scoring: Scoring, round_to: int | None
) -> None:
    """Set the hidden channels that matter least to zero."""
    kept = choose_hidden(model, graph, left_out, goal, scoring, round_to)
    mask_channels_(model, graph, [kept.get(i, np.ones(g.channels, np.bool_)) for i, g in enumerate(graph.groups)])


def _take_out(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: tuple[Any, ...],
    embeddings: Sequence[Embedding],
    gone: Sequence[int],
    dims: Mapping[str, int],
    forced: Mapping[str, Sequence[int]],
    *,
    exact: bool,
    measure: bool,
) -> Removal:
    """Remove the categories that are gone, then all features and channels that are silent, and check the outputs."""
    if gone:
        inputs = _without_categories(model, graph, inputs, embeddings, gone)
        graph = channel_graph(model, inputs, exact, features=dims or None)
    kept = [~silent for silent in silent_channels(model, graph)]
    for keep, group in zip(kept, graph.groups, strict=True):
        for (argument, _), indices in group.inputs.items():
            keep |= np.isin(indices, list(forced.get(argument, ()))).any(1)
    sound = largest_sound(model, graph, kept, inputs, exact=exact)
    result = take_out(model, graph, sound, inputs, exact=exact, measure=measure)
    if not (result.removed or gone):
        why = "see the refused ones of its removal" if result.refused else "sparsity asks for no feature, and none is silent"
        warn(f"nothing was removed: {why}")
    return result


def _without_categories(
    model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...], embeddings: Sequence[Embedding], gone: Sequence[int]
) -> tuple[Any, ...]:
    """Remove categories, check that the outputs stay, and return the inputs without them."""
    place = list(input_tensors(model, inputs)).index(CATEGORIES)
    stay = [i for i in range(len(embeddings)) if i not in gone]
    less = tuple(x[:, stay] if i == place else x for i, x in enumerate(inputs))
    was = model.training
    model.eval()
    with torch.no_grad():
        before = model(*inputs)
        drop_embeddings_(model, graph, embeddings, gone)
        check_same([before], [model(*less)], "removal", "the model without categories")
    model.train(was)
    return less


def _left(name: str, size: int, removal: Removal, gone: Sequence[int]) -> tuple[int, ...]:
    if name in removal.inputs:
        return removal.inputs[name].keep
    return tuple(i for i in range(size) if name != CATEGORIES or i not in gone)


def _whole(
    small: nn.Module, selectors: Mapping[str, InputSelector], inputs: tuple[Any, ...], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Return the small model with its selectors in front."""
    if len(inputs) == len(selectors) == 1 and isinstance(inputs[0], Tensor):
        return next(iter(selectors.values())).in_front(small)
    places = {name: i for name, x in tensors.items() for i, one in enumerate(inputs) if one is x}
    return SelectedModel({places[name]: one for name, one in selectors.items()}, small)


def _scores(sets: Sequence[FeatureSet], sizes: Mapping[str, int]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return the score of each feature of each input, as a share of the mean of all; NaN for those that were not scored."""
    mean = max(float(torch.cat([one.scores for one in sets]).mean()), 1e-30)
    found = {name: np.full(size, np.nan) for name, size in sizes.items()}
    for one in sets:
        for name, indices in one.places.items():
            found[name][indices] = one.scores.double().numpy()[:, None] / mean
    return found


def _input_bytes(tensors: Mapping[str, Tensor], selectors: Mapping[str, InputSelector]) -> int:
    """Return the bytes of a sample of all inputs."""
    total = 0
    for name, x in tensors.items():
        share = selectors[name].share if name in selectors else 1.0
        total += round(x.numel() // max(1, len(x) if x.dim() else 1) * x.element_size() * share)
    return total
