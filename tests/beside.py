"""What tests wait for in processes of its own, begun with the session and done while other tests run."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


def waits_for(work: Callable[..., Any], *arguments: Any) -> pytest.MarkDecorator:
    """Mark a test that is going to ask for this work."""
    return pytest.mark.beside.with_args(work, *arguments)


class Beside:
    """Work in processes of its own, done while other tests run: one piece after another, in the order of the tests.

    Where several processes share the tests, all cores have work, and a piece is begun when it is asked for.

    A test says with `@waits_for(work, *arguments)` what it is going to ask for, and asks with `beside(work, *arguments)`.
    `work` gets the arguments, a folder of its own, and the variables of the session's beginning. It starts a process and
    waits: tests set filters of warnings, variables and the folder of this process as they need them.
    """

    def __init__(self, pool: ThreadPoolExecutor, folders: pytest.TempPathFactory) -> None:
        self._pool, self._folders, self._before = pool, folders, dict(os.environ)
        self._begun: dict[tuple[Any, ...], Future[Any]] = {}

    def begin(self, work: Callable[..., Any], *arguments: Any) -> None:
        if (work, *arguments) not in self._begun:
            folder = self._folders.mktemp(work.__name__)
            self._begun[work, *arguments] = self._pool.submit(work, *arguments, folder, self._before)

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self.begin(work, *arguments)
        return self._begun[work, *arguments].result()
