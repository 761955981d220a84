"""Checks of removal during a training: its arguments, its model, and its schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fasterai.core import contexts, schedules
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_choice, check_count, check_fraction, from_catalogue
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.saved import settings_in_words
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.model.supported import check_whole
from fasterai.prune.goal import OVER_PLACES, check_context
from fasterai.prune.pruner import Pruner
from fasterai.prune.surgery.model_copies import Copies, check_copies

__all__ = ["check_bare", "check_settings", "read_settings"]

POSITIONS = 1000  # at which a schedule is looked at


def check_settings(
    pruning_ratio: Any,
    context: Context | str,
    criteria: Criterion | Callable[[Tensor], Tensor] | str,
    schedule: Schedule | Callable[[float], float] | str,
    ignored_layers: Iterable[nn.Module | str] | None,
    max_updates: int,
    copies: Copies,
    options: Mapping[str, Any],
) -> Schedule:
    """Check the settings that need no model, and return the schedule.

    Raises:
        TypeError: An argument is of the wrong type, or there is no such option.
        ValueError: An argument is out of range or unknown, or the schedule falls.
    """
    check_context(context, pruning_ratio)
    as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
    if isinstance(ignored_layers, str | nn.Module):
        raise TypeError(f"ignored_layers must be several modules or names, got {ignored_layers!r}; pass a list")
    check_count("max_updates", max_updates)
    check_copies(copies)
    _check_options(options)
    return _rising(as_schedule(from_catalogue("schedule", schedule, schedules)))


def read_settings(
    pruning_ratio: Any,
    context: Context | str,
    criteria: Criterion | Callable[[Tensor], Tensor] | str,
    schedule: Schedule,
    max_updates: int,
) -> dict[str, str]:
    """Return the settings in words, for a saved state."""
    ratio = dict(sorted(pruning_ratio.items())) if isinstance(pruning_ratio, Mapping) else pruning_ratio
    return settings_in_words(
        pruning_ratio=ratio,
        context=from_catalogue("context", context, contexts),
        criteria=as_criterion(from_catalogue("criteria", criteria, criterion_catalogue)),
        schedule=schedule,
        max_updates=max_updates,
    )


def _check_options(options: Mapping[str, Any]) -> None:
    known = [p.name for p in inspect.signature(Pruner).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = [name for name in known if name not in ("iterative_steps", "original")]
    for name in options:
        if name == "iterative_steps":
            raise TypeError("iterative_steps must be left out, got one; max_updates= is the number of removals in a training")
        if name == "features":
            raise TypeError(
                "features must be left out, got some: the batches of a training stay whole. Mask features with "
                "Sparsifier(..., granularity='coupled', features=...), and call remove(..., features=...) after the training"
            )
        if name not in known:
            raise TypeError(f"options must be of {', '.join(known)}, got {name!r}")
    if options.get("round_to") is not None:
        check_count("round_to", options["round_to"])
    if "over_places" in options:
        check_choice("over_places", options["over_places"], OVER_PLACES)


def _rising(schedule: Schedule) -> Schedule:
    """Return the schedule, or refuse one that falls: removed channels do not come back."""
    before = 0.0
    for i in range(POSITIONS + 1):
        share = check_fraction("what the schedule returns", schedule(i / POSITIONS))
        if share < before - 1e-9:
            raise ValueError(
                f"schedule must never fall, since removed channels do not come back, got {schedule!r}, which falls from "
                f"{before:.4g} to {share:.4g} at position {i / POSITIONS:.4g}; pass one that rises, such as agp or cos"
            )
        before = share
    return schedule


def check_bare(model: nn.Module) -> None:
    """Refuse a model that is wrapped, sharded or compiled, as a whole or in parts: the wrapper holds on to the sizes.

    Raises:
        ValueError: It is; the message names the wrapper and the repair.
    """
    check_whole(model)
    for module in model.modules():
        if getattr(module, "_compiler_ctx", None) is not None:  # Lightning has unwrapped it, and calls the compiled one
            raise ValueError(
                f"model must be the bare network, got a {type(module).__name__} that torch.compile has compiled; train the "
                "module itself, and compile the small one"
            )
