"""Parts of the checks: each raises AssertionError with the promise that is broken."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attempt", "check_refused", "check_value", "require", "same"]


def require(condition: object, message: str) -> None:
    """Check that a condition holds; raise the message if not."""
    if not condition:
        raise AssertionError(message)


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """Return a function's result, or raise what was promised."""
    try:
        return function()
    except Exception as error:
        raise AssertionError(f"{what}, but it raised {type(error).__name__}: {error}") from error


def same(a: Tensor, b: Tensor) -> bool:
    """Tell if two tensors are of one type and shape, and equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def check_value(entry: object) -> Any:
    """Check that an entry is a frozen value that pickles, and return its unpickled copy."""
    try:
        setattr(entry, "set_by_check", True)  # noqa: B010 - the name is not one of its own
    except (AttributeError, TypeError):
        pass
    else:
        delattr(entry, "set_by_check")
        raise AssertionError(f"{entry!r} must be frozen: make it a dataclass(frozen=True)")
    return attempt(
        f"{entry!r} must pickle: no lambda, no function inside a function", lambda: pickle.loads(pickle.dumps(entry))
    )


def check_refused(message: str, names: str, function: Callable[[], Any]) -> None:
    """Check that a call is refused with a ValueError that names something."""
    try:
        function()
    except ValueError as error:
        require(names in str(error), f"{message} with an error that names {names!r}, got: {error}")
        return
    raise AssertionError(f"{message} with a ValueError")
