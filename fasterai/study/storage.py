"""Storage of a study: Optuna's, embedded in a file or shared by its URL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["load_optuna", "open_storage", "quiet"]

#: Seconds that a process waits for the lock of an embedded file, and tries at the tables of a new one.
LOCK, TRIES = 60, 10


def load_optuna() -> Any:
    """Import Optuna, or say how it is installed."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"studies need optuna: pip install '.[study]' in a checkout of fasterai ({error})") from error
    return optuna


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Let Optuna print warnings alone for a while."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(url: str) -> BaseStorage:
    """Return the storage of a URL, which is made if it is a file that is not there yet.

    Args:
        url: Any that SQLAlchemy knows, such as `sqlite:///study.db` or `postgresql://user@host/studies`; or
            `journal:///study.log`, a file of lines that may lie on a file system shared by machines. After three strokes
            comes a path from the current folder, after four one from the root.

    Raises:
        ImportError: Optuna is not installed, or the driver of the data base.
        ValueError: It is no URL, or cannot be opened.
    """
    optuna = load_optuna()
    kind, _, path = url.partition("://")
    if not path:
        raise ValueError(f"storage must be a URL such as sqlite:///study.db or journal:///study.log, got {url!r}")
    if kind == "journal":
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(path.removeprefix("/")))
    options = {"connect_args": {"timeout": LOCK}} if kind.startswith("sqlite") else {}
    for left in reversed(range(TRIES)):  # two processes may make the tables of a new file at the same time
        try:
            return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
        except ImportError:
            raise
        except Exception as error:  # of SQLAlchemy, of its many drivers
            if not left or type(error).__name__ == "DatabaseError":  # no data base: waiting makes it none
                said = " ".join(str(error).split())[:160]
                raise ValueError(f"storage must be one that can be opened, got {url!r} ({said})") from error
            time.sleep(0.2)
    raise AssertionError
