"""Rows of logits and labels, and what losses have in common."""

from __future__ import annotations

import pytest
import torch

from fasterai.core.batch import Batch
from fasterai.distill.losses.logits import DKD, SoftTarget
from fasterai.distill.losses.loss import as_rows, labels_as_rows


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((6,), (6, 1)), ((4, 3), (4, 3)), ((2, 4, 3), (8, 3)), ((2, 3, 4, 5), (40, 3)), ((2, 3, 2, 2, 2), (16, 3))],
)
def test_rows_have_the_classes_last_in_float32(shape, rows):
    found = as_rows(torch.zeros(shape, dtype=torch.float16))
    assert tuple(found.shape) == rows
    assert found.dtype == torch.float32


def test_a_place_is_a_row_of_its_classes():
    logits = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    assert as_rows(logits)[5].tolist() == logits[1, :, 0, 1].tolist()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_numbers_are_whole_ones_of_one_type(kind, shape):
    labels = torch.tensor([2, 0, 1, 2], dtype=kind).view(shape)
    rows = labels_as_rows(labels, torch.zeros(4, 3))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [2, 0, 1, 2]


def test_shares_have_the_shape_of_the_logits():
    shares = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    rows = labels_as_rows(shares, torch.zeros(2, 3, 4, 5))
    assert torch.equal(rows, shares.permute(0, 2, 3, 1).reshape(-1, 3).float())
    assert labels_as_rows(torch.tensor([1, 2]), torch.zeros(2)).tolist() == [1, 2]  # of values without classes


def test_the_labels_of_a_batch_are_its_targets():
    y = torch.tensor([1])
    assert SoftTarget().labels_of(Batch((), (y,))) is y
    assert DKD().labels_of(Batch((), (), {"labels": y})) is y
    assert DKD().labels_of(Batch()) is None
