from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fasterai.core import sums
from fasterai.core.criteria import large_final, movement
from fasterai.core.scores import EvidenceScores, TensorScores
from fasterai.core.sums import sum_parts
from fasterai.core.types import Evidence

SHAPES = [(5, 4, 3, 3), (6, 70, 2, 3), (7, 3, 1, 1), (4, 130), (3, 2, 5, 2, 2), (2, 3, 4, 3, 3), (1, 1, 3, 3), (1,), (0, 3, 3)]


def choices(shape):
    return [dims for n in range(1, len(shape) + 1) for dims in itertools.combinations(range(len(shape)), n)]


@pytest.mark.parametrize("piece", [1, 50, 1 << 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_float64(monkeypatch, shape, piece):
    monkeypatch.setattr(sums, "PIECE", piece)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    for dims in choices(shape):
        found = sum_parts(TensorScores("x", x), dims)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, x.double().sum(dims, keepdim=True).float(), rtol=1e-5, atol=1e-5)
    assert sum_parts(TensorScores("x", x.double()), choices(shape)[-1]).dtype is torch.float64


@pytest.mark.parametrize("shape", [(11, 5, 3, 3), (11, 70, 3, 3), (11, 130)])
def test_equal_units_score_exactly_the_same_wherever_they_are(monkeypatch, shape):
    """Ties are settled by position, so a rounding error that depends on the place would choose instead."""
    monkeypatch.setattr(sums, "PIECE", 3 * 5 * 9)
    unit = torch.from_numpy(np.random.default_rng(0).standard_normal(shape[1:]).astype(np.float32))
    for dims in choices(shape):
        if 0 not in dims:
            found = sum_parts(TensorScores("x", unit.expand(shape).contiguous()), dims)
            assert (found == found[:1]).all()


@pytest.mark.parametrize("dims", choices((6, 20, 3, 3)))
def test_the_memory_format_changes_no_bit(dims):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 20, 3, 3)).astype(np.float32))
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(sum_parts(TensorScores("x", x), dims), sum_parts(TensorScores("x", last), dims))


@pytest.mark.parametrize("criterion", [large_final, movement])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_that_are_held_nowhere_sum_up_alike(criterion, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 4, 3, 3, generator=generator).to(dtype) for name in ("weight", *criterion.needs)}
    by_part = EvidenceScores("x", Evidence("x", **tensors), criterion)
    for dims in choices((6, 4, 3, 3)):
        assert torch.equal(sum_parts(by_part, dims), sum_parts(TensorScores("x", by_part.tensor()), dims))
    assert torch.equal(tensors["weight"], by_part.evidence.weight)


def test_by_hand():
    x = torch.arange(12.0).view(2, 2, 3)  # [[[0 1 2] [3 4 5]] [[6 7 8] [9 10 11]]]
    assert sum_parts(TensorScores("x", x), [2]).tolist() == [[[3.0], [12.0]], [[21.0], [30.0]]]
    assert sum_parts(TensorScores("x", x), [1]).tolist() == [[[3.0, 5.0, 7.0]], [[15.0, 17.0, 19.0]]]
    assert sum_parts(TensorScores("x", x), [0, 2]).tolist() == [[[24.0], [42.0]]]


def test_a_nan_stays_where_it_is():
    x = torch.ones(3, 2, 3, 3)
    x[1, 0, 2, 2] = torch.nan
    assert sum_parts(TensorScores("x", x), [1, 2, 3]).flatten().isnan().tolist() == [False, True, False]
