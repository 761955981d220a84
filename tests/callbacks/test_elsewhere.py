"""A callback of one framework in another one names the right import, and nothing is changed."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

NAMES = {"fastai": "fastai", "lightning": "Lightning", "huggingface": "Hugging Face"}
CASES = [(own, other) for own in NAMES for other in NAMES if own != other]


def callback_of(own: str):
    module = importlib.import_module(f"fasterai.callbacks.{own}")
    return module.SparsifyCallback(0.5, "weight", "local", "large_final", "one_cycle")


def into_fastai(callback, path) -> None:
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner

    loader = TfmdDL([(torch.ones(2), torch.ones(1))] * 4, bs=2, num_workers=0)
    Learner(DataLoaders(loader, loader), nn.Linear(2, 1), loss_func=nn.MSELoss(), cbs=callback, path=path)


def into_lightning(callback, path) -> None:
    from lightning.pytorch import Trainer

    Trainer(callbacks=[callback], logger=False, default_root_dir=path, accelerator="cpu")


def into_huggingface(callback, path) -> None:
    from transformers import Trainer, TrainingArguments

    options = TrainingArguments(str(path), use_cpu=True, report_to=[])
    Trainer(nn.Linear(2, 1), options, train_dataset=[{}], callbacks=[callback])


INTO = {"fastai": into_fastai, "lightning": into_lightning, "huggingface": into_huggingface}


@pytest.mark.parametrize(("own", "other"), CASES)
def test_it_is_refused_when_it_is_given_and_names_the_right_import(own, other, tmp_path):
    argument = "cbs" if other == "fastai" else "callbacks"
    kind = "SparsifyCallback"
    wanted = f"^{argument} must be {NAMES[other]}'s, got {NAMES[own]}'s {kind}; from fasterai.callbacks.{other} import {kind}"
    with pytest.raises(TypeError, match=wanted):
        INTO[other](callback_of(own), tmp_path)


@pytest.mark.parametrize("own", NAMES)
def test_in_its_own_it_is_taken(own, tmp_path):
    INTO[own](callback_of(own), tmp_path)


@pytest.mark.parametrize("own", ["lightning", "huggingface"])
def test_what_it_has_not_is_missing_as_ever_and_it_is_copied(own):
    callback = callback_of(own)
    with pytest.raises(AttributeError, match="'SparsifyCallback' object has no attribute 'nothing'"):
        callback.nothing  # noqa: B018 - asked for
    assert not hasattr(callback, "learn")
    assert copy.deepcopy(callback).sparsity == pickle.loads(pickle.dumps(callback)).sparsity == 0.5


def test_no_sparsifier_yet_is_told_from_one_of_another_type():
    from fasterai.callbacks.lightning import HoldCallback

    with pytest.raises(TypeError, match=r"got NoneType; a callback has none before its first batch, .*mask_zeros\(\)$"):
        HoldCallback(None)
    with pytest.raises(TypeError, match=r"got Linear; after a fit pass its callback's `.sparsifier`$"):
        HoldCallback(nn.Linear(1, 1))
