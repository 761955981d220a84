"""The one kind of error that the command line shows as a line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "told_as_usage"]


class UsageError(Exception):
    """What the user asked for cannot be done; the text says what to change."""


@contextmanager
def told_as_usage() -> Iterator[None]:
    """Turn the library's errors about arguments into usage errors."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
