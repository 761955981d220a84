"""Error that the command line shows as one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "told_as_usage"]


class UsageError(Exception):
    """Request that cannot be met; the text says what to change."""


@contextmanager
def told_as_usage() -> Iterator[None]:
    """Turn the library's errors about arguments into `UsageError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
