"""Arguments of a pruner, read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fasterai.core import contexts
from fasterai.core.checks import check_fraction, from_catalogue, unknown
from fasterai.core.contexts import NM, Context, Local, PerTarget
from fasterai.core.types import Target
from fasterai.graph.channels import ChannelGraph
from fasterai.graph.reasons import kept_shares, shares_in_words
from fasterai.model.names import owner, unwrap
from fasterai.model.targets import all_targets, match
from fasterai.prune.choice.budget import Budget
from fasterai.units.channel_pools import OVER, ChannelPool
from fasterai.units.choice import Goal
from fasterai.units.pool import by_pool

__all__ = ["OVER_PLACES", "Ratio", "check_context", "free_pools", "read_layers", "read_ratio"]

Ratio = float | Mapping[Any, float] | Budget
OVER_PLACES = tuple(OVER)


def check_context(context: Context | str, ratio: Ratio) -> Context:
    """Return the context, checked together with the ratio that it gets.

    Raises:
        TypeError: The ratio is no number, dict or `Budget`.
        ValueError: One of them is out of range or unknown, or they do not go together.
    """
    if not isinstance(ratio, Budget):
        for value in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
            if check_fraction("pruning_ratio", value) == 1:
                raise ValueError(f"pruning_ratio must be below 1, got {value!r}: it would leave a layer without a channel")
    found: Context = from_catalogue("context", context, contexts)
    if isinstance(found, NM) or not isinstance(found, Context):
        raise ValueError(f"context must be 'local', 'global', 'erk' or 'lamp', got {context!r}")
    if isinstance(ratio, Mapping) and not isinstance(found, Local):
        raise ValueError(f"pruning_ratio must be one number for context {found!r}, got a dict; pass context='local'")
    return found


def read_ratio(
    ratio: Ratio, context: Context, model: nn.Module, pools: Sequence[ChannelPool], *, is_whole: bool = True
) -> Goal | None:
    """Return the context and the sparsity asked for of the groups; None for a `Budget`, which is of the whole model.

    Args:
        ratio: The share to remove, a dict of them, or a `Budget`.
        context: The context.
        model: The model.
        pools: The groups.
        is_whole: False for a model with groups of which one channel is left: the names of their layers are no error.

    Raises:
        TypeError: A key of a dict is neither a name nor a module of the model.
        ValueError: A name matches nothing, or layers whose channels are coupled were given different shares.
    """
    if isinstance(ratio, Budget):
        return None
    if not isinstance(ratio, Mapping):
        return Goal(context, float(ratio))
    names = {id(m): n for n, m in unwrap(model).named_modules()}
    named: dict[Any, float] = {names.get(id(key), key): share for key, share in ratio.items()}
    for key in named:
        if not isinstance(key, str):
            got = f"{key!r} ({type(key).__name__})"
            raise TypeError(f"pruning_ratio's keys must be names or modules of the model, got {got}")
    targets = all_targets(unwrap(model))
    if not is_whole:
        named = {n: share for n, share in named.items() if not _is_gone(n, targets, pools)}
    return Goal(PerTarget(by_pool(pools, named, targets, "pruning_ratio's keys")), 1.0)


def _is_gone(name: str, targets: Sequence[Target], pools: Sequence[ChannelPool]) -> bool:
    """Tell if a name is one of layers of the model none of which makes channels of these pools."""
    if name in {p.name for p in pools}:
        return False
    named = [t.name for t in targets if match(name, t)]
    return bool(named) and not any(p.makers.intersection(named) for p in pools)


def read_layers(model: nn.Module, layers: Iterable[nn.Module | str]) -> frozenset[str]:
    """Return the names of layers, and of those inside them.

    Raises:
        TypeError: It is one layer instead of several.
        ValueError: One is no module of the model.
    """
    if isinstance(layers, str | nn.Module):
        raise TypeError(f"ignored_layers must be several modules or names, got {layers!r}; pass a list")
    names = {id(m): n for n, m in unwrap(model).named_modules()}
    found: set[str] = set()
    for layer in layers:
        name = layer if isinstance(layer, str) else names.get(id(layer))
        if name is None or name not in names.values():
            raise unknown(
                "ignored_layers", str(layer)[:60], [n for n in names.values() if n], "modules of the model or their names, of"
            )
        found |= {n for n in names.values() if n == name or n.startswith(f"{name}.")}
    return frozenset(found)


def free_pools(
    pools: Sequence[ChannelPool],
    graph: ChannelGraph,
    ignored: frozenset[str],
    known: Collection[str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[ChannelPool, ...]:
    """Return the pools of channels that may be removed: no ignored layer makes them, and they are among the known ones.

    Args:
        pools: The pools of all groups.
        graph: The channel graph of the model.
        ignored: The ignored layers.
        known: Names of groups; None for all.
        shapes: Parameter -> its shape, for the words of the error.

    Raises:
        ValueError: There are none, of a model that is whole: none are known.
    """
    if known is not None:
        pools = [p for p in pools if p.name in known]
    made = [{owner(n) for n, d in p.group.places if (n, d) not in graph.readers} for p in pools]
    free = tuple(p for p, names in zip(pools, made, strict=True) if not names & ignored)
    if pools and not free:
        makers = ", ".join(sorted(p.name for p in pools)[:5])
        raise ValueError(f"ignored_layers must leave some channels to remove, got all layers that make them ({makers})")
    if not free and known is None:
        why = shares_in_words(kept_shares(shapes, graph)) if shapes else ""
        said = f"none: of its parameters {why}" if why else "none"
        raise ValueError(
            f"model must have channels that can be removed, got {said}; channel_graph(model, inputs).pinned says why"
        )
    return free
