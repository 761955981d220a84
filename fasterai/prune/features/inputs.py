"""Inputs whose features may go: which dimension of which argument, and what users say of them by argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fasterai.core.checks import unknown
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.features import FeaturesLike, check_may_go, read_features
from fasterai.graph.inputs import input_tensors
from fasterai.prune.features.embeddings import CATEGORIES, is_tabular

__all__ = ["by_argument", "find_features"]

Dims = dict[str, int]


def find_features(
    model: nn.Module, inputs: tuple[Any, ...], features: FeaturesLike, exact: bool
) -> tuple[Dims, Dims, ChannelGraph]:
    """Find the dimension of the features of each input, and the channel graph in which they may go.

    Args:
        model: The model.
        inputs: Its positional arguments.
        features: The dimensions, by argument; None for the only ones that they can be.
        exact: As for `channel_graph`.

    Returns:
        Argument -> dimension, for all that are asked for; the same without the categories of a tabular model, which the graph
        does not know; the graph.

    Raises:
        TypeError: `features` names no dimensions.
        ValueError: There is no such input or dimension, several could be meant, or all of it has to stay.
    """
    tensors = input_tensors(model, inputs)
    has_categories = is_tabular(model) and CATEGORIES in tensors
    if features is None and has_categories:
        features = {name: 1 for name, x in tensors.items() if x.dim() == 2 and x.shape[1] > 1}
    if features is None:
        return _only(model, inputs, tensors, exact)
    dims = {asked.argument: asked.dim for asked in read_features(features, model, inputs)}
    followed = {name: d for name, d in dims.items() if not (has_categories and name == CATEGORIES)}
    graph = channel_graph(model, inputs, exact, features=followed or None)
    check_may_go(followed or None, model, inputs, graph.inputs)
    return dims, followed, graph


def _only(
    model: nn.Module, inputs: tuple[Any, ...], tensors: Mapping[str, Tensor], exact: bool
) -> tuple[Dims, Dims, ChannelGraph]:
    """Find the only dimension of the only input whose indices may go, by following each of them."""
    names = [name for name, x in tensors.items() if x.dim() > 1 and max(x.shape[1:]) > 1]
    if len(names) != 1:
        read_features(True, model, inputs)  # which says what there is
        raise ValueError(f"features must say which input is meant, got none of {', '.join(tensors) or 'no tensors'}")
    name, x = names[0], tensors[names[0]]
    graphs = {d: channel_graph(model, inputs, exact, features={name: d}) for d in range(1, x.dim()) if x.shape[d] > 1}
    able = [d for d, graph in graphs.items() if (name, d) not in graph.inputs]
    if len(able) != 1:
        shape = "x".join(map(str, x.shape))
        which = f"where indices of dimensions {able} may go" if able else "none of whose dimensions may lose an index"
        flat = "; to remove single pixels let the model take flat images, as (N, 784)" if x.dim() > 3 else ""
        reasons = "" if able else f": {graphs[next(iter(graphs))].inputs[name, next(iter(graphs))]}"
        repair = f": pass features={{{name!r}: {able[0]}}}" if able else reasons
        raise ValueError(f"features must say which dimension of {name} is meant, got none for {shape}, {which}{repair}{flat}")
    return {name: able[0]}, {name: able[0]}, graphs[able[0]]


def by_argument(
    word: str, given: Any, sizes: Mapping[str, int], read: Callable[[Any, str], tuple[Any, ...] | None]
) -> dict[str, Any]:
    """Read what is given for one input, or as a dict for several.

    Args:
        word: The name of what is given, for messages.
        given: A value for the only input, or a dict by argument.
        sizes: Argument -> the number of its features.
        read: A function of a value and an argument that checks the value.

    Raises:
        ValueError: An argument is not known, or there are several and none is named.
    """
    if isinstance(given, Mapping):
        for name in given.keys() - sizes.keys():
            raise unknown(word, str(name), sizes, "inputs, of")
        return {name: found for name, one in given.items() if (found := read(one, name)) is not None}
    is_nothing = given is None or (isinstance(given, tuple | list) and not given)
    if is_nothing:
        return {}
    if len(sizes) != 1:
        raise ValueError(f"{word} must be a dict by argument where there are several ({', '.join(sizes)}), got {given!r}")
    (name,) = sizes
    found = read(given, name)
    return {} if found is None else {name: found}
