"""Checks of saved states: each part is looked at before anything is changed, and the error names the part.

A check is a function `(what, value)` that raises. To add one: such a function, in the `parts` of the state that holds the part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fasterai.core.checks import check_count, check_fraction, warn

__all__ = [
    "Check",
    "check_loop_state",
    "check_parts",
    "counts",
    "equal_to",
    "finite_tensors",
    "flag",
    "fraction",
    "list_of",
    "mapping_of",
    "numbers",
    "settings_in_words",
    "tensor",
    "text",
    "texts",
    "warn_of_length",
    "warn_of_settings",
    "whole",
]

Check = Callable[[str, Any], object]


def check_parts(state: Any, owner: str, parts: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> None:
    """Refuse a saved state in which a part is missing or of another kind; parts that are not known are left alone.

    Args:
        state: What was loaded.
        owner: The name of what makes such states, for the message.
        parts: Key -> the check of its value.
        optional: The same for keys that states of earlier versions lack.

    Raises:
        ValueError: A key is missing, or a value is out of range.
        TypeError: A value is of the wrong type.
    """
    missing = [key for key in parts if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"state must be what {owner}.state_dict() returned, got one without {', '.join(missing)}")
    for key, check in {**parts, **(optional or {})}.items():
        if key in state:
            check(f"state's {key}", state[key])


def whole(what: str, value: Any) -> None:
    """Refuse what is no whole number of at least 0."""
    check_count(what, value, 0)


def fraction(what: str, value: Any) -> None:
    """Refuse what is no number in [0, 1]."""
    check_fraction(what, value)


def flag(what: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r} ({type(value).__name__})")


def equal_to(wanted: int | str) -> Check:
    """Return a check that lets one value in."""

    def of_value(what: str, value: Any) -> None:
        if type(value) is not type(wanted) or value != wanted:
            raise ValueError(f"{what} must be {wanted}, got {value!r}")

    return of_value


def text(what: str, value: Any) -> None:
    """Refuse what is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be text, got {value!r} ({type(value).__name__})")


def numbers(what: str, value: Any) -> None:
    """Refuse what is no state of one parameter: a dict of tensors and numbers."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {value!r} ({type(value).__name__})")
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, Tensor | int | float):
            raise TypeError(f"{what} must hold tensors and numbers, got {entry!r} as {name}")


def texts(what: str, value: Any) -> None:
    """Refuse what is no list of names."""
    list_of(text)(what, value)


def counts(what: str, value: Any) -> None:
    """Refuse what is no list of whole numbers of at least 0."""
    list_of(whole)(what, value)


def list_of(check: Check) -> Check:
    """Return a check of a list, each entry of which passes another one."""

    def of_list(what: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{what} must be a list, got {value!r} ({type(value).__name__})")
        for entry in value:
            check(f"{what}'s entries", entry)

    return of_list


def mapping_of(check: Check) -> Check:
    """Return a check of a dict of names, each value of which passes another one."""

    def of_mapping(what: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise TypeError(f"{what} must be a dict, got {value!r} ({type(value).__name__})")
        for name, entry in value.items():
            text(f"{what}'s names", name)
            check(f"{what} of {name}", entry)

    return of_mapping


def finite_tensors(what: str, value: Any) -> None:
    """Refuse what is no dict of names to tensors without NaN and infinity."""
    mapping_of(_finite)(what, value)


def tensor(what: str, value: Any) -> None:
    """Refuse what is no tensor with values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {value!r} ({type(value).__name__})")
    if value.is_meta:
        raise ValueError(f"{what} must hold values, got a tensor on the meta device")


def _finite(what: str, value: Any) -> None:
    tensor(what, value)
    if value.is_floating_point() and not math.isfinite(float(value.detach().abs().sum())) and not bool(value.isfinite().all()):
        raise ValueError(f"{what} must be finite, got NaN or infinity in it")


def _joined(what: str, value: Any) -> None:
    """Refuse what is no saved state of joined parameters.

    Raises:
        ValueError: A part is missing, or there are not as many owners as states.
        TypeError: A part is of the wrong type.
    """
    check_parts(value, "Joined", {"states": list_of(numbers)}, {"owners": _owners})
    owners = value.get("owners")
    if owners is not None and len(owners) != len(value["states"]):
        raise ValueError(f"{what} must have an owner for each of {len(value['states'])} states, got {len(owners)}")


def _owners(what: str, value: Any) -> None:
    if value is not None:
        texts(what, value)


def check_loop_state(state: Any) -> None:
    """Refuse what is no loop's saved state.

    Raises:
        ValueError: A part is missing or out of range.
        TypeError: A part is of the wrong type.
    """
    if not isinstance(state, Mapping) or not {"step", "participants"} <= set(state):
        raise ValueError(f"state must be what state_dict() returned, got {_summary(state)}")
    states = state["participants"]
    check_parts(state, "Loop", {"step": whole}, {"joined": _joined, "total_steps": whole, "steps_per_epoch": whole})
    (mapping_of if isinstance(states, Mapping) else list_of)(_of_participant)("state's participants", states)


def warn_of_length(state: Mapping[str, Any], total_steps: int) -> None:
    """Warn of a loop's state from the middle of a run of another length; one of a run's end may go on in a longer one.

    Args:
        state: The state; those of earlier versions do not say how long their runs were.
        total_steps: Steps of the run that goes on from it.
    """
    step, before = state["step"], state.get("total_steps", 0)
    if step < before != total_steps:
        warn(
            f"the saved state is of step {step} of {before}, and this run has {total_steps} steps: it goes on at position "
            f"{step / total_steps:.0%} of the schedule instead of {step / before:.0%}; with the epochs, batches and "
            "accumulation of before it goes on where it was"
        )


def settings_in_words(**settings: Any) -> dict[str, str]:
    """Return arguments in words that are the same in another process, for a saved state: no address in memory is in them."""
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)) for name, value in settings.items()}


def warn_of_settings(what: str, saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Warn of a run that goes on with other arguments than those of a saved state.

    Args:
        what: The participant that they are arguments of.
        saved: Argument -> its value in words when the state was saved; states of earlier versions have none.
        own: The same now.
    """
    differing = [f"{name} was {saved[name]} and is {now}" for name, now in own.items() if saved.get(name, now) != now]
    if differing:
        warn(
            f"the saved state is of a {what} with other arguments, and the run goes on with those that it has now: "
            f"{'; '.join(differing)}"
        )


def _of_participant(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {value!r} ({type(value).__name__})")


def _summary(state: object) -> str:
    return f"one with {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, Mapping) else repr(state)
