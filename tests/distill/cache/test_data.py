"""Data that a teacher answers for: each form of it gives every sample once, and what cannot be cached is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fasterai.core.batch import Batch
from fasterai.distill.cache.data import source_of, untouched_generators

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)


class Rows(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "labels": Y[i]}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


def first_inputs(batch: Batch) -> Tensor:
    return batch.inputs[0] if batch.inputs else batch.keywords["x"]


def fastai_loaders(**given: Any) -> Any:
    data = pytest.importorskip("fastai.data.core")
    datasets = data.Datasets(list(range(10)), [[lambda i: X[i]], [lambda i: Y[i]]], splits=[[*range(10)], [0]])
    return datasets.dataloaders(bs=4, **given)


FORMS = {
    "tensor": X,
    "pair": (X, Y),
    "two inputs": ((X, X), Y),
    "dict": {"x": X, "labels": Y},
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffled": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "no batches": DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, drop_last=True),
    "data set": Rows(),
    "stream": DataLoader(Stream(), batch_size=4),
    "list": [(X[:7], Y[:7]), (X[7:], Y[7:])],
    "batches": [Batch((X[:7],)), Batch((X[7:],))],
    "fastai": fastai_loaders,
    "fastai's training": lambda: fastai_loaders().train,
    "torch's in fastai": lambda: pytest.importorskip("fastai.data.core").DataLoaders(FORMS["shuffled"], FORMS["loader"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_every_sample(form: str):
    data = FORMS[form]
    source = source_of(data() if callable(data) else data, 4)
    for _ in range(2):
        batches = list(source.batches())
        assert torch.equal(torch.cat([first_inputs(batch) for batch in batches]).sort(0).values, X)
    assert source.count in (len(batches), None)
    assert (source.count is None) == (form == "stream")
    assert source.repeats
    if form not in ("stream", "list", "batches") and source.few is not None:
        assert torch.equal(first_inputs(source.few()), first_inputs(source.few()))
    assert (source.few is None) == (form in ("tensor", "pair", "two inputs", "dict", "stream", "list", "batches"))


def test_fastai_divides_as_its_learner_does():
    data = pytest.importorskip("fastai.data.core")
    loader = DataLoader(TensorDataset(X, X + 1, Y), batch_size=4)
    batch = next(source_of(data.DataLoaders(loader, loader), 4).batches())
    assert len(batch.inputs) == 2
    assert len(next(source_of(loader, 4).batches()).inputs) == 1  # as in the other loops


def test_a_generator_is_gone_through_once():
    source = source_of(((x, None) for x in X.split(4)), 4)
    assert not source.repeats
    assert source.count is None
    assert len(list(source.batches())) == 3


def test_a_shuffled_loader_that_leaves_samples_out_is_refused():
    with pytest.raises(
        ValueError, match="data must give every sample, got a shuffled loader whose drop_last leaves out 2 of 10"
    ):
        source_of(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True), 4)


def test_a_loader_that_leaves_the_same_out_is_told_of():
    with pytest.warns(UserWarning, match="data leaves out 2 of 10 samples by drop_last"):
        source = source_of(DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True), 4)
    assert source.count == 2


@pytest.mark.parametrize("data", [3, "folder", None])
def test_what_is_no_data_is_refused(data: Any):
    with pytest.raises(TypeError, match="data must be a loader, a data set, an iterable of batches or tensors, got"):
        source_of(data, 4)


def test_samples_of_fastai_that_no_loader_makes_batches_of_are_refused():
    with pytest.raises(TypeError, match="data must be a loader"):
        source_of(fastai_loaders().train_ds, 4)


def test_tensors_without_rows_are_refused():
    with pytest.raises(ValueError, match="data must hold tensors with a row for each sample"):
        source_of(torch.tensor(1.0), 4)


def test_random_generators_are_as_before():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
    before = torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].copy()
    with untouched_generators(loader):
        list(loader)
        torch.rand(1), random.random(), np.random.rand()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[3]).all()


@pytest.mark.parametrize("kind", ["rows", "loader"])
def test_rows_of_lists_that_nobody_has_stacked_are_refused(kind: str):
    rows: Any = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}]
    source = source_of(rows if kind == "rows" else DataLoader(rows, batch_size=2), 2)
    with pytest.raises(
        TypeError, match=r"data must give batches of tensors, got a list under input_ids; pass DataLoader\(data, "
    ):
        next(source.batches())
