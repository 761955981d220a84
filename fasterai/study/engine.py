"""Engine of the studies: takes the runs that are free one by one, until all are done or have failed."""

from __future__ import annotations

import math
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fasterai.core.checks import check_count
from fasterai.study.book import BEAT, SILENCE, Book
from fasterai.study.catalogue import find_study
from fasterai.study.description import COLUMNS, Run, Settings, Size, Study
from fasterai.study.result import Result
from fasterai.study.storage import load_optuna, open_storage

__all__ = ["run"]

#: Seconds between two looks at the runs of other processes, where none is free.
LOOK = 1.0
DATABASE = "study.db"
#: Characters of an error that are kept.
LONGEST = 500


def run(
    study: str | Study,
    data: str | Path | None = None,
    *,
    size: str = "small",
    folder: str | Path | None = None,
    storage: str | None = None,
    seeds: Sequence[int] | None = None,
    only: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = True,
    beat: float = BEAT,
    silence: float = SILENCE,
) -> Result:
    """Run a study, or what is left of it, and write its table, picture and CSV.

    What is done already is not done again, whoever did it: the storage is the record. A run that has failed is tried once more
    by each call. Several processes may call this at once with one storage; each returns when all runs are done.

    Args:
        study: Its name, or one of your own.
        data: A folder of images, one sub-folder a class; None for scikit-learn's digits.
        size: `tiny`, `small` or `full`.
        folder: Where its files are written; `study-NAME` by default.
        storage: URL of an Optuna storage, which may be shared; by default a SQLite file in the folder.
        seeds: Those of the study by default.
        only: Axis -> value, or a list of them, to run a part of the grid.
        device: Of the networks, as torch names it.
        progress: True to show a bar.
        beat: Seconds between two signs of life in the storage.
        silence: Seconds without one until a run of another machine is taken up.

    Returns:
        The results of all runs that were asked for, those that failed with their errors.

    Raises:
        ImportError: Optuna is not installed.
        TypeError, ValueError: An argument is refused, or the storage holds the study with other settings.
    """
    found = find_study(study) if isinstance(study, str) else study
    if not isinstance(found, Study):
        raise TypeError(f"study must be a name or a Study, got {study!r}")
    wanted = replace(found.size(size), device=_checked_device(device))
    runs = _runs(found, size, seeds, only)
    place = _checked_folder(Path(folder if folder is not None else f"study-{found.name}"))
    load_optuna()  # which may be missing: before the data is read
    images = _load(found, data, wanted)
    if storage is None:
        place.mkdir(parents=True, exist_ok=True)
    url = storage if storage is not None else f"sqlite:///{(place / DATABASE).absolute()}"
    book = Book(open_storage(url), f"{found.name} {size}", found.record(wanted, getattr(images, "fingerprint", None)), found.y)
    place.mkdir(parents=True, exist_ok=True)
    with _kept_random(), _one_thread(device):
        _work(found, book, runs, wanted, images, progress, beat, silence)
    stand = book.stand()
    result = Result(found, wanted, getattr(images, "name", ""), tuple(runs), stand.done, stand.failed)
    result.save(place)
    return result


def _checked_device(name: str) -> str:
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one of this machine, such as cpu or cuda, got {name!r} ({reason})") from error
    return name


def _checked_folder(folder: Path) -> Path:
    taken = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if taken.exists() and not taken.is_dir():
        raise ValueError(f"folder must be a folder, got {str(folder)!r}, where {str(taken)!r} is a file")
    return folder


def _runs(study: Study, size: str, seeds: Sequence[int] | None, only: Mapping[str, Any] | None) -> list[Run]:
    """List the runs that are asked for, seed by seed, so that what is done early covers the whole grid."""
    chosen = study.default_seeds(size) if seeds is None else tuple(seeds)
    chosen = tuple(dict.fromkeys(check_count("seeds", seed, 0) for seed in chosen))
    if not chosen:
        raise ValueError(f"seeds must be one at least, got {seeds!r}")
    whole = settings = study.settings(size)
    for axis, value in (only or {}).items():
        known = list(dict.fromkeys(one[axis] for one in whole if axis in one))
        if not known:
            axes = ", ".join(dict.fromkeys(axis for one in whole for axis in one))
            raise ValueError(f"only must name an axis of the study, {axes}, got {axis!r}")
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for one in values:
            if one not in known:
                raise ValueError(f"only must give {axis} one of {', '.join(map(repr, known))}, got {one!r}")
        settings = [one for one in settings if one.get(axis) in values]
    if not settings:
        raise ValueError(f"only must leave a run, got {only!r}, which no combination of the grid has")
    return [Run(one, seed) for seed in chosen for one in settings]


def _load(study: Study, data: str | Path | None, size: Size) -> Any:
    if study.load is not None:
        return study.load(None if data is None else Path(data), size)
    if data is not None:
        raise ValueError(f"data must be left out for {study.name}, which brings its own, got {str(data)!r}")
    return None


def _work(
    study: Study, book: Book, runs: Sequence[Run], size: Size, data: Any, progress: bool, beat: float, silence: float
) -> None:
    """Take runs until none is left that is free or under way elsewhere."""
    first = book.stand()
    before = {key: number for key, (number, _) in first.failed.items()}
    keys = {one.key for one in runs}
    title, done = f"{study.name} {size.name}", len(keys & first.done.keys())
    with tqdm(total=len(runs), desc=title, initial=done, unit="run", file=sys.stderr, disable=not progress) as bar:
        while True:
            stand = book.stand()
            closed = {key for key, (number, _) in stand.failed.items() if number != before.get(key)} | set(stand.done)
            bar.n = len(closed & keys)
            left = [one for one in runs if one.key not in closed]
            free = next((one for one in left if one.key not in stand.running), None)
            if not left:
                bar.refresh()
                return
            if free is not None:
                bar.set_postfix_str(str(free))
                _take(study, book, free, size, data, beat)
            elif not book.free_lost(stand, silence):
                bar.set_postfix_str(f"waiting for {len(left)} of other processes")
                time.sleep(LOOK)


def _take(study: Study, book: Book, one: Run, size: Size, data: Any, beat: float) -> None:
    """Work on a run if no other process is first, and write down what came out."""
    trial = book.take(one)
    if trial is None:
        return
    try:
        with book.beating(trial, beat):
            metrics = _checked(study, study.trial(dict(one.settings), one.seed, size, data), one.settings)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        book.fail(trial, f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"[-LONGEST:])
    except BaseException:  # Ctrl-C, or the end of the process: the run is free again at once
        book.release(trial)
        raise
    else:
        book.finish(trial, metrics)


def _checked(study: Study, metrics: Any, settings: Settings) -> dict[str, float]:
    """Return the metrics as numbers, or refuse them."""
    if not isinstance(metrics, Mapping) or study.y not in metrics:
        raise TypeError(f"trial must return a dict with {study.y!r}, got {metrics!r}")
    found = {str(name): float(value) for name, value in metrics.items()}
    if taken := sorted(found.keys() & {*settings, *COLUMNS}):
        raise ValueError(f"trial must return metrics by names that no axis has, nor {' or '.join(COLUMNS)}, got {taken[0]!r}")
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(f"trial must return finite numbers, got {name}={value!r}")
    return found


@contextmanager
def _kept_random() -> Iterator[None]:
    """Put the states of the random generators back at the end: trials seed them."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Let torch use one thread for networks on the CPU: they are small, and a second process makes more of a second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
