"""What a run of distillation shows, leaves, and goes on with, in each framework."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import fastai.callback.schedule  # noqa: F401 - gives the Learner its lr_find
import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from torch import Tensor, nn

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.core.loop import Participant
from fasterai.distill.average import EMATeacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.loss import LogitLoss
from fasterai.sparse.sparsifier import Sparsifier
from tests.callbacks import test_own_method as resuming
from tests.callbacks.distilled import (
    EPOCHS,
    InOrder,
    Module,
    Net,
    Squares,
    Widened,
    arguments,
    items,
    learner,
    loader,
    teacher,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FEATURES: dict[str, Any] = {"activations_student": ["body"], "activations_teacher": ["body"]}
CALLBACKS = {"fastai": for_fastai, "lightning": for_lightning, "huggingface": for_huggingface}


def distiller(**options: Any) -> Distiller:
    return Distiller(teacher(), [Squares(), Widened()], **FEATURES, weight=0.6, **options)


def fit(framework: str, student: nn.Module, callbacks: list[Any], folder: Any, **options: Any) -> Any:
    """Train a student in one of the three; return the learner, the trainer, or the Trainer."""
    if framework == "fastai":
        learn = learner(student, folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit(options.get("epochs", EPOCHS), cbs=callbacks)
        return learn
    if framework == "lightning":
        train = trainer(folder, *callbacks, max_epochs=options.get("epochs", EPOCHS))
        train.fit(student if isinstance(student, pl.LightningModule) else Module(student), loader(), loader())
        return train
    train = InOrder(
        student,
        arguments(folder, logging_strategy="epoch", eval_strategy="epoch"),
        train_dataset=items(),
        eval_dataset=items(),
        callbacks=callbacks,
    )
    train.train()
    return train


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", resuming.FRAMEWORKS)
def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    """With dropout in the student, adapters, a schedule, and masks that move."""

    def given(model: Net) -> list[Any]:
        return [distiller(schedule="cos"), Sparsifier(model, "weight", "local", "large_final", sparsity=0.5, schedule="lin")]

    whole, stopped, resumed = Net(), Net(), Net()
    ours, first, second = given(whole), given(stopped), given(resumed)
    run(whole, ours, tmp_path / "whole", stop=False, resume=False)
    (tmp_path / "parts").mkdir()
    run(stopped, first, tmp_path / "parts", stop=True, resume=False)
    run(resumed, second, tmp_path / "parts", stop=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    a, b = (one[0].state_dict()["adapters"][1]["matrix"] for one in (ours, second))
    assert torch.equal(a, b) and not torch.equal(a, torch.full_like(a, 0.1))
    assert ours[0].metrics() == second[0].metrics()


@pytest.mark.parametrize("framework", ["fastai", "lightning"])
def test_the_callback_itself_resumes_with_an_average_for_a_teacher(framework, tmp_path, monkeypatch):
    adapter, run = CALLBACKS[framework], getattr(resuming, framework)
    ours = SimpleNamespace(
        ParticipantCallback=lambda: adapter.KnowledgeDistillationCallback(
            EMATeacher(0.9), Squares(), weight=0.6, schedule="cos"
        )
    )
    monkeypatch.setattr(resuming, f"for_{framework}", ours)
    whole, stopped, resumed = Net(), Net(), Net()
    (tmp_path / "parts").mkdir()
    run(whole, [], tmp_path / "whole", stop=False, resume=False)
    run(stopped, [], tmp_path / "parts", stop=True, resume=False)
    run(resumed, [], tmp_path / "parts", stop=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Noting(Callback):
    """Notes the adapter's values with the first batch."""

    order = 1000

    def __init__(self, distiller: Distiller) -> None:
        self.distiller, self.first = distiller, None

    def after_loss(self) -> None:
        if self.first is None:
            self.first = self.distiller.state_dict()["adapters"][0]["matrix"]


def test_a_second_fit_goes_on_with_the_adapters_of_the_first(tmp_path):
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), Widened(), ["body"], ["body"])
    learn = learner(Net(), tmp_path)
    seen = []
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callback)
        seen.append(callback.distiller.state_dict()["adapters"][0]["matrix"])
        assert len(learn.opt.all_params()) == 4  # it has left the optimizer
        again = Noting(callback.distiller)
        learn.fit(1, cbs=[callback, again])
    assert torch.equal(again.first, seen[0])
    assert not torch.equal(callback.distiller.state_dict()["adapters"][0]["matrix"], seen[0])
    with learn.no_bar(), learn.no_logging():
        learn.model = Net(10)
        learn.create_opt()
        learn.fit(1, cbs=callback)  # a student of another width
    assert callback.distiller.state_dict()["adapters"][0]["matrix"].shape == (12, 10)


# --- figures ----------------------------------------------------------------------------------------------------------


def loss_of(student: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(F.cross_entropy(student(x), y)) for x, y in loader()) / 4


def test_fastai_shows_the_losses_of_the_task_and_that_of_the_distillation(tmp_path):
    """D-K2: the recorded loss of validation was the mixture, 0.161 where that of the task was 1.415."""
    student = Net()
    learn = learner(student, tmp_path, metrics=accuracy, lr=0.0)
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), Squares(), weight=0.9)
    stops, saves = EarlyStoppingCallback(patience=5), SaveModelCallback()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[callback, stops, saves])
        names, (train, valid, right, distilled) = learn.recorder.metric_names, learn.recorder.values[-1]
        validated = learn.validate()[0]
    assert list(names) == ["epoch", "train_loss", "valid_loss", "accuracy", "distill_loss", "time"]
    assert train == pytest.approx(loss_of(student), rel=0.1)  # smoothed over batches
    assert valid == pytest.approx(loss_of(student), rel=1e-5) == validated
    assert stops.best == saves.best == pytest.approx(valid)
    each = [float((student(x) - teacher().eval()(x)).square().mean()) for x, _ in loader()]
    assert distilled == pytest.approx(sum(each) / len(each), rel=1e-5)  # the mean over the epoch's batches
    assert right == pytest.approx(sum(float((student(x).argmax(1) == y).float().mean()) for x, y in loader()) / 4)


def test_two_callbacks_have_columns_of_their_own(tmp_path):
    learn = learner(Net(), tmp_path, lr=0.0)
    kinds = Squares(), Squares(scale=2.0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[for_fastai.KnowledgeDistillationCallback(teacher(), one) for one in kinds])
    columns = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert list(columns) == ["train_loss", "valid_loss", "distill_loss", "distill_loss_2"]
    assert columns["distill_loss_2"] == pytest.approx(2 * columns["distill_loss"])


class Fails(Squares):
    def __call__(self, *_: Any) -> Tensor:
        raise RuntimeError("of a loss of one's own")


def test_an_error_of_a_loss_names_the_callback(tmp_path):
    learn = learner(Net(), tmp_path)
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), Fails())
    with pytest.raises(RuntimeError, match="of a loss of one's own") as caught, learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callback)
    assert "KnowledgeDistillationCallback" in str(caught.value) and "Relay" not in str(caught.value)


def test_lightning_logs_the_loss_of_the_task_and_that_of_the_distillation(tmp_path):
    student = Net()
    callback = for_lightning.KnowledgeDistillationCallback(teacher(), Squares(), weight=0.9)
    train = fit("lightning", student, [callback], tmp_path)
    assert float(train.callback_metrics["valid_loss"]) == pytest.approx(loss_of(student), rel=1e-5)
    assert float(train.callback_metrics["distill_loss"]) == pytest.approx(callback.distiller.metrics()["distill_loss"])


def test_the_trainer_validates_the_task_and_logs_the_distillation(tmp_path):
    student = Net()
    callback = for_huggingface.KnowledgeDistillationCallback(teacher(), Squares(), weight=0.9)
    train = fit("huggingface", student, [callback], tmp_path)
    logs: dict[str, Any] = {}
    for entry in train.state.log_history:
        logs |= entry
    assert logs["eval_loss"] == pytest.approx(loss_of(student), rel=1e-4)
    assert logs["distill_loss"] == pytest.approx(callback.distiller.metrics()["distill_loss"])


# --- beside others ----------------------------------------------------------------------------------------------------


class Shrinks(Participant):
    """Adds a penalty of the outputs to the loss."""

    def after_loss(self, loss: Tensor, batch: Any) -> Tensor:
        return loss + 0.3 * batch.logits.square().mean()


def beside(framework: str, folder: Any, reverse: bool, others: Any) -> Net:
    adapter, student = CALLBACKS[framework], Net()
    callbacks = [adapter.KnowledgeDistillationCallback(teacher(), Squares(), weight=0.6), *others(adapter, student)]
    torch.manual_seed(3)
    fit(framework, student, callbacks[::-1] if reverse else callbacks, folder)
    return student


@pytest.mark.parametrize("others", ["penalty", "two teachers", "masks", "holds"])
@pytest.mark.parametrize("framework", CALLBACKS)
def test_the_order_of_callbacks_decides_nothing(framework, others, tmp_path):
    """D-K6: the loss was 1.548 in one order, and 1.140 in the other."""

    def made(adapter: Any, student: Net) -> list[Any]:
        if others == "penalty":
            return [adapter.ParticipantCallback(Shrinks())]
        if others == "two teachers":
            return [adapter.ParticipantCallback(Distiller(Net(5, seed=9), Squares(), weight=0.3))]
        if others == "masks":
            return [adapter.SparsifyCallback(0.5, "weight", "local", "large_final", "lin")]
        sparsifier = Sparsifier(student, "weight", "local", "large_final")
        sparsifier.sparsify_model(0.5)
        return [adapter.HoldCallback(sparsifier)]

    one, other = (beside(framework, tmp_path / str(reverse), reverse, made) for reverse in (False, True))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if others in ("masks", "holds"):
        assert int((one.body.weight == 0).sum()) == 24


SEEN: list[Tensor] = []


@dataclass(frozen=True)
class Named(LogitLoss):
    """Minus the logits, by shares of classes."""

    needs_labels = True

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        SEEN.append(labels)
        return -(student * labels).sum(1)


@pytest.mark.parametrize("reverse", [False, True])
def test_with_mixup_a_loss_gets_the_shares_of_the_classes(reverse, tmp_path):
    SEEN.clear()
    student = Net()
    learn = learner(student, tmp_path)
    callbacks = [MixUp(), for_fastai.KnowledgeDistillationCallback(teacher(), Named(), weight=0.6)]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callbacks[::-1] if reverse else callbacks)
    assert all(x.shape == (8, 3) for x in SEEN) and len(SEEN) == 4
    torch.testing.assert_close(SEEN[0].sum(1), torch.ones(8))
    assert bool(((SEEN[0] > 0) & (SEEN[0] < 1)).any())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("framework", CALLBACKS)
def test_a_student_that_is_pruned_learns_from_its_dense_copy(framework, reverse, tmp_path):
    adapter, student = CALLBACKS[framework], Net()
    dense = copy.deepcopy(student)
    distils = adapter.KnowledgeDistillationCallback(dense, Widened(), ["body"], ["body"])
    x, _ = next(iter(loader()))
    removes = adapter.PruneCallback(0.5, "lin", "local", "large_final", example_inputs=x)
    if framework == "lightning":
        removes = adapter.SparsifyCallback(0.5, "row", "local", "large_final", "lin", targets="*body*")
    fit(framework, student, [removes, distils] if reverse else [distils, removes], tmp_path)
    (matrix,) = distils.distiller.state_dict()["adapters"][0].values()
    if framework == "lightning":
        assert int((student.body.weight == 0).all(1).sum()) == 4
    else:
        assert student.body.weight.shape == (4, 6)
        assert matrix.shape == (8, 4)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), Net().parameters(), strict=True))
    assert all(p.grad is None for p in dense.parameters())


# --- what is left -----------------------------------------------------------------------------------------------------


class Breaks(Participant):
    """Fails at the sixth step."""

    def after_step(self, position: float) -> None:
        if position > 0.7:
            raise RuntimeError("broken")


@pytest.mark.parametrize("framework", CALLBACKS)
def test_a_fit_that_fails_leaves_no_hook_and_gives_the_modes_back(framework, tmp_path):
    adapter, student, other = CALLBACKS[framework], Net(), teacher()
    other.drop.eval()
    before = [m.training for m in other.modules()]
    distils = adapter.KnowledgeDistillationCallback(other, [Squares(), Widened()], **FEATURES)
    with pytest.raises(RuntimeError, match="broken"):
        fit(framework, student, [distils, adapter.ParticipantCallback(Breaks())], tmp_path)
    if framework == "huggingface":  # the Trainer tells its callbacks of no failure: the next forward pass does
        distils.on_train_begin(arguments(tmp_path), None, None, model=student)
        distils._end(completed=False)
    assert hooks(student) == hooks(other) == 0
    assert [m.training for m in other.modules()] == before != [m.training for m in copy.deepcopy(other).eval().modules()]
    fit(framework, student, [distils], tmp_path / "again", epochs=1)
    assert hooks(student) == hooks(other) == 0
    assert [m.training for m in other.modules()] == before


def test_fastais_other_passes_are_none_of_its(tmp_path):
    callback = for_fastai.KnowledgeDistillationCallback(Unused(), Squares(), weight=1.0)
    learn, bare = learner(Net(), tmp_path, cbs=callback), learner(Net(), tmp_path)
    for one in (learn, bare):
        with one.no_bar(), one.no_logging():
            one.found = [one.validate()[0], one.get_preds()[0], one.lr_find(num_it=10, show_plot=False).valley]
    assert learn.found[0] == bare.found[0] and learn.found[2] == bare.found[2]
    assert torch.equal(learn.found[1], bare.found[1])
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), Net().parameters(), strict=True))


class Unused(Net):
    def forward(self, *_: Any) -> Any:
        raise AssertionError("the teacher was asked")


def tabular(folder: Any, layers: list[int], **options: Any) -> Any:
    frame = pd.DataFrame({"a": range(32), "k": ["x", "y"] * 16, "y": [0, 1, 1, 0] * 8})
    dls = TabularDataLoaders.from_df(
        frame,
        folder,
        procs=[Categorify, Normalize],
        cat_names=["k"],
        cont_names=["a"],
        y_names="y",
        bs=8,
        y_block=CategoryBlock(),
    )
    return tabular_learner(dls, layers=layers, path=folder, **options)


def test_a_learner_can_be_copied_pickled_and_exported_with_the_callback(tmp_path):
    """Of a network with two inputs, as fastai's for tables."""
    layers = {"activations_student": ["layers.0.0"], "activations_teacher": ["layers.0.0"]}
    callback = for_fastai.KnowledgeDistillationCallback(tabular(tmp_path, [12]), [Squares(), Widened()], **layers)
    learn = tabular(tmp_path, [8], cbs=callback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        copies = [copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model)), copy.deepcopy(callback.distiller)]
        learn.export(tmp_path / "learner.pkl")
    assert all(torch.equal(a, b) for one in copies[:2] for a, b in zip(one.parameters(), learn.model.parameters(), strict=True))
    loaded = load_learner(tmp_path / "learner.pkl")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), learn.model.parameters(), strict=True))
    assert len(copies[2].state_dict()["adapters"]) == 2
