"""Batches of fastai as participants see them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.torch_core import TensorBase, TensorImage
from torch import Tensor

from fasterai.callbacks.fastai_batches import batch_of, plain


def mixing(kind: type, share: Any, others: list[int], stacks: bool = True) -> Any:
    callback = kind()
    callback.stack_y, callback.lam, callback.yb1 = stacks, torch.tensor(share), (TensorBase(torch.tensor(others)),)
    return callback


def learner(labels: Tensor, outputs: Any, *callbacks: Any) -> Any:
    return SimpleNamespace(xb=(TensorImage(torch.ones(2, 3, 1, 1)),), yb=(TensorBase(labels),), pred=outputs, cbs=callbacks)


def test_all_tensors_are_plain_and_those_that_are_stay_themselves():
    x = torch.ones(2)
    batch = batch_of(learner(torch.tensor([0, 1]), TensorBase(torch.ones(2, 3))), with_outputs=True)
    assert [type(t) for t in (batch.inputs[0], batch.labels, batch.outputs)] == [Tensor] * 3
    assert plain((x, {"a": x}))[1]["a"] is x


def test_labels_that_mixup_has_mixed_are_shares():
    learn = learner(torch.tensor([0, 1]), torch.zeros(2, 3), mixing(MixUp, [0.75, 0.5], [2, 1]))
    assert batch_of(learn, with_outputs=True).labels.tolist() == [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]
    assert batch_of(learn).labels.tolist() == [0, 1]  # before the model has run


def test_labels_that_cutmix_has_mixed_are_shares_of_one_size():
    learn = learner(torch.tensor([0, 1]), torch.zeros(2, 3), mixing(CutMix, [0.75], [2, 2]))
    assert batch_of(learn, with_outputs=True).labels.tolist() == [[0.75, 0.0, 0.25], [0.0, 0.75, 0.25]]


@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4, 4), 1), ((2, 5, 3), -1)])
def test_shares_have_the_shape_of_the_logits(shape, dim):
    labels = torch.zeros(torch.zeros(shape).select(dim, 0).shape, dtype=torch.long)
    learn = learner(labels, torch.zeros(shape), mixing(MixUp, [0.75, 0.5], (labels + 2).tolist()))
    found = batch_of(learn, with_outputs=True).labels.movedim(dim, -1)
    assert found.reshape(2, -1, 3)[0, 0].tolist() == [0.75, 0.0, 0.25]
    assert found.reshape(2, -1, 3)[1, 0].tolist() == [0.5, 0.0, 0.5]


def test_a_loss_without_class_numbers_has_been_mixed_by_fastai_itself():
    learn = learner(torch.tensor([0.3, 0.7]), torch.zeros(2, 1), mixing(MixUp, [0.75, 0.5], [0, 1], stacks=False))
    assert batch_of(learn, with_outputs=True).labels.tolist() == pytest.approx([0.3, 0.7])
