"""File of a cached teacher: safetensors of logits in the order in which they were worked out, and the samples' keys, sorted.

    logits   (N, *shape)      all logits; the largest `(N, ..., k)` with `top_k`, and beside them
    indices  (N, ..., k)      their classes, and
    rest     (N, ...)         the value of each other class
    keys     (M,) int64       the keys of the samples, rising
    rows     (M,) int64       the row of each key; a sample that came several times has one

The logits go into the file while they are worked out, so that they need no memory; the header takes its place, which is left
free, at last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fasterai.display import Brief
from fasterai.distill.cache.keys import Signature
from fasterai.distill.cache.rows import DTYPES, RowForm

__all__ = ["CacheFile", "RowWriter", "read_cache"]

FORMAT = "fasterai-teacher-1"
HEAD = 8192  # bytes of the header
NAMES = {torch.float16: "F16", torch.float32: "F32", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
ALIKE = 0.01  # of the largest logit: what the same sample may differ by in another batch
BLOCK = 1 << 16


@dataclass(frozen=True, repr=False)
class CacheFile(Brief):
    """Content of a file; the tensors of logits are memory-mapped.

    Attributes:
        path: The file.
        form: The form of the logits.
        inputs: The samples' tensors: names, dtypes and shapes.
        teacher: The sum of the teacher's weights.
        kind: The teacher's class.
        keys: The keys of the samples, rising.
        rows: The row of each key.
        parts: What is kept of the logits.
    """

    path: Path
    form: RowForm
    inputs: Signature
    teacher: str
    kind: str
    keys: Tensor = field(repr=False)
    rows: Tensor = field(repr=False)
    parts: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return sum(x.numel() * x.element_size() for x in self.parts.values())


class RowWriter:
    """Writes rows of logits into an open file, and at last the keys and the header.

    Args:
        place: The path of the file, in a folder of its own: parts of rows stand in files beside it meanwhile.
        files: Closes the files.
    """

    def __init__(self, place: Path, files: ExitStack) -> None:
        self.place = place
        self._closing = files
        self._files: dict[str, BinaryIO] = {}
        self._keys: list[np.ndarray[Any, Any]] = []
        self.form: RowForm | None = None

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return sum(map(len, self._keys))

    def _begin(self, form: RowForm) -> None:
        self.form = form
        for name in form.shapes():
            path = self.place if name == "logits" else self.place.with_name(f"{self.place.name}.{name}")
            self._files[name] = self._closing.enter_context(path.open("wb+"))
        self._files["logits"].write(bytes(HEAD))

    def add(self, form: RowForm, keys: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Write the rows of a batch.

        Raises:
            ValueError: They are not of the form of the rows before.
        """
        if self.form is None:
            self._begin(form)
        if form != self.form:
            assert self.form is not None
            raise ValueError(
                f"data must give logits of one shape, got {form.shape} after {self.form.shape}; pad all samples to one length"
            )
        self._keys.append(keys.cpu().numpy().copy())
        for name, x in parts.items():
            self._files[name].write(x.cpu().contiguous().numpy().data)

    def finish(self, described: Mapping[str, str]) -> int:
        """Write keys, rows and header; return the number of different samples.

        Raises:
            ValueError: There are no rows, or samples of one key have different logits.
        """
        if self.form is None:
            raise ValueError("data must hold at least one sample, got none")
        found = np.concatenate(self._keys)
        order = np.argsort(found, kind="stable")
        keys = found[order]
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
        self._check_doubles(order, is_first)
        tensors: dict[str, Any] = {"keys": keys[is_first], "rows": order[is_first].astype(np.int64)}
        self._join(tensors, described)
        return int(is_first.sum())

    def _check_doubles(self, order: np.ndarray[Any, Any], is_first: np.ndarray[Any, Any]) -> None:
        """Refuse samples of one key whose logits differ by more than rounding."""
        doubles = np.flatnonzero(~is_first)
        firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))[doubles]
        assert self.form is not None
        if not len(doubles):
            return
        rows = self._rows()
        for at in range(0, len(doubles), BLOCK):
            one, other = (_taken(rows, order[i[at : at + BLOCK]]) for i in (doubles, firsts))
            check_alike(one, other)

    def _rows(self) -> dict[str, Tensor]:
        """Return the rows so far, memory-mapped."""
        assert self.form is not None
        found = {}
        for name, (dtype, shape) in self.form.shapes().items():
            self._files[name].flush()
            count, kind = (self.count, *shape), torch.empty(0, dtype=dtype).numpy().dtype
            start = HEAD if name == "logits" else 0
            found[name] = torch.from_numpy(np.memmap(self._files[name].name, kind, "c", start, count))
        return found

    def _join(self, tensors: Mapping[str, Any], described: Mapping[str, str]) -> None:
        assert self.form is not None
        main, end = self._files.pop("logits"), 0
        header: dict[str, Any] = {"__metadata__": dict(sorted(described.items()))}
        for name, (dtype, shape) in self.form.shapes().items():
            if name != "logits":
                part = self._files.pop(name)
                part.seek(0)
                shutil.copyfileobj(part, main, 1 << 24)
                part.close()
                Path(part.name).unlink()
            start, end = end, main.tell() - HEAD
            header[name] = {"dtype": NAMES[dtype], "shape": [self.count, *shape], "data_offsets": [start, end]}
        if short := -end % 8:
            header["gap"] = {"dtype": "U8", "shape": [short], "data_offsets": [end, end + short]}
            main.write(bytes(short))
        for name, x in tensors.items():
            start = main.tell() - HEAD
            main.write(x.data)
            header[name] = {"dtype": "I64", "shape": [len(x)], "data_offsets": [start, main.tell() - HEAD]}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > HEAD - 8:
            raise ValueError(f"data must have few tensors for each sample, got a header of {len(text)} bytes for {HEAD - 8}")
        main.seek(0)
        main.write((HEAD - 8).to_bytes(8, "little") + text.ljust(HEAD - 8))
        main.flush()


def _taken(rows: Mapping[str, Tensor], at: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    return {name: x[torch.from_numpy(at)] for name, x in rows.items()}


def check_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Refuse kept logits of the same samples that differ by more than rounding.

    The classes of the largest logits are not compared: those of two that are nearly equal may change places.

    Raises:
        ValueError: They do.
    """
    pairs = [(one[name].float(), other[name].float()) for name in one if name != "indices"]
    apart = max(float((x - y).abs().max()) for x, y in pairs)
    if apart > ALIKE * max(1.0, *(float(y.abs().max()) for _, y in pairs)):
        raise ValueError(
            f"teacher must answer alike for the same sample, got logits that differ by {apart:.3g}; switch off what is by "
            "chance in it, such as functional dropout without training=self.training"
        )


def described_by(form: RowForm, inputs: Signature, teacher: str, kind: str) -> dict[str, str]:
    """Return a file's metadata."""
    entries = {"shape": form.shape, "dtype": form.dtype, "top_k": form.top_k, "inputs": inputs, "kind": kind}
    return {"format": FORMAT, "teacher": teacher} | {key: json.dumps(value) for key, value in entries.items()}


def read_cache(path: str | os.PathLike[str]) -> CacheFile:
    """Read a file; its logits are read where they are used.

    Raises:
        ValueError: It is truncated, changed or foreign.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _checked(Path(path), header, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"path must be a file that cache_teacher wrote, got {path}: {error}") from error


def _checked(path: Path, header: Mapping[str, str], tensors: dict[str, Tensor]) -> CacheFile:
    _expect(header.get("format") == FORMAT, f"the format {FORMAT}")
    shape, dtype, top_k, inputs, kind = (json.loads(header[n]) for n in ("shape", "dtype", "top_k", "inputs", "kind"))
    _expect(dtype in DTYPES and isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape), "a shape")
    form = RowForm(tuple(shape), dtype, top_k)
    _expect(top_k is None or (isinstance(top_k, int) and 0 < top_k <= form.classes), "a number of logits")
    parts = {name: tensors[name] for name in form.shapes()}
    keys, rows = tensors["keys"], tensors["rows"]
    count = len(parts["logits"])
    for name, (kind_of, of_sample) in form.shapes().items():
        _expect(parts[name].dtype is kind_of and parts[name].shape == (count, *of_sample), f"{name} of {count} samples")
    _expect(keys.dtype is rows.dtype is torch.int64 and keys.shape == rows.shape and 0 < len(keys) <= count, "keys and rows")
    _expect(bool((keys[1:] > keys[:-1]).all()), "keys that rise")
    _expect(int(rows.min()) >= 0 and int(rows.max()) < count, "rows that there are")
    signature = [(str(name), str(kind), tuple(sizes)) for name, kind, sizes in inputs]
    return CacheFile(path, form, signature, header["teacher"], str(kind), keys, rows, parts)


def _expect(holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"it must hold {wanted}")
