"""Cached teacher: logits that were worked out once for a fixed data set, and are read back while a student trains.

A batch in a training loop does not say which samples it holds. They are known by their content, so that the loop, the order and
the size of the batches make no difference, and a sample that was changed on its way is found out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch
from fasterai.core.checks import warn
from fasterai.display import Shown, Table, counted, settings, short_bytes
from fasterai.distill.cache.files import CacheFile, read_cache
from fasterai.distill.cache.keys import SampleKeys, Signature, signature_of
from fasterai.distill.teachers import Answers, Teacher

__all__ = ["CachedTeacher", "load_cached_teacher"]

OFTEN = 100  # batches between two looks at what an accelerator has counted
SHARE = 4  # logits that take at most this part of an accelerator's free memory are held there
REPAIR = "switch off random augmentation and mixing, cache this data too, or train with the network itself as teacher"


class CachedTeacher(Shown, Teacher):
    """Teacher whose logits stand in a file; given wherever a teacher is, `KnowledgeDistillationCallback(cached, SoftTarget())`.

    Logits are memory-mapped: a CPU reads those of a batch, and an accelerator holds all of them if they take at most a quarter
    of its free memory. Copies and pickles of it hold the path alone.

    Args:
        file: The content of the file, as `load_cached_teacher` opens it.
    """

    def __init__(self, file: CacheFile) -> None:
        self.file = file
        self._keys_of = SampleKeys()
        self._held: dict[torch.device, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}
        self._missed: Tensor | None = None
        self._batches = 0

    def __len__(self) -> int:
        return len(self.file.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": os.fspath(self.file.path.absolute())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(read_cache(state["path"]))  # type: ignore[misc]

    def _line(self) -> str:
        form = self.file.form
        kept = f", {form.top_k} largest" if form.top_k else ""
        return f"<CachedTeacher: {counted(len(self), 'sample')} of {form.shape}, {form.dtype}{kept}>"

    def _parts(self) -> Iterator[Table | str]:
        form = self.file.form
        pairs = {"teacher": self.file.kind, "samples": f"{len(self):,}", "logits": form.shape, "dtype": form.dtype}
        inputs = ", ".join(f"{name} {kind} {_sizes(shape)}" for name, kind, shape in self.file.inputs)
        yield settings(pairs | {"top_k": form.top_k, "size": short_bytes(self.file.nbytes), "inputs": inputs})

    # --- a run -------------------------------------------------------------------------------------------------------

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Begin a run.

        Raises:
            ValueError: Features are asked for, which a cache has none of.
        """
        if layers:
            raise ValueError(
                f"activations_teacher must be left out with a cached teacher, which holds logits alone, got {list(layers)!r}; "
                "pass the network itself as teacher for losses of features"
            )
        self._missed, self._batches = None, 0

    @torch.no_grad()
    def answer(self, batch: Batch) -> Answers:
        """Return the logits of the batch's samples, in float32 on the device of the student's outputs.

        Raises:
            ValueError: A sample is unknown. On a CPU each batch is checked; elsewhere the first one, and what was counted since
                then after each 100 batches, so that no other step waits for the device.
        """
        keys, device = self._keys_of(batch), batch.logits.device
        at, is_known = self._find(keys)
        self._check(is_known, batch)
        return Answers(self.file.form.unpack({name: x.to(device) for name, x in self._taken(at).items()}))

    def parts_of(self, keys: Tensor) -> dict[str, Tensor]:
        """Return what is kept of the logits of samples that are known, given by their keys `(B,)`."""
        return self._taken(self._find(keys)[0])

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return places among the known keys, and whether the keys stand there."""
        known = self._on(keys.device)[0]
        at = torch.searchsorted(known, keys).clamp_(max=len(known) - 1)
        return at, known[at] == keys

    def _taken(self, at: Tensor) -> dict[str, Tensor]:
        _, rows, parts = self._on(at.device)
        wanted = rows[at]
        return {name: x[wanted.to(x.device)] for name, x in parts.items()}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return keys, rows and logits, on a device where they have room."""
        if device not in self._held:
            fits = device.type != "cpu" and self.file.nbytes <= _free_memory(device) // SHARE
            parts = {name: x.to(device) if fits else x for name, x in self.file.parts.items()}
            self._held[device] = self.file.keys.to(device), self.file.rows.to(device), parts
        return self._held[device]

    def _check(self, known: Tensor, batch: Batch) -> None:
        self._batches += 1
        missed = (~known).sum()
        self._missed = missed if self._missed is None else self._missed + missed
        if self._looks_now(known.device):
            count, self._missed = int(self._missed), None
            if count:
                raise ValueError(_why_unknown(self.file.inputs, batch, count, len(known)))

    def _looks_now(self, device: torch.device) -> bool:
        return device.type == "cpu" or self._batches % OFTEN == 1

    def end(self) -> None:
        """End the run; samples that were unknown since the last look are told of."""
        missed, self._missed = self._missed, None
        if missed is not None and (count := int(missed)):
            warn(f"{counted(count, 'sample')} of the last batches are not in the cache, and were taught other logits; {REPAIR}")
        self._held = {}


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30


def _why_unknown(cached: Signature, batch: Batch, count: int, of: int) -> str:
    own = signature_of(batch)
    for (name, kind, shape), (_, other, sizes) in zip(cached, own, strict=False):
        if (kind, shape) != (other, sizes):
            repair = "make the samples as they were made for cache_teacher"
            repair += "; pad all to one length, or give an attention_mask" if kind == other and len(shape) == len(sizes) else ""
            return f"{name} must be {kind} {_sizes(shape)}, as when it was cached, got {other} {_sizes(sizes)}; {repair}"
    if len(cached) != len(own):
        return f"batch must hold {[n for n, *_ in cached]}, as when it was cached, got {[n for n, *_ in own]}"
    among = f"{count} of {of}" if count <= of else f"{count:,}"
    return f"batch must hold samples of the cached data, bit for bit, got {among} unknown ones; {REPAIR}"


def _sizes(shape: tuple[int, ...]) -> str:
    return f"({', '.join('any' if n < 0 else str(n) for n in shape)})"


def load_cached_teacher(path: str | os.PathLike[str]) -> CachedTeacher:
    """Read a teacher that `cache_teacher` has written; its logits are memory-mapped.

    Args:
        path: The file.

    Raises:
        ValueError: It is truncated, changed or foreign.
        OSError: It cannot be read.
    """
    return CachedTeacher(read_cache(path))
