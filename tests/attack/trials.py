"""Trials: one attack made of its seed, run in a process of its own, with a limit of time, and what came of it.

A kind of attack is a file with `COUNT` (trials by default), `SECONDS` (the most that one may take) and
`attack(draw, folder) -> SURVIVED or REFUSED`, which raises where the library does not keep what it promises. Kinds that
start processes themselves have `OUTSIDE = True`, and run in this one; they change nothing here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["FAILED", "KINDS", "REFUSED", "SURVIVED", "Trial", "count_of", "one", "run", "start"]

KINDS = ("kills", "disks", "files", "states", "folders", "ranks", "settings", "loops", "looks", "teachers")
SURVIVED, REFUSED, FAILED = "survived", "refused", "failed"
#: Imported once by the server that all processes are forked from.
LOADED = "tests.attack.loaded"


@dataclass(frozen=True)
class Trial:
    """What came of a trial; `why` and `trace` are of a failed one."""

    seed: int
    verdict: str
    why: str = ""
    trace: str = ""


def _kind(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"tests.attack.{name}")


def count_of(name: str) -> int:
    """The number of trials of a kind by default."""
    return int(_kind(name).COUNT)


def one(name: str, seed: int) -> Trial:
    """Run a trial in this process."""
    draw = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Trial(seed, _kind(name).attack(draw, Path(folder)))
        except BaseException as error:
            return Trial(seed, FAILED, _summary(error), traceback.format_exc())


def _summary(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def run(name: str, seeds: Sequence[int]) -> Iterator[Trial]:
    """Run trials one after the other; one that takes too long, or ends its process, is a failed one."""
    kind = _kind(name)
    if getattr(kind, "OUTSIDE", False):
        yield from (one(name, seed) for seed in seeds)
        return
    left = list(seeds)
    while left:
        for trial in _in_one_process(name, tuple(left), kind.SECONDS):
            left.remove(trial.seed)
            yield trial


def _in_one_process(name: str, seeds: Sequence[int], seconds: float) -> Iterator[Trial]:
    """Run trials in one process, until one takes it down."""
    ours, theirs = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    process = start(_serve, theirs, name, list(seeds))
    theirs.close()
    try:
        for seed in seeds:
            if not ours.poll(seconds):
                yield Trial(seed, FAILED, f"it takes longer than {seconds:g} s")
                return
            try:
                yield ours.recv()
            except EOFError:
                process.join()
                yield Trial(seed, FAILED, f"its process ended with {process.exitcode}")
                return
        process.join(10)
    finally:
        process.kill()  # this process alone, by its number
        process.join()


def _serve(pipe: Connection, name: str, seeds: Sequence[int]) -> None:
    for seed in seeds:
        pipe.send(one(name, seed))


def start(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function, forked from a server that has imported torch and the library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([LOADED])
    process = context.Process(target=_quiet, args=(function, *arguments), daemon=False)
    process.start()
    return process


def _quiet(function: Callable[..., object], *arguments: Any) -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which outlives a process that is killed
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    with suppress(BrokenPipeError):
        function(*arguments)
