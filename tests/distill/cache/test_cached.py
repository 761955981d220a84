"""Cached teacher in training: the same losses as with the teacher itself, in each kind of loop, and unknown samples refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.callbacks.plain import attach
from fasterai.core.batch import Batch
from fasterai.distill.cache.cached import OFTEN, CachedTeacher, load_cached_teacher
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import FitNet
from fasterai.distill.losses.logits import DKD, SoftTarget

X, Y = torch.randn(22, 6, generator=torch.Generator().manual_seed(0)), torch.arange(22) % 3


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "a.safetensors"
    cache_teacher(net(1), (X, Y), path, dtype=torch.float32)
    return path


@pytest.fixture
def cached(path: Path) -> CachedTeacher:
    return load_cached_teacher(path)


def asked(x: Tensor, **keywords: Tensor) -> Batch:
    return Batch((x,), keywords=keywords, outputs=torch.empty(0))


def train(teacher: Any, loss: Any, inputs: Callable[[Tensor], Any] = lambda x: x) -> tuple[list[float], nn.Module]:
    """Two epochs in a loop of one's own; the last batch is small."""
    student, losses = net(2), []
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    with attach(optimizer, Distiller(teacher, loss, weight=0.9), epochs=2, steps_per_epoch=3, model=student) as handle:
        for _ in range(2):
            for rows in torch.randperm(22, generator=generator).split(8):
                optimizer.zero_grad()
                outputs = student(X[rows])
                found = handle.loss(F.cross_entropy(outputs, Y[rows]), inputs(X[rows]), Y[rows], outputs)
                found.backward()
                optimizer.step()
                losses.append(found.item())
    return losses, student


@pytest.mark.parametrize("loss", [SoftTarget(T=4), DKD()], ids=["SoftTarget", "DKD"])
def test_a_loop_of_ones_own_learns_the_same(cached: CachedTeacher, loss: Any):
    (found, student), (expected, other) = train(cached, loss), train(net(1), loss)
    assert found == pytest.approx(expected, abs=1e-6)
    for one, two in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert found != pytest.approx(train(net(4), loss)[0], abs=1e-3)


def test_inputs_in_a_dict_learn_the_same(tmp_path: Path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    cached = cache_teacher(Named(), {"x": X, "labels": Y}, tmp_path / "a", dtype=torch.float32)
    assert train(cached, SoftTarget(T=4), lambda x: {"x": x})[0] == pytest.approx(train(net(1), SoftTarget(T=4))[0], abs=1e-6)


def test_fastai_learns_the_same(tmp_path: Path):
    data = pytest.importorskip("fastai.data.core")
    from fastai.learner import Learner

    from fasterai.callbacks.fastai import KnowledgeDistillationCallback

    def fit(teacher: Any) -> Tensor:
        torch.manual_seed(0)
        datasets = TensorDataset(X, Y)
        loaders = data.DataLoaders(DataLoader(datasets, 8, shuffle=True), DataLoader(datasets, 8))
        learn = Learner(loaders, net(2), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 0.1, cbs=KnowledgeDistillationCallback(teacher(loaders), SoftTarget(T=4), weight=0.9))
        return torch.nn.utils.parameters_to_vector(learn.model.parameters())

    found = fit(lambda loaders: cache_teacher(net(1), loaders, tmp_path / "a", dtype=torch.float32))
    assert torch.allclose(found, fit(lambda _: net(1)), atol=1e-4)
    assert not torch.allclose(found, fit(lambda _: net(4)), atol=1e-4)


def test_lightning_learns_the_same(tmp_path: Path):
    pl = pytest.importorskip("lightning.pytorch")

    from fasterai.callbacks.lightning import KnowledgeDistillationCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True)

    def fit(teacher: Any) -> Tensor:
        torch.manual_seed(0)
        module = Module()
        callback = KnowledgeDistillationCallback(teacher, SoftTarget(T=4), weight=0.9)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
        pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=callback, default_root_dir=tmp_path, **quiet).fit(module, loader)
        return torch.nn.utils.parameters_to_vector(module.parameters())

    found = fit(cache_teacher(net(1), loader, tmp_path / "a", dtype=torch.float32))
    assert torch.allclose(found, fit(net(1)), atol=1e-4)


# --- what a cache does not have --------------------------------------------------------------------------------------


def test_features_are_refused_with_the_repair(cached: CachedTeacher):
    distiller = Distiller(cached, FitNet(), ["0"], ["0"])
    student = net(2)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(
        ValueError, match=r"activations_teacher must be left out .* got \['0'\]; pass the network itself as teacher"
    ):
        attach(optimizer, distiller, total_steps=1, model=student)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            asked(X[:8] + 1),
            "batch must hold samples of the cached data, bit for bit, got 8 of 8 unknown ones; switch off random",
        ),
        (asked(torch.cat([X[:6], -X[:2]])), "got 2 of 8 unknown ones"),
        (asked(X[:8].double()), r"input must be float32 \(6\), as when it was cached, got float64 \(6\); make the samples as"),
        (asked(X[:8].half()), r"input must be float32 \(6\), as when it was cached, got float16 \(6\)"),
        (asked(X[:8, :5]), r"input must be float32 \(6\), as when it was cached, got float32 \(5\); .*; pad all to one length"),
        (asked(X[:8], shift=Y[:8]), r"batch must hold \['input'\], as when it was cached, got \['input', 'shift'\]"),
    ],
)
def test_unknown_samples_are_refused(cached: CachedTeacher, batch: Batch, message: str):
    cached.begin(nn.Module(), [])
    cached.answer(asked(X[:8]))
    with pytest.raises(ValueError, match=message):
        cached.answer(batch)
    cached.end()


def test_autocast_of_the_student_makes_no_difference(cached: CachedTeacher):
    with torch.autocast("cpu", torch.bfloat16):
        found = cached.answer(Batch((X[:8],), outputs=net(2)(X[:8]))).logits
    assert torch.equal(found, cached.answer(asked(X[:8])).logits)


def test_on_an_accelerator_few_batches_wait_for_the_check(cached: CachedTeacher, monkeypatch: pytest.MonkeyPatch):
    """The first batch is checked at once, then what was counted after each hundred, and at the end."""
    looks = CachedTeacher._looks_now
    monkeypatch.setattr(CachedTeacher, "_looks_now", lambda self, _: looks(self, torch.device("cuda")))
    cached.begin(nn.Module(), [])
    with pytest.raises(ValueError, match="got 8 of 8 unknown ones"):
        cached.answer(asked(-X[:8]))
    cached.begin(nn.Module(), [])
    for i in range(OFTEN):
        cached.answer(asked(-X[:8] if i == 5 else X[:8]))
    with pytest.raises(ValueError, match="got 8 of 8 unknown ones"):
        cached.answer(asked(X[:8]))
    cached.answer(asked(-X[:3]))
    with pytest.warns(UserWarning, match="3 samples of the last batches are not in the cache, and were taught other logits"):
        cached.end()
    cached.end()


# --- the value itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_the_path_alone(cached: CachedTeacher, copied: Callable[[Any], Any]):
    other = copied(cached)
    assert torch.equal(other.answer(asked(X)).logits, cached.answer(asked(X)).logits)
    assert len(pickle.dumps(cached)) < 500


def test_it_says_what_it_is(cached: CachedTeacher):
    assert repr(cached) == "<CachedTeacher: 22 samples of (3,), float32>"
    assert "input float32 (6)" in str(cached)
    assert "264 B" in str(cached)
    assert len(cached) == 22


def test_it_trains_again_after_an_end(cached: CachedTeacher):
    first = train(cached, SoftTarget(T=4))[0]
    assert train(cached, SoftTarget(T=4))[0] == first
