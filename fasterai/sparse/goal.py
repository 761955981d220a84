"""Arguments of a sparsifier, read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fasterai.core import contexts, granularities
from fasterai.core.checks import check_fraction, from_catalogue, not_one_of
from fasterai.core.contexts import NM, Context, PerTarget
from fasterai.core.granularities import Granularity
from fasterai.core.types import Target
from fasterai.display import brief
from fasterai.model.names import unwrap
from fasterai.model.targets import match
from fasterai.units import rules
from fasterai.units.choice import Goal
from fasterai.units.pool import Pool, by_pool
from fasterai.units.rules import Rule

__all__ = [
    "Sparsity",
    "check_sources",
    "find_misfit",
    "read_context",
    "read_goal",
    "read_granularity",
    "read_inputs",
    "read_rule",
]

Sparsity = float | Mapping[str, float]


def check_sources(model: Any, data: Any, loss: Any) -> None:
    """Refuse a model, batches or a loss function of a wrong type.

    Raises:
        TypeError: One of them is of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {brief(model)} ({type(model).__name__})")
    if isinstance(data, tuple | Tensor):
        raise TypeError(f"data must be a list or loader of batches, got a {type(data).__name__}; pass data=[(x, y)]")
    if isinstance(loss, type):
        raise TypeError(f"loss must be a function (output, target), got the class {loss.__name__}; pass {loss.__name__}()")


def read_inputs(inputs: Any) -> tuple[Any, ...] | None:
    """Return example inputs as a tuple, None if there are none."""
    if inputs is None:
        return None
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def read_granularity(granularity: Granularity | str) -> Granularity:
    """Return a granularity from one or its name."""
    found = from_catalogue("granularity", granularity, granularities)
    if not isinstance(found, Granularity):
        raise not_one_of("granularity", "a granularity or its name", granularity)
    return found


def read_context(context: Context | str, nm: bool) -> Context:
    """Return a context from one or its name; `nm` is short for `two_four`."""
    found = contexts.two_four if nm else from_catalogue("context", context, contexts)
    if not isinstance(found, Context):
        raise not_one_of("context", "a context, its name or a dict", context)
    return found


def read_rule(rule: Rule | str, context: Context) -> Rule:
    """Return a rule from one or its name, checked together with the context."""
    found = from_catalogue("rule", rule, rules)
    if not isinstance(found, Rule):
        own = "; one of your own is a frozen subclass of fasterai.units.rules.Rule"
        raise not_one_of("rule", "a rule or its name", rule, own)
    if found.criteria and isinstance(context, NM):
        raise ValueError(f"rule must be nested or free for N:M, which fixes what each group keeps, got {found!r}")
    return found


def find_misfit(target: Target, granularity: Granularity, context: Context) -> str | None:
    """Return the reason for which a granularity and a context cannot prune a target; None if they can."""
    if granularity.fits(target.layout):
        return context.fits(granularity.unit_shape(target.layout), target.layout)
    allowed = ", ".join(granularities.allowed(target.layout))
    repair = "; pass Keep('out') for the outputs of any layer" if repr(granularity) == "filter" else ""
    return f"granularity must be one of {allowed}, got {granularity!r}{repair}"


def _may_be_features(key: str, targets: Sequence[Target]) -> bool:
    """Tell if a key has the form of an input's features, `x.1`, and names no target."""
    return key.rpartition(".")[2].partition(" ")[0].isdecimal() and not any(match(key, target) for target in targets)


def read_goal(
    sparsity: Sparsity,
    context: Context,
    model: nn.Module,
    pools: Sequence[Pool],
    targets: Sequence[Target],
    *,
    has_features: bool = False,
) -> Goal:
    """Return the context and the sparsity asked for of the pools.

    Args:
        sparsity: A share, or a dict of shares by target names, globs or modules of the model.
        context: The context that chooses among units; `local` for a dict.
        model: The model, wrapped or not.
        pools: The pools of units; empty while they are not known, and shares are then kept by target.
        targets: The targets that a dict may name.
        has_features: True if a dict may name features of inputs as well, as `x.1`; while the pools are not known, these are
            left out.

    Raises:
        TypeError: A share or a key is of the wrong type.
        ValueError: A share is out of range or out of the context's reach, or a name matches nothing.
    """
    if not isinstance(sparsity, Mapping):
        share = check_fraction("sparsity", sparsity)
        context.check(share)
        return Goal(context, share)
    if context != contexts.local:
        raise ValueError(f"sparsity must be one number for context {context!r}, got a dict; pass context='local'")
    names = {id(m): n for n, m in unwrap(model).named_modules()}
    readable = {}
    for key, value in sparsity.items():
        if isinstance(key, nn.Module) and id(key) in names:
            key = names[id(key)]
        elif not isinstance(key, str):
            raise TypeError(f"sparsity's keys must be names or modules of the model, got {key!r} ({type(key).__name__})")
        share = check_fraction(f"sparsity of {key!r}", value)
        if pools or not (has_features and _may_be_features(key, targets)):
            readable[key] = share
    return Goal(PerTarget(by_pool(pools, readable, targets, "sparsity's keys")), 1.0)
