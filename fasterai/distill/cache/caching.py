"""Caching of a teacher: its logits are worked out once for a fixed data set, and written to a file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch
from fasterai.core.checks import check_count, not_one_of
from fasterai.core.files import written_files
from fasterai.distill.cache.cached import CachedTeacher
from fasterai.distill.cache.data import Source, source_of, untouched_generators
from fasterai.distill.cache.files import CacheFile, RowWriter, check_alike, described_by, read_cache
from fasterai.distill.cache.keys import SampleKeys, signature_of
from fasterai.distill.cache.rows import DTYPES, RowForm
from fasterai.distill.teachers import NetworkTeacher, Teacher
from fasterai.model.names import unwrap
from fasterai.model.snapshots import sum_of
from fasterai.model.supported import network_in

__all__ = ["cache_teacher"]

LOOKS = 2  # batches that are read again when all is written
MOVES = ("after_step", "at_position")  # what a teacher that changes in a training hears
QUIET = 3.0  # seconds of work without a progress bar


def cache_teacher(
    teacher: nn.Module | Teacher,
    data: Any,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    top_k: int | None = None,
    batch_size: int = 64,
    overwrite: bool = False,
) -> CachedTeacher:
    """Write the logits of a fixed data set to a file, worked out once, and return the teacher that reads them back.

    Nothing of the teacher changes, nor do the random generators. The file is written whole or not at all. If it is there
    already, of the same teacher and settings and of this data, it is opened and nothing is worked out.

    Args:
        teacher: The network, or a teacher that does not change in training.
        data: What the student will train on: fastai's DataLoaders or a loader of theirs, torch's loader, shuffled or not, or
            data set, an iterable of batches, or one batch that holds everything, `x`, `(x, labels)` or a dict.
        path: The file, `.safetensors` by custom.
        dtype: `torch.float16` or `torch.float32`.
        top_k: The number of largest logits to keep of each row; the others share one value. None for all.
        batch_size: The samples at a time where data holds everything.
        overwrite: True to work the logits out anew, whatever is there.

    Raises:
        ValueError: Samples differ each time they are read, as by random augmentation; a shuffled loader leaves some out; the
            teacher answers differently for the same sample, or not with finite logits of one shape; or the file is of another
            teacher, of other data or settings.
        TypeError: An argument is of the wrong type.
    """
    asked = _asked(teacher, dtype, top_k)
    source, place = source_of(data, check_count("batch_size", batch_size)), Path(path)
    if place.is_dir() or not place.parent.is_dir():
        raise ValueError(f"path must be a file in a folder that is there, got {os.fspath(path)!r}")
    answering = _Answering(teacher)
    with untouched_generators(data):
        _check_repeats(source)
        if place.exists() and not overwrite:
            file = _checked_again(place, asked, answering, source)
        else:
            _write(place, asked, answering, source)
            file = read_cache(place)
    return CachedTeacher(file)


def _asked(teacher: nn.Module | Teacher, dtype: torch.dtype, top_k: int | None) -> tuple[str, int | None]:
    names = {kind: name for name, kind in DTYPES.items()}
    if not isinstance(teacher, nn.Module | Teacher) or isinstance(teacher, CachedTeacher):
        raise not_one_of("teacher", "a network", teacher, network_in(teacher))
    moves = isinstance(teacher, Teacher) and any(getattr(type(teacher), n) is not getattr(Teacher, n) for n in MOVES)
    if moves:
        raise ValueError(f"teacher must stay as it is in training, got a {type(teacher).__name__}, which follows the run")
    if dtype not in names:
        raise ValueError(f"dtype must be torch.float16 or torch.float32, got {dtype!r}")
    return names[dtype], None if top_k is None else check_count("top_k", top_k)


class _Answering:
    """Runs a teacher on batches as in a training, and knows it by its weights."""

    def __init__(self, teacher: nn.Module | Teacher) -> None:
        self.teacher = teacher if isinstance(teacher, Teacher) else NetworkTeacher(teacher)
        held = [x for value in vars(self.teacher).values() for x in (value if isinstance(value, list | tuple) else [value])]
        self.models = [unwrap(x) for x in held if isinstance(x, nn.Module)]
        self.kind = " and ".join(type(x).__name__ for x in self.models) or type(self.teacher).__name__

    def fingerprint(self) -> str:
        """Return a sum of the weights and the kinds of modules."""
        tensors = {}
        for i, model in enumerate(self.models):
            for name, x in [*model.named_parameters(), *model.named_buffers()]:
                tensors[f"{i}.{name}"] = x
        return sum_of(tensors, [type(x).__name__ for model in self.models for x in model.modules()])

    def __enter__(self) -> _Answering:
        self.teacher.begin(nn.Module(), [])
        return self

    def __exit__(self, *_: object) -> None:
        self.teacher.end()

    def __call__(self, batch: Batch) -> Tensor:
        like = torch.empty(0)  # of float32 on the CPU, as the answer
        logits = self.teacher.answer(replace(batch, outputs=like)).logits
        assert logits is not None
        return logits


def _form(asked: tuple[str, int | None], logits: Tensor) -> RowForm:
    form = RowForm(tuple(logits.shape[1:]), *asked)
    if form.top_k is not None and (not form.shape or form.top_k > form.classes):
        raise ValueError(f"top_k must be at most the {form.classes if form.shape else 1} classes, got {form.top_k}")
    return form


def _check_repeats(source: Source) -> None:
    """Refuse data whose first samples differ the second time."""
    if source.few is None:
        return
    keys = SampleKeys()
    first, again = keys(source.few()), keys(source.few())
    if changed := int((first != again).sum()):
        raise ValueError(_random(changed, len(first)))


def _random(changed: int, of: int) -> str:
    return (
        f"data must give each sample the same each time, got {changed} of {of} that differ when read again; switch random "
        "augmentation off, or train with the network itself as teacher"
    )


def _write(place: Path, asked: tuple[str, int | None], answering: _Answering, source: Source) -> None:
    from tqdm import tqdm

    keys, inputs = SampleKeys(), None
    with written_files(place) as temporary, ExitStack() as files:
        writer = RowWriter(temporary, files)
        with answering:
            for batch in tqdm(source.batches(), "cached logits", source.count, leave=False, delay=QUIET, disable=None):
                inputs = inputs or signature_of(batch)
                logits = answering(batch)
                own = keys(batch)
                if len(logits) != len(own):
                    raise ValueError(f"teacher must answer with a row for each sample, got {len(logits)} for {len(own)}")
                form = _form(asked, logits)
                writer.add(form, own, form.pack(logits))
        assert writer.form is None or inputs is not None
        form = writer.form or RowForm((), asked[0])
        writer.finish(described_by(form, inputs or [], answering.fingerprint(), answering.kind))
        files.close()
        written = CachedTeacher(read_cache(temporary))
        changed, seen = _look_again(written, answering, source)
        if changed:
            raise ValueError(_random(changed, seen))


def _checked_again(place: Path, asked: tuple[str, int | None], answering: _Answering, source: Source) -> CacheFile:
    """Read a file that is there, if it is what is asked for."""
    file = read_cache(place)
    own = file.form.dtype, file.form.top_k
    repair = "pass overwrite=True, or another path"
    if own != asked:
        told = [f"dtype {dtype} and top_k {k}" for dtype, k in (asked, own)]
        raise ValueError(f"path must hold logits of {told[0]}, got {place} with {told[1]}; {repair}")
    if file.teacher != answering.fingerprint():
        raise ValueError(f"path must hold logits of this teacher, got {place}, of one with other weights; {repair}")
    changed, seen = _look_again(CachedTeacher(file), answering, source)
    if changed:
        raise ValueError(f"path must hold logits of this data, got {place}, which lacks {changed} of {seen} samples; {repair}")
    return file


def _look_again(cached: CachedTeacher, answering: _Answering, source: Source) -> tuple[int, int]:
    """Return how many samples of the first batches a cache does not know, and of how many; compare the logits of the others."""
    if not source.repeats:
        return 0, 0
    unknown = seen = 0
    for batch in islice(source.batches(), LOOKS):
        keys = SampleKeys()(batch).cpu()
        known = torch.isin(keys, cached.file.keys)
        unknown, seen = unknown + int((~known).sum()), seen + len(keys)
        if known.all() and seen == len(keys):
            with answering:
                parts = cached.file.form.pack(answering(batch))
            check_alike(cached.parts_of(keys), parts)
    return unknown, seen
