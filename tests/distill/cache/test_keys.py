"""Keys of samples: a different key for each content, whatever the loop, the order, the layout and the size of the batch."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasterai.core.batch import Batch
from fasterai.distill.cache.keys import SampleKeys, sample_tensors, signature_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
WHOLE = (1 << 64) - 1
FEW = settings(max_examples=25, deadline=None)


def keys(*inputs: Any, **keywords: Any) -> Tensor:
    return SampleKeys()(Batch(inputs, keywords=keywords))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8).view(dtype)


def test_a_key_is_the_one_worked_out_by_hand():
    """One integer, in Python's own numbers: SplitMix64's first number, two folds, and the number of place, dtype and shape."""
    import hashlib

    def fold(x: int) -> int:
        return x ^ (x >> 32)

    z = 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WHOLE
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WHOLE
    number = (z ^ (z >> 31)) | 1
    first, second = (-0x61C8864680B583EB) & WHOLE, (-0x4B47D0C5A4B1CE63) & WHOLE
    total = fold(fold(12345 * number & WHOLE) * first & WHOLE)
    seed = hashlib.blake2b(repr((0, torch.int64, (1,))).encode(), digest_size=8).digest()
    total = total + int.from_bytes(seed, "little") & WHOLE
    for factor in (first, second):
        total = fold(total) * factor & WHOLE
    expected = struct.unpack("<q", struct.pack("<Q", fold(total)))[0]
    assert keys(torch.tensor([[12345]])).tolist() == [expected]


@FEW
@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(0, 99), st.data())
def test_a_single_element_makes_another_key(dtype: torch.dtype, n: int, seed: int, data: st.DataObject):
    x = random_bits((2, n), dtype, seed)
    x[1] = x[0]
    assert len(set(keys(x).tolist())) == 1
    bits = x.view(torch.uint8)
    at = data.draw(st.integers(0, bits.shape[1] - 1))
    bits[1, at] ^= 1 if dtype is torch.bool else 1 << data.draw(st.integers(0, 7))
    assert len(set(keys(x).tolist())) == 2


@FEW
@given(st.permutations(range(6)), st.integers(1, 5), st.integers(0, 99))
def test_neither_order_nor_size_of_the_batch_makes_a_difference(order: list[int], size: int, seed: int):
    x, more = random_bits((6, 3, 5), torch.float32, seed), random_bits((6, 7), torch.uint8, seed)
    whole = keys(x, more)
    assert len(set(whole.tolist())) == 6
    assert torch.equal(keys(x[order], more[order]), whole[order])
    pieces = [keys(a, b) for a, b in zip(x.split(size), more.split(size), strict=True)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float16])
def test_the_layout_in_memory_makes_no_difference(dtype: torch.dtype):
    x = random_bits((4, 3, 5, 7), dtype, 0)
    whole = keys(x)
    assert torch.equal(keys(x.contiguous(memory_format=torch.channels_last)), whole)
    apart = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x)  # it does not begin at a whole integer
    apart.copy_(x)
    assert torch.equal(keys(apart), whole)
    assert torch.equal(keys(x.repeat_interleave(2, 0)[::2]), whole)
    assert torch.equal(keys(torch.zeros(4, 106, dtype=dtype)[:1, 1:106].copy_(x[:1].flatten(1)).view(1, 3, 5, 7)), whole[:1])


def test_pieces_of_a_large_batch_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    x = random_bits((9, 64), torch.float32, 0)
    whole = keys(x)
    monkeypatch.setattr("fasterai.distill.cache.keys.PIECE", 64)
    assert torch.equal(keys(x), whole)


def test_numbers_with_few_bits_do_not_meet():
    """Images of zeros and ones differ only in the highest bits of each float: folded words, not plain products."""
    x = (torch.rand(20_000, 24, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    different = len({tuple(row) for row in x.tolist()})
    assert len(set(keys(x).tolist())) == different
    signs = torch.where(x > 0, 1.0, -1.0)
    assert len(set(keys(signs).tolist())) == different


def test_bits_count_not_values():
    zeros = torch.tensor([[0.0], [-0.0]])
    assert len(set(keys(zeros).tolist())) == 2
    nan = torch.tensor([[0x7FC00000], [0x7FC00001]], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert len(set(keys(nan).tolist())) == 2
    x = torch.ones(1, 4)
    assert keys(x) != keys(x.half())
    assert keys(x) != keys(x.reshape(1, 2, 2))
    assert keys(x, 2 * x) != keys(2 * x, x)


def test_a_dict_is_the_same_as_keywords_and_labels_have_no_part():
    x, y = torch.arange(6).view(2, 3), torch.arange(2)
    whole = keys(a=x, b=y)
    assert torch.equal(keys(b=y, a=x, labels=y), whole)
    assert torch.equal(keys({"b": y, "a": x, "labels": y}), whole)
    assert torch.equal(keys((x, y)), keys(x, y))
    names = [name for name, _ in sample_tensors(Batch(({"b": y, "a": {"c": x}},)))]
    assert names == ["a.c", "b"]
    assert signature_of(Batch((x, y.float()))) == [("input 0", "int64", (3,)), ("input 1", "float32", ())]


def test_what_all_samples_share_has_a_part_in_each():
    x, shared = torch.arange(6).view(2, 3), torch.arange(5)
    assert (keys(x, shared) != keys(x, shared + 1)).all()
    assert keys(x[:1], shared[None]).tolist() == keys(x, shared[None].expand(2, 5)).tolist()[:1]
    assert (keys(x, 3, None) == keys(x)).all()


def test_padding_that_the_mask_leaves_out_has_no_part():
    words, mask = torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    longer = torch.tensor([[5, 6, 7, 1, 1], [8, 9, 4, 1, 1]])
    more = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    whole = keys(input_ids=words, attention_mask=mask)
    assert torch.equal(keys(input_ids=longer, attention_mask=more), whole)
    assert (keys(input_ids=longer, attention_mask=torch.ones_like(more)) != whole).all()
    features = torch.randn(2, 3, 4)
    padded = torch.cat([features, -torch.ones(2, 2, 4)], 1)
    padded[1, 2] = -2.0
    assert torch.equal(keys(x=features, attention_mask=mask), keys(x=padded, attention_mask=more))
    assert signature_of(Batch(keywords={"x": features, "attention_mask": mask}))[1] == ("x", "float32", (-1, 4))
    assert len(set(keys(words, mask).tolist()) | set(keys(longer, more).tolist())) == 4  # no name says that it is a mask


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="data must hold tensors with a row for each sample, got Batch"):
        keys("words")


def test_empty_tensors_and_single_numbers_have_keys():
    assert len(keys(torch.empty(3, 0))) == 3
    assert len(set(keys(torch.tensor([1.0, 2.0, 2.0])).tolist())) == 2
