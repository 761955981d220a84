"""Batches of fastai as participants see them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import TensorBase, TensorImage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fasterai.callbacks.fastai import KnowledgeDistillationCallback, SparsifyCallback
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


class Unlabelled(Dataset):
    """Rows without labels, as a tuple of one."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return (torch.full((4,), float(i)),)


@pytest.mark.parametrize("sort", ["distils", "sparsifies"])
def test_batches_without_targets_are_refused(sort, tmp_path):
    """fastai takes no step with them: whatever was asked would not have been done."""
    data = DataLoader(Unlabelled(), 4)
    model = nn.Sequential(nn.Linear(4, 3))
    learn = Learner(DataLoaders(data, data), model, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    other = copy.deepcopy(model)
    callback = (
        KnowledgeDistillationCallback(other, "SoftTarget")
        if sort == "distils"
        else SparsifyCallback(0.5, "weight", "local", "large_final", "lin")
    )
    message = (
        r"dls must give batches of inputs and targets, got 1 input alone, with which fastai takes no step; give the data set"
    )
    with pytest.raises(ValueError, match=message):
        learn.fit(1, cbs=callback)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not model[0]._forward_hooks and len(learn.opt.all_params()) == 2
    assert not [one for one in learn.cbs if "Relay" in type(one).__name__]
