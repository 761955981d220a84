"""Keys of samples: 64 bits that follow from the content alone, the same in every loop, order and batch, on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.batch import Batch

__all__ = ["MASK", "SampleKeys", "Signature", "sample_tensors", "signature_of"]

MASK = "attention_mask"  # the name of the tensor (B, T) that is 0 where a text is padded
#: Name, dtype and shape of each tensor of a sample; -1 for a length that padding makes.
Signature = list[tuple[str, str, tuple[int, ...]]]

PIECE = 1 << 18  # words that are mixed at a time on a CPU
LOW = (1 << 32) - 1
FIRST, SECOND = -0x61C8864680B583EB, -0x4B47D0C5A4B1CE63  # odd numbers of many bits, as signed ones
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def sample_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch's inputs with their names: arguments by place, keywords by name, labels left out.

    A dict gives the same as keywords, so that it makes no difference how a loop calls the model.
    """
    yield from _walk("", list(batch.inputs) if len(batch.inputs) != 1 else batch.inputs[0])
    yield from _walk("", batch.keywords)


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "input", value.detach().as_subclass(Tensor)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if key != "labels":
                yield from _walk(f"{name}.{key}" if name else str(key), value[key])
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _walk(f"{name}.{i}" if name else f"input {i}", one)


def signature_of(batch: Batch) -> Signature:
    """Return the names, dtypes and shapes of a sample's tensors."""
    found = list(sample_tensors(batch))
    mask = _mask_of(found)
    return [(name, str(x.dtype).removeprefix("torch."), _shape(x, mask)) for name, x in found]


def _mask_of(found: list[tuple[str, Tensor]]) -> Tensor | None:
    masks = [x for name, x in found if name.rpartition(".")[2] == MASK and x.dim() == 2]
    return masks[0] if masks else None


def _is_padded(x: Tensor, mask: Tensor | None) -> bool:
    return mask is not None and x.shape[:2] == mask.shape


def _shape(x: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    return (-1, *x.shape[2:]) if _is_padded(x, mask) else tuple(x.shape[1:])


class SampleKeys:
    """Works out the keys of samples.

    The bits of each tensor are read as integers of 64 bits; each is multiplied by an odd number of its place and mixed. All are
    added up modulo 2^64, with a number for the tensor's place, dtype and shape. Every step but the sum can be undone: samples
    that differ in one integer alone never have the same key, others have it with a probability of about 2^-64.
    Bits are compared, so that 0.0 and -0.0 differ. Where there is an `attention_mask`, what it leaves out has no part.
    """

    def __init__(self) -> None:
        self._numbers: dict[torch.device, Tensor] = {}
        self._seeds: dict[tuple[Any, ...], int] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Return the keys `(B,)` of a batch's samples, int64 on the inputs' device.

        Raises:
            ValueError: The inputs hold no tensor with rows.
        """
        found = list(sample_tensors(batch))
        count = next((len(x) for _, x in found if x.dim()), 0)
        if not count:
            raise ValueError(f"data must hold tensors with a row for each sample, got {batch!r}")
        mask, total = _mask_of(found), None
        for i, (_, x) in enumerate(found):
            x = _without_padding(x, mask) if _is_padded(x, mask) else x
            part = _mixed(self._sums(_rows(x, count)) + self._seed(i, x, _shape(x, mask)))
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total.expand(count)

    def _seed(self, *place: Any) -> int:
        """Return the number for a tensor's place, dtype and shape."""
        i, x, shape = place
        known = (i, x.dtype, shape)
        if known not in self._seeds:
            digest = hashlib.blake2b(repr(known).encode(), digest_size=8).digest()
            self._seeds[known] = int.from_bytes(digest, "little", signed=True)
        return self._seeds[known]

    def _sums(self, rows: Tensor) -> Tensor:
        """Return the sums `(B,)` of the mixed integers of rows `(B, n)` of any dtype."""
        words = _words(rows)
        numbers = self._numbers_for(words.shape[1], words.device)
        size = max(1, PIECE // max(1, words.shape[1])) if words.device.type == "cpu" else len(words)
        return torch.cat([_sums_of(piece, numbers) for piece in torch.split(words, size)])

    def _numbers_for(self, count: int, device: torch.device) -> Tensor:
        known = self._numbers.get(device)
        if known is None or len(known) < count:
            known = self._numbers[device] = torch.from_numpy(_odd_numbers(1 << max(0, count - 1).bit_length())).to(device)
        return known[:count]


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    out = (mask == 0).to(x.device)
    return x.masked_fill(out.reshape(*out.shape, *[1] * (x.dim() - 2)), 0)


def _rows(x: Tensor, count: int) -> Tensor:
    """Return a row for each sample; what all samples share is one row, which each of them has."""
    rows = x if x.dim() and len(x) == count else x if x.dim() and len(x) == 1 else x[None]
    return rows.contiguous().flatten(1) if rows.dim() > 1 else rows[:, None]


def _words(rows: Tensor) -> Tensor:
    """Return the bits of rows `(B, n)` as int64 `(B, m)`, with zeros behind where a row does not fill the last one."""
    size = rows.element_size()
    bits = rows.view(INTEGERS[size])
    if size >= 8:
        return bits
    each = 8 // size
    short = -bits.shape[1] % each
    whole = F.pad(bits, (0, short)) if short else bits.clone() if bits.storage_offset() % each else bits
    return whole.reshape(-1).view(torch.int64).view(len(rows), whole.shape[1] // each)  # a single row may have any stride


def _sums_of(words: Tensor, numbers: Tensor) -> Tensor:
    mixed = words * numbers
    halves = mixed.view(torch.int32)
    halves[:, 0::2] ^= halves[:, 1::2]  # as `mixed ^ (mixed >> 32)` of unsigned numbers, in one pass
    mixed *= FIRST
    halves[:, 0::2] ^= halves[:, 1::2]
    return mixed.sum(1)


def _mixed(x: Tensor) -> Tensor:
    """Return int64 numbers with each bit mixed into all; different numbers stay different."""
    for factor in (FIRST, SECOND):
        x = (x ^ (x >> 32 & LOW)) * factor
    return x ^ (x >> 32 & LOW)


def _odd_numbers(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return fixed odd numbers that look like chance, by SplitMix64 (Steele, Lea & Flood 2014)."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
