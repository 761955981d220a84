"""Distillation of models of other forms in each framework: results, inputs, names of layers, what a teacher may be given as."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.distill.average import EMATeacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import DKD, SoftTarget
from tests.callbacks.distilled import InOrder, Module, Net, Squares, Widened, arguments, learner, loader, teacher, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [for_fastai, for_lightning, for_huggingface])
def test_the_arguments_are_those_of_the_public_callback(adapter):
    other = teacher()
    callback = adapter.KnowledgeDistillationCallback(SimpleNamespace(model=other), SoftTarget, None, None, 0.3, "cos")
    assert callback.distiller.teacher.model is other
    assert callback.distiller.losses == [SoftTarget()]
    assert callback.distiller.weight == 0.3
    assert repr(callback) == "<KnowledgeDistillationCallback: SoftTarget(T=5.0), weight 0.3, schedule cos>"
    warm = adapter.KnowledgeDistillationCallback(other, [partial(SoftTarget, T=30), "logits"])
    assert [type(one).__name__ for one in warm.distiller.losses] == ["SoftTarget", "Logits"]
    assert warm.distiller.losses[0].T == 30 and warm.distiller.weight == 0.5
    assert repr(warm) == "<KnowledgeDistillationCallback: SoftTarget(T=30) + Logits(), weight 0.5>"
    own = adapter.KnowledgeDistillationCallback(other, DKD(scale=0.5), schedule=lambda position: position)
    assert repr(own).endswith(": DKD(scale=0.5, alpha=1.0, beta=8.0, T=4.0), weight 0.5, schedule <lambda>>")


@pytest.mark.parametrize("adapter", [for_fastai, for_lightning, for_huggingface])
def test_another_weight_of_the_callback_is_the_distillers(adapter):
    callback = adapter.KnowledgeDistillationCallback(teacher(), SoftTarget, weight=0.3)
    callback.weight = 0.7
    assert callback.weight == callback.distiller.weight == 0.7
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], got 4"):
        callback.weight = 4
    assert callback.distiller.weight == 0.7


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"weight": 2}, ValueError, r"weight must be .* got 2"),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of .* did you mean"),
        ({"loss": "hintons"}, ValueError, "loss must be one of"),
        ({"loss": 3}, TypeError, "loss must be"),
        ({"wait": 1}, TypeError, "unexpected keyword argument 'wait'"),
    ],
)
@pytest.mark.parametrize("adapter", [for_fastai, for_lightning, for_huggingface])
def test_wrong_arguments_are_refused_when_the_callback_is_made(adapter, wrong, kind, message):
    with pytest.raises(kind, match=message):
        adapter.KnowledgeDistillationCallback(**{"teacher": teacher(), "loss": SoftTarget(), **wrong})


def test_a_layer_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    student = Net()
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), Widened(), ["bodi"], ["body"])
    learn = learner(student, tmp_path)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r"activations_student .* did you mean 'body'"):
        learn.fit(1, cbs=callback)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), Net().parameters(), strict=True))
    assert not any(m._forward_hooks for m in student.modules())


# --- results ----------------------------------------------------------------------------------------------------------


class Tupled(Net):
    """Returns its features too, after the logits."""

    def forward(self, x: Tensor, labels: Any = None) -> Any:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden), hidden


class Named(Net):
    """Returns a dict."""

    def forward(self, x: Tensor, labels: Any = None) -> Any:
        return {"logits": self.head(torch.tanh(self.body(x))), "hidden": None}


def of_first(outputs: Any, y: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs[0], y)


def trained(kind: type, other: nn.Module, folder: Any, **options: Any) -> tuple[Net, Distiller]:
    student = kind()
    callback = for_fastai.KnowledgeDistillationCallback(other, Squares(), weight=0.6)
    learn = learner(student, folder, **options)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callback)
    return student, callback.distiller


@pytest.mark.parametrize("kind", [Tupled, Named])
def test_tuples_and_dicts_train_as_tensors_do(kind, tmp_path):
    other = kind(12, seed=5).eval()
    student, distiller = trained(kind, other, tmp_path, loss_func=of_first)
    bare, wanted = trained(Net, Net(12, seed=5), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), bare.parameters(), strict=True))
    assert distiller.metrics() == wanted.metrics()


class TupledLoss(Net):
    """The form of Hugging Face's tuples: the loss, if there are labels, and the logits."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def test_the_trainers_tuples_have_their_logits_behind_the_loss(tmp_path):
    students = [TupledLoss(), Net()]
    for student in students:
        callback = for_huggingface.KnowledgeDistillationCallback(TupledLoss(12, seed=5), Squares(), weight=0.6)
        rows = [{"x": x, "labels": y} for x, y in loader().dataset]
        InOrder(student, arguments(tmp_path), train_dataset=rows, callbacks=[callback]).train()
    assert all(torch.equal(a, b) for a, b in zip(*(s.parameters() for s in students), strict=True))


# --- inputs -----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left, self.right, self.head = nn.Linear(4, width), nn.Linear(2, width), nn.Linear(width, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) + self.right(b)))


def pairs() -> TensorDataset:
    x, y = loader().dataset.tensors
    return TensorDataset(x[:, :4], x[:, 4:], y)


def two_by_hand(student: Two, other: Two) -> Two:
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for a, b, y in DataLoader(pairs(), batch_size=8):
        s, t = student(a, b), other(a, b).detach()
        (0.4 * F.cross_entropy(s, y) + 0.6 * (s - t).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


class TwoModule(pl.LightningModule):
    """Takes its batches out of dicts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch["a"], b=batch["b"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class Rows(Dataset):
    def __init__(self) -> None:
        self.rows = pairs()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(zip("aby", self.rows[i], strict=True))


def test_networks_with_two_inputs(tmp_path):
    wanted = two_by_hand(Two(8, 0), Two(12, 5))
    first, second = Two(8, 0), Two(8, 0)
    data = DataLoaders(*(TfmdDL(pairs(), bs=8, shuffle=False, num_workers=0, n_inp=2) for _ in range(2)), device="cpu")
    learn = Learner(data, first, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.5, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=for_fastai.KnowledgeDistillationCallback(Two(12, 5), Squares(), weight=0.6))
    callback = for_lightning.KnowledgeDistillationCallback(Two(12, 5), Squares(), weight=0.6)
    trainer(tmp_path, callback, max_epochs=1).fit(TwoModule(second), DataLoader(Rows(), batch_size=8))
    for p, a, b in zip(wanted.parameters(), first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, p)
        torch.testing.assert_close(b, p)


# --- names of layers --------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A student with an attribute `model`, as many have."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("name", ["model.body", "body"])
def test_a_student_with_an_attribute_model(name, tmp_path):
    """D-K4: its layers were looked for in the learner, and not found."""
    student = Wrapper()
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), Widened(), [name], ["body"])
    learn = learner(student, tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callback)
    assert callback.distiller.metrics()["distill_loss"] > 0


@pytest.mark.parametrize("name", ["net.body", "body"])
def test_layers_of_a_lightning_module_by_either_name(name, tmp_path):
    callback = for_lightning.KnowledgeDistillationCallback(teacher(), Widened(), [name], ["body"])
    trainer(tmp_path, callback, max_epochs=1).fit(Module(Net()), loader())
    assert callback.distiller.metrics()["distill_loss"] > 0


def test_a_name_that_two_parts_have_is_refused(tmp_path):
    module = Module(Net())
    module.spare = Net()
    callback = for_lightning.KnowledgeDistillationCallback(teacher(), Widened(), ["body"], ["body"])
    with pytest.raises(ValueError, match=r"activations_student .*net\.body.*spare\.body.*got 'body'"):
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader())


@pytest.mark.parametrize("kind", ["average", "copy"])
def test_a_copy_of_a_module_without_forward_answers_as_its_network(kind, tmp_path):
    module = Module(Net())
    other = EMATeacher(0.5) if kind == "average" else copy.deepcopy(module)
    callback = for_lightning.KnowledgeDistillationCallback(other, Squares(), weight=0.5)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.distiller.metrics()["distill_loss"] > 0


# --- transformers -----------------------------------------------------------------------------------------------------


def bert(width: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes))


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(6, dtype=torch.long)
    mask[4:] = 0
    tokens = torch.randint(20, (16, 6), generator=generator)
    return [{"input_ids": t, "attention_mask": mask, "labels": torch.tensor(i % 3)} for i, t in enumerate(tokens)]


def test_the_teacher_gets_masks_and_no_labels_and_may_be_wider(tmp_path):
    student, other = bert(8, 0), bert(12, 5)
    given: list[dict[str, Any]] = []
    other.register_forward_pre_hook(lambda _, args, keywords: given.append(dict(keywords)), with_kwargs=True)
    layers = ["bert.encoder.layer.0"], ["bert.encoder.layer.0"]
    callback = for_huggingface.KnowledgeDistillationCallback(other, [SoftTarget(), "fitnet"], *layers, weight=0.9)
    args = arguments(tmp_path, num_train_epochs=1)
    InOrder(student, args, train_dataset=sentences(), callbacks=[callback]).train()
    assert [set(one) for one in given] == [{"input_ids", "attention_mask"}] * 2
    assert given[0]["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]
    assert callback.distiller.metrics()["distill_loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), bert(12, 5).parameters(), strict=True))
