"""Checks of arguments: each says what is allowed, what came, and the repair.

To add one: a function that takes the argument's name and its value, and returns the value as the library uses it.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec

from fasterai.core.words import ARGUMENTS as WORDS
from fasterai.core.words import GONE, find_entry, hint_for

__all__ = [
    "NamesReplacements",
    "check_arguments",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_number",
    "entry_name",
    "entry_or_repr",
    "from_catalogue",
    "instead_of_class",
    "not_one_of",
    "names_arguments",
    "noted",
    "unknown",
    "warn",
]


#: Module of a catalogue -> the argument that its entries are given for, and what one of them is called.
ARGUMENTS = {
    "fasterai.core.contexts": ("context", "context"),
    "fasterai.core.criteria": ("criteria", "criterion"),
    "fasterai.core.granularities": ("granularity", "granularity"),
    "fasterai.core.schedules": ("schedule", "schedule"),
    "fasterai.regularize.penalties": ("penalty", "penalty"),
    "fasterai.units.rules": ("rule", "rule"),
}
#: Packages that call this one on the user's behalf, by hooks and callbacks.
FRAMEWORKS = frozenset(
    (
        *("torch", "fastai", "fastcore", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"),
        *("transformers", "accelerate", "contextlib", "functools"),
    )
)


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
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__}){_in_text(value)}")
    share = float(value)
    if 0.0 <= share <= 1.0:
        return share
    repair = f"; pass {share / 100:g} for {share:g} %" if 1.0 < share <= 100.0 and "return" not in name else ""
    raise ValueError(f"{name} must be in [0, 1], got {value!r}{repair}")


def _in_text(value: object) -> str:
    """Return the repair for a number given as text, as `"50%"` or `"0.5"`."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", value) if isinstance(value, str) else None
    if not found or (share := float(found[1]) / (100 if found[2] else 1)) > 1:
        return ""
    return f"; pass {share:g}"


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


def check_number(name: str, value: object, *, at_least: float = -math.inf, above: float = -math.inf) -> float:
    """Return a finite number in a range as a float, or refuse the value.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is infinite, NaN or out of range.
    """
    limit = f" of at least {at_least:g}" if at_least > -math.inf else f" above {above:g}" if above > -math.inf else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number{limit}, got {value!r} ({type(value).__name__}){_in_text(value)}")
    found = float(value)
    if not math.isfinite(found) or found < at_least or (above > -math.inf and found <= above):
        raise ValueError(f"{name} must be a number{limit}, got {value!r}")
    return found


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


class NamesReplacements:
    """Anything whose missing attributes, where the public fasterai has them, are answered with what to write instead."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property that has failed: its own error
                return object.__getattribute__(self, name)
            hints = (GONE.get(base.__name__, {}).get(name) for base in type(self).__mro__)
            hint = next((f"; {found}" for found in hints if found), "")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)


P = ParamSpec("P")


def names_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Make an `__init__` answer arguments that it lacks, where others' calls have them, with what to write instead."""
    owner = init.__qualname__.partition(".")[0]

    @functools.wraps(init)
    def named(*given: P.args, **keywords: P.kwargs) -> None:
        check_arguments(owner, keywords)
        init(*given, **keywords)

    return named


def check_arguments(owner: str, keywords: Mapping[str, Any]) -> None:
    """Refuse arguments that a class lacks, where others' calls have them, with what to write instead."""
    for name in WORDS[owner].keys() & keywords.keys():
        raise TypeError(f"{name} must be left out, got {keywords[name]!r}; {WORDS[owner][name]}")


def instead_of_class(value: object) -> str:
    """Return the repair for a class given where one of its values is meant."""
    return f"; pass one of its values: {value.__name__}(...)" if isinstance(value, type) else ""


def not_one_of(argument: str, allowed: str, value: object, repair: str = "") -> TypeError:
    """Make the error for a value that is nothing of what an argument may be."""
    return TypeError(f"{argument} must be {allowed}, got {value!r} ({type(value).__name__}){instead_of_class(value)}{repair}")


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Add a note to errors of a user's own part (a criterion, a schedule, a participant), which says where they come from."""
    try:
        yield
    except Exception as error:
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def warn(message: str) -> None:
    """Warn of something legal but doubtful, at the user's line: the first one outside of this package and of frameworks."""
    frames: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        frames.append(frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.f_back  # type: ignore[assignment]
    own = __name__.partition(".")[0]
    outside = [level for level, name in enumerate(frames) if name != own]
    level = next((n for n in outside if frames[n] not in FRAMEWORKS), outside[0] if outside else 0)
    warnings.warn(message, stacklevel=level + 2)


def unknown(name: str, value: str, known: Iterable[str], kind: str = "one of", hint: str | None = None) -> ValueError:
    """Make the error for a name that is not known; it lists the known ones, and proposes the closest or gives a hint."""
    names = list(known)
    if hint is None:
        close = difflib.get_close_matches(value, names, n=1) or difflib.get_close_matches(value.lower(), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else None
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    repair = f"; {hint}" if hint else ""
    return ValueError(f"{name} must be {kind} {shown or '(there is none)'}, got {value!r}{repair}")


def entry_name(name: str, value: object, catalogue: ModuleType, among: Iterable[str] | None = None) -> str:
    """Return the name of the entry of a catalogue module that a name or a further name of it means.

    Further names are such as `magnitude`, `cosine` and `2:4`; `core/words.py` has them. A catalogue's `MAKERS` make an entry of
    another one: `variety(magnitude)` is `variety(large_final)`.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        catalogue: The module; its `__all__` is the registry.
        among: The entries that are allowed; all if it is left out.

    Raises:
        TypeError: `value` is not text.
        ValueError: There is no entry of that name; the known ones are listed, with a hint where the word is known.
    """
    kind = catalogue.__name__.rpartition(".")[2]
    if (call := _call(value, catalogue)) is not None:
        maker, inner, *more = call
        from_catalogue(name, value, catalogue)
        return f"{maker}({', '.join((entry_name(name, inner, catalogue, among), *more))})"
    known = sorted(entry.rstrip("_") for entry in catalogue.__all__) if among is None else list(among)
    if not isinstance(value, str) or value in known:
        return check_choice(name, value, known)
    found = find_entry(kind, value)
    if found not in known:
        raise unknown(name, value, known, hint=hint_for(kind, value))
    return found


def from_catalogue(name: str, value: Any, catalogue: ModuleType) -> Any:
    """Look a name up in a catalogue module; a value that is no text and of no other catalogue is returned unchanged.

    Raises:
        TypeError: The value is of another catalogue, as where two arguments have changed places.
        ValueError: There is no entry of that name; the known ones are listed.
    """
    if not isinstance(value, str):
        _check_catalogue(name, value, catalogue)
        return value
    if (call := _call(value, catalogue)) is not None:
        maker, inner, *more = call
        return catalogue.MAKERS[maker](from_catalogue(name, inner, catalogue), *more)
    entries = {entry.rstrip("_"): entry for entry in catalogue.__all__}  # `global` is a keyword, its entry `global_`
    return getattr(catalogue, entries[entry_name(name, value, catalogue)])


def _call(value: object, catalogue: ModuleType) -> list[str] | None:
    """Return the maker and its arguments of a word such as `variety(large_final, pearson)`; None if it is none."""
    if not isinstance(value, str) or not (found := re.fullmatch(r"\s*(\w+)\(\s*(\w+(?:\s*,\s*\w+)*)\s*\)\s*", value)):
        return None
    return [found[1], *re.split(r"\s*,\s*", found[2])] if found[1] in getattr(catalogue, "MAKERS", {}) else None


def entry_or_repr(value: object, catalogue: ModuleType) -> str:
    """Return the name of the entry of a catalogue module that a value is equal to, and the value's `repr` if there is none."""
    return next((entry.rstrip("_") for entry in catalogue.__all__ if getattr(catalogue, entry) == value), repr(value))


def _check_catalogue(name: str, value: object, catalogue: ModuleType) -> None:
    """Refuse a value of another catalogue: most of them are functions, which would be taken for one of the user's own."""
    homes = [base.__module__ for base in type(value).__mro__ if base.__module__ in ARGUMENTS]
    if not homes or catalogue.__name__ in homes or catalogue.__name__ not in ARGUMENTS:
        return
    argument, kind = ARGUMENTS[homes[0]]
    wanted = ARGUMENTS[catalogue.__name__][1]
    raise TypeError(f"{name} must be a {wanted} or its name, got {value!r}, which is a {kind}{_swapped(name, argument)}")


def _swapped(name: str, argument: str) -> str:
    known = {argument for argument, _ in ARGUMENTS.values()}
    return f"; are {name} and {argument} in each other's place?" if name in known else f"; pass it as {argument}="
