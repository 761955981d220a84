"""A case for each known defect of distillation elsewhere, D-K1 to D-K6."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.all import Callback, EarlyStoppingCallback, MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fasterai.callbacks.fastai import KnowledgeDistillationCallback, ParticipantCallback
from fasterai.core.participant import Participant
from fasterai.distill.losses.features import Attention, FitNet, Similarity
from fasterai.distill.losses.logits import DKD, DecoupledKD, SoftTarget
from fasterai.distill.losses.loss import FeatureLoss
from fasterai.distill.matching import match_feature_layers
from tests.distill.nets import CLASSES, Distance, Named, hooks, net

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % CLASSES


def learner(student: nn.Module, path: Any, *inputs: Tensor, lr: float = 0.1) -> Learner:
    inputs = inputs or (X,)
    data = TensorDataset(*inputs, Y)
    dls = DataLoaders(*(TfmdDL(data, bs=8, num_workers=0, n_inp=len(inputs)) for _ in range(2)), device="cpu")
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=lr, path=path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def teacher() -> nn.Sequential:
    return net(6, seed=1)


def distils(other: nn.Module, loss: Any = Distance(), *layers: Any, **options: Any) -> KnowledgeDistillationCallback:  # noqa: B008 - frozen
    return KnowledgeDistillationCallback(other, loss, *layers, **options)


@dataclass(frozen=True)
class Notes(FeatureLoss):
    """Notes the features that it gets."""

    seen: list[Any] = field(default_factory=list)

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Any, adapter: Any) -> Tensor:
        self.seen.append((student, teacher))
        return sum((x.square().mean() for x in student), torch.zeros(()))


# --- D-K1 ---------------------------------------------------------------------------------------------------------------


def test_dk1_nothing_of_the_teacher_is_recorded_for_gradients(tmp_path):
    """D-K1: its graph was recorded, and its gradients grew from batch to batch."""
    other, notes = teacher(), Notes()
    outputs: list[Tensor] = []
    other.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    learner(net(), tmp_path).fit(2, cbs=distils(other, [Distance(), notes], ["1"], ["1"]))
    features = [x for _, theirs in notes.seen for x in theirs]
    assert len(outputs) == len(features) == 4
    assert not any(x.requires_grad or x.grad_fn is not None for x in (*outputs, *features))
    assert all(p.grad is None and p.requires_grad for p in other.parameters())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), teacher().state_dict().values(), strict=True))


# --- D-K2 ---------------------------------------------------------------------------------------------------------------


def test_dk2_the_loss_of_validation_is_the_tasks(tmp_path):
    """D-K2: it was the mixture, which callbacks that stop and save then looked at."""
    student, stops = net(), EarlyStoppingCallback(patience=5)
    learn = learner(student, tmp_path, lr=0.0)
    learn.fit(1, cbs=[distils(teacher(), weight=0.9), stops])
    with torch.no_grad():
        expected = float(F.cross_entropy(student.eval()(X), Y))
    assert stops.best == pytest.approx(expected, rel=1e-5)
    assert learn.validate(cbs=distils(teacher(), weight=0.9))[0] == pytest.approx(expected, rel=1e-5)


# --- D-K3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "theirs"),
    [(["3", "0"], ["0", "3"]), (["0", "3"], ["3", "3"]), (["5", "0", "2"], ["0", "5", "2"])],
    ids=["crossed", "one for two", "three"],
)
def test_dk3_pairs_are_those_that_were_asked_for(own, theirs, tmp_path):
    """D-K3: they came in the order in which layers ran, and the second pair of a layer was dropped."""
    student, other, notes = net(), teacher(), Notes()
    kept: dict[tuple[int, str], Tensor] = {}

    def keep(at: tuple[int, str], layer: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.setdefault(at, output)

    for side, model in enumerate((student, other)):
        for name in {*own, *theirs}:
            layer = model.get_submodule(name)
            layer.register_forward_hook(partial(keep, (side, name)))
    learn = learner(student, tmp_path)
    learn.fit(1, cbs=distils(other, notes, own, theirs))
    mine, yours = notes.seen[0]
    assert [id(x) for x in mine] == [id(kept[0, name]) for name in own]
    assert all(torch.equal(x, kept[1, name]) for x, name in zip(yours, theirs, strict=True))
    assert len(mine) == len(yours) == len(own)


@pytest.mark.parametrize("given", [(["0", "1"], ["0"]), (["0"], ["0", "1"]), (["0"], None), (None, ["0"])])
def test_dk3_lists_of_other_lengths_are_refused(given):
    """D-K3: the longer one was cut off, and one side alone failed in the middle of a step."""
    numbers = " and ".join(str(len(side or ())) for side in reversed(given))
    with pytest.raises(
        ValueError, match=f"activations_teacher must be as many layers as activations_student, .* got {numbers};"
    ):
        distils(teacher(), FitNet(), *given)


# --- D-K4 ---------------------------------------------------------------------------------------------------------------


def test_dk4_layers_are_the_students_also_of_one_with_an_attribute_model(tmp_path):
    """D-K4: they were looked for in the learner, whose attribute `model` is the student."""
    student, notes = Named(), Notes()
    learner(student, tmp_path).fit(1, cbs=distils(teacher(), notes, ["model.0"], ["0"]))
    assert len(notes.seen) == 2 and notes.seen[0][0][0].shape == (8, 4, 4, 4)


@pytest.mark.parametrize(("own", "theirs"), [("modle.0", "0"), ("model.0", "9")])
def test_dk4_a_name_that_is_none_is_said_with_the_names_that_are(own, theirs, tmp_path):
    """D-K4: it was "'NoneType' object has no attribute 'register_forward_hook'"."""
    student, other = Named(), teacher()
    side, name = ("activations_student", own) if theirs == "0" else ("activations_teacher", theirs)
    with pytest.raises(ValueError, match=f"{side} must be .*{name}"):
        learner(student, tmp_path).fit(1, cbs=distils(other, FitNet(), [own], [theirs]))
    assert hooks(student) == hooks(other) == 0 and other.training


# --- D-K5 ---------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = net(width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.body(x - y)


def test_dk5_networks_of_two_inputs(tmp_path):
    """D-K5: the teacher got the first one alone."""
    other, seen = Two(6), []
    other.register_forward_hook(lambda layer, inputs, output: seen.append(len(inputs)))
    learner(Two(4), tmp_path, X, X.flip(0)).fit(1, cbs=distils(other))
    assert seen == [2, 2]


@pytest.mark.parametrize("output", [lambda x: (x, 1), lambda x: [x], lambda x: {"logits": x}], ids=["tuple", "list", "dict"])
def test_dk5_teachers_that_return_more_than_logits(output, tmp_path):
    """D-K5: they failed in the loss."""
    values = []
    for other in (Named(output), Named()):
        callback = distils(other)
        learner(net(), tmp_path, lr=0.0).fit(1, cbs=callback)
        values.append(callback.distiller.metrics()["distill_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] > 0


@pytest.mark.parametrize("make", [DKD, DecoupledKD])
@pytest.mark.parametrize("labels", [lambda y: y[:, None], lambda y: y.float(), lambda y: F.one_hot(y, CLASSES).float()])
def test_dk5_labels_of_any_kind(make, labels):
    """D-K5: columns, floats and shares of classes failed."""
    generator = torch.Generator().manual_seed(0)
    student, other = (torch.randn(16, CLASSES, generator=generator) for _ in range(2))
    torch.testing.assert_close(make()(student, other, labels(Y)), make()(student, other, Y))


def test_dk5_labels_that_are_mixed(tmp_path):
    """D-K5: MixUp left the loss without labels that it could use."""
    callback = distils(teacher(), DKD())
    learner(net(), tmp_path).fit(1, cbs=[MixUp(), callback])
    assert 0 < callback.distiller.metrics()["distill_loss"] < 1000


def test_dk5_attention_of_tokens():
    """D-K5: features (B, T, C) failed. By hand: the maps of powers (1, 4) and (9, 4) over two tokens, scaled to length 1."""
    student, other = (torch.tensor(rows)[None] for rows in ([[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [2.0, 2.0]]))
    a, b = (F.normalize(torch.tensor(x), dim=0) for x in ([1.0, 4.0], [9.0, 4.0]))
    found = float(Attention()([student], [other]))
    assert found > 0.1 and min(abs(found - float((a - b).square().sum()) * k) for k in (1.0, 0.5)) < 1e-5


def test_dk5_similarity_of_another_memory_format():
    """D-K5: `.view` failed."""
    a, b = (torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    last = [x.to(memory_format=torch.channels_last) for x in (a, b)]
    torch.testing.assert_close(Similarity()([last[0]], [last[1]]), Similarity()([a], [b]))


def test_dk5_the_loss_of_maps_of_classes_is_a_mean_over_places():
    """D-K5: it was as many times too large as there are places."""
    rows, others = (torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    maps = [x[:, :, None, None].expand(-1, -1, 5, 8) for x in (rows, others)]
    torch.testing.assert_close(SoftTarget()(*maps), SoftTarget()(rows, others))


def test_dk5_a_feature_of_one_channel_is_not_spread_over_others():
    """D-K5: it was compared with each of the teacher's channels, without a word."""
    with pytest.raises(ValueError, match=r"1.*6|6.*1"):
        FitNet()([torch.zeros(2, 1, 4, 4)], [torch.zeros(2, 6, 4, 4)])


class Ends(Callback):
    """Ends a fit in the middle of a batch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def after_loss(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=["whole", "error", "interrupt"])
def test_dk5_every_end_takes_the_hooks_off_and_gives_the_modes_back(error, tmp_path):
    """D-K5: hooks stayed after an interrupted fit, and the teacher stayed in eval mode."""
    student, other = net(), teacher()
    other[1].eval()
    others = [] if error is None else [Ends(error)]
    with nullcontext() if error is None else pytest.raises(type(error)):
        learner(student, tmp_path).fit(1, cbs=[distils(other, FitNet(), ["1"], ["1"]), *others])
    assert hooks(student) == hooks(other) == 0
    assert [m.training for m in other] == [True, False, True, True, True, True] and other.training


def test_dk5_matching_changes_nothing():
    """D-K5: it ran both in training mode, which changed the statistics of batch norms."""
    models = net(), teacher()
    before = [copy.deepcopy(m.state_dict()) for m in models]
    match_feature_layers(*models, X)
    for model, own in zip(models, before, strict=True):
        assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())
        assert all(m.training for m in model.modules()) and not hooks(model)


def test_dk5_blocks_of_transformers_are_paired():
    """D-K5: nothing useful was found for them."""

    class Tokens(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 2, 2)
            one = partial(nn.TransformerEncoderLayer, width, 2, width, batch_first=True)
            self.blocks, self.head = nn.ModuleList(one() for _ in range(depth)), nn.Linear(width, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    found = match_feature_layers(Tokens(4, 2), Tokens(8, 4), X)
    assert found == {"student": ["blocks.0", "blocks.1"], "teacher": ["blocks.1", "blocks.3"]}


# --- D-K6 ---------------------------------------------------------------------------------------------------------------


class Regularises(Participant):
    def after_loss(self, loss, batch):
        return loss + 0.3 * batch.logits.square().mean()


def test_dk6_the_order_of_callbacks_decides_nothing(tmp_path):
    """D-K6: the loss was 1.548 in one order, and 1.140 in the other."""
    found = []
    for order in (1, -1):
        student = net()
        learner(student, tmp_path).fit(1, cbs=[distils(teacher(), weight=0.6), ParticipantCallback(Regularises())][::order])
        found.append([p.detach().clone() for p in student.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
