"""Checks of arguments: each says what is allowed, what came, and the repair.

To add one: a function that takes the argument's name and its value, and returns the value as the library uses it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

__all__ = ["check_choice", "check_count", "check_fraction", "from_catalogue", "unknown", "warn"]


def check_fraction(name: str, value: object) -> float:
    """Return a share in [0, 1] as a float, or refuse the value.

    Args:
        name: The argument's name, for the message.
        value: Any real number; booleans, text and tensors are refused.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not in [0, 1]; a percentage is answered with the fraction that was meant.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__})")
    share = float(value)
    if 0.0 <= share <= 1.0:
        return share
    repair = f"; pass {share / 100:g} for {share:g} %" if 1.0 < share <= 100.0 and "return" not in name else ""
    raise ValueError(f"{name} must be in [0, 1], got {value!r}{repair}")


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return a whole number of at least `minimum` as an int, or refuse the value.

    Raises:
        TypeError: `value` is not a whole number (infinity and NaN are not).
        ValueError: `value` is below `minimum`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite whole number of at least {minimum}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number of at least {minimum}, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return int(value)


def check_choice(name: str, value: object, known: Iterable[str]) -> str:
    """Return the value if it is one of the known names, or refuse it.

    Raises:
        TypeError: `value` is not text.
        ValueError: `value` is not known; the known ones are listed, the closest first named.
    """
    names = list(known)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(names)}, got {value!r} ({type(value).__name__})")
    if value not in names:
        raise unknown(name, value, names)
    return value


def warn(message: str) -> None:
    """Warn of something legal but doubtful, at the line of the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        if frame.f_back is None:  # as at the interpreter's end, or in a thread of torch's
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def unknown(name: str, value: str, known: Iterable[str], kind: str = "one of") -> ValueError:
    """Make the error for a name that is not known; it lists the known ones, and proposes the closest."""
    names = list(known)
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return ValueError(f"{name} must be {kind} {shown or '(there is none)'}, got {value!r}{hint}")


def from_catalogue(name: str, value: Any, catalogue: ModuleType) -> Any:
    """Look a name up in a catalogue module; a value that is no text is returned unchanged.

    Raises:
        ValueError: There is no entry of that name; the known ones are listed.
    """
    if not isinstance(value, str):
        return value
    entries = {entry.rstrip("_"): entry for entry in catalogue.__all__}  # `global` is a keyword, its entry `global_`
    return getattr(catalogue, entries[check_choice(name, value, sorted(entries))])
