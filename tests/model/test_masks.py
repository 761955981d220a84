from __future__ import annotations

import itertools
import math

import pytest
import torch

from fasterai.model import masks
from fasterai.model.masks import PIECE, apply_masks_, like


def masked(tensor, mask):
    """The oracle: torch's own product, into a copy."""
    return tensor.detach().clone() * mask.to(tensor.dtype)


def test_by_hand():
    tensor = torch.tensor([1.0, -2.0, 3.0])
    apply_masks_([(tensor, torch.tensor([True, False, True]))])
    assert tensor.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (4, 3, 3, 3), (0, 3)])
def test_masks_of_the_tensors_shape(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    mask = torch.rand(shape) > 0.5
    wanted = masked(tensor, mask)
    apply_masks_([(tensor, mask)])
    assert torch.equal(tensor, wanted)
    assert tensor.dtype == dtype


@pytest.mark.parametrize("mask_shape", [(4, 1, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1), (1, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_that_broadcast(mask_shape, dtype):
    tensor = torch.randn(4, 3, 2, 2).to(dtype)
    mask = torch.rand(mask_shape) > 0.5
    wanted = masked(tensor, mask)
    apply_masks_([(tensor, mask)])
    assert torch.equal(tensor, wanted)


SHARED = [(5, 4, 3, 3), (6, 70, 2, 3), (3, 2, 5, 2, 2), (7, 1, 3, 3), (1, 5, 3, 3), (9, 130), (2, 3, 4, 3, 3), (3, 0, 2, 2)]


@pytest.mark.parametrize("piece", [40, PIECE])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHARED)
def test_decisions_that_several_weights_share(shape, piece, last, monkeypatch):
    """Every way to share: each dimension kept or not, spread by a pattern, in pieces, or by torch."""
    monkeypatch.setattr(masks, "PIECE", piece)
    for kept in itertools.product([False, True], repeat=len(shape)):
        tensor = torch.randn(shape)
        tensor = tensor.to(memory_format=torch.channels_last) if last and len(shape) == 4 else tensor
        mask = torch.rand([n if stays else 1 for n, stays in zip(shape, kept, strict=True)]) > 0.5
        wanted = masked(tensor, mask)
        apply_masks_([(tensor, mask)])
        assert torch.equal(tensor, wanted), kept


def test_what_a_shared_decision_keeps_is_untouched_bit_for_bit():
    weight = torch.tensor([1e-45, -3.4e38, 1e-40, -0.0, 5.0, math.pi, 1e-30, 2.0, 3.0]).expand(4, 2, 9).clone().view(4, 2, 3, 3)
    for shape in ((4, 2, 3, 1), (4, 2, 1, 3), (4, 1, 3, 3), (1, 1, 3, 3), (4, 2, 1, 1)):
        tensor, mask = weight.clone(), torch.rand(shape) > 0.3
        apply_masks_([(tensor, mask)])
        assert torch.equal(tensor.view(torch.int32)[mask.expand_as(tensor)], weight.view(torch.int32)[mask.expand_as(tensor)])
        assert (tensor[~mask.expand_as(tensor)] == 0).all()


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5])
def test_more_than_one_piece(size):
    tensor = torch.randn(size)
    mask = torch.rand(size) > 0.5
    wanted = masked(tensor, mask)
    apply_masks_([(tensor, mask)])
    assert torch.equal(tensor, wanted)


def views():
    base = torch.randn(6, 4, 3, 2)
    yield "contiguous", base.clone()
    yield "channels_last", base.clone(memory_format=torch.channels_last)
    yield "transposed", base.clone().transpose(0, 1)
    yield "strided", torch.randn(12, 4, 3, 2)[::2]
    yield "offset", torch.randn(7, 4, 3, 2)[1:]


@pytest.mark.parametrize(("name", "tensor"), views(), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("mask_format", ["contiguous", "like"])
def test_any_memory_format_of_tensor_and_mask(name, tensor, mask_format):
    tensor = tensor.clone() if name in ("contiguous", "channels_last") else tensor
    mask = torch.rand(tensor.shape) > 0.5
    mask = like(tensor, mask) if mask_format == "like" else mask
    wanted = masked(tensor, mask)
    apply_masks_([(tensor, mask)])
    assert torch.equal(tensor, wanted)


def test_what_lies_around_a_view_stays():
    base = torch.ones(10)
    apply_masks_([(base[2:5], torch.zeros(3, dtype=torch.bool))])
    assert base.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]


def test_parameters_are_masked_without_a_trace_in_autograd():
    weight = torch.nn.Parameter(torch.ones(3))
    apply_masks_([(weight, torch.tensor([True, False, True]))])
    assert weight.tolist() == [1, 0, 1]
    assert weight.requires_grad and weight.is_leaf and weight.grad_fn is None


def test_what_is_pruned_is_zero_and_what_is_kept_is_untouched_bit_for_bit():
    tensor = torch.tensor([1e-45, -3.4e38, 1e-40, -0.0, 5.0])
    before = tensor.clone()
    apply_masks_([(tensor, torch.tensor([True, True, False, True, False]))])
    bits = torch.int32  # so that -0.0 and 0.0 differ
    assert torch.equal(tensor[[0, 1, 3]].view(bits), before[[0, 1, 3]].view(bits))
    assert (tensor[[2, 4]] == 0).all()


def test_several_pairs_in_one_call_and_none():
    small, large = torch.ones(3), torch.ones(PIECE + 2)
    apply_masks_([(large, torch.zeros(PIECE + 2, dtype=torch.bool)), (small, torch.tensor([True, True, False]))])
    assert large.count_nonzero() == 0
    assert small.tolist() == [1, 1, 0]
    apply_masks_([])


def test_the_mask_is_not_changed():
    mask = torch.tensor([True, False])
    apply_masks_([(torch.ones(2), mask)])
    assert mask.tolist() == [True, False]


def test_like_takes_the_weights_memory_format():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 3, 2, 2) > 0.5
    found = like(weight, mask)
    assert found.stride() == weight.stride() != mask.stride()
    assert found.dtype == torch.bool and torch.equal(found, mask)
    assert like(mask, mask) is mask
    small = torch.ones(4, 1, 1, 1, dtype=torch.bool)
    assert like(weight, small) is small
