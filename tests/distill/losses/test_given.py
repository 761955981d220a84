"""What a distillation loss may be given as."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.given import FeatureFunction, LogitFunction, as_loss, known_losses
from fasterai.distill.losses.logits import DIST, DKD, DecoupledKD, Mutual, SoftTarget
from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss, Loss

S, T = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def public(pred: Tensor, teacher_pred: Tensor, power: int = 1, **_: Any) -> Tensor:
    return (pred - teacher_pred).abs().pow(power).mean()


def with_target(pred: Tensor, teacher_pred: Tensor, target: Tensor) -> Tensor:
    return (pred - teacher_pred)[torch.arange(6), target].abs().mean()


def of_all(**given: Any) -> Tensor:
    return (given["pred"] - given["teacher_pred"]).abs().mean()


def of_three(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels) + (student - teacher).abs().mean()


def of_features(fm_s: dict[str, Tensor], fm_t: dict[str, Tensor], p: int = 1, **_: Any) -> Tensor:
    assert list(fm_s) == list(fm_t) == ["0", "1"]
    return torch.stack([(a - b).abs().pow(p).mean() for a, b in zip(fm_s.values(), fm_t.values(), strict=True)]).sum()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (SoftTarget(T=2), SoftTarget(T=2)),
        (SoftTarget, SoftTarget()),
        (partial(SoftTarget, T=30), SoftTarget(T=30)),
        (partial(partial(SoftTarget, T=30), scale=2), SoftTarget(T=30, scale=2)),
        (DecoupledKD, DKD()),
        (partial(DecoupledKD, T=2), DKD(T=2)),
        ("SoftTarget", SoftTarget()),
        ("soft_target", SoftTarget()),
        ("kd", SoftTarget()),
        ("mutual", Mutual()),
        ("dist", DIST()),
        ("DecoupledKD", DKD()),
        (public, LogitFunction(public)),
        (of_features, FeatureFunction(of_features)),
    ],
)
def test_the_loss_that_is_meant(value: Any, wanted: Loss) -> None:
    assert as_loss(value) == wanted


def test_every_loss_has_its_name() -> None:
    assert {"DIST", "DKD", "NKD", "Logits", "Mutual", "SoftTarget", "Standardised", "Tokens"} <= set(known_losses())
    for name, kind in known_losses().items():
        assert type(as_loss(name)) is type(as_loss(name.lower())) is type(as_loss(kind)) is kind
    assert not {LogitLoss, FeatureLoss, Loss} & set(known_losses().values())


MEAN = float((S - T).abs().mean())


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (public, MEAN),
        (partial(public, power=2), float((S - T).square().mean())),
        (of_all, MEAN),
        (with_target, float((S - T)[torch.arange(6), Y].abs().mean())),
        (of_three, MEAN + float(F.cross_entropy(S, Y))),
        (F.mse_loss, float((S - T).square().mean())),
        (partial(F.mse_loss, reduction="sum"), float((S - T).square().sum())),
        (nn.MSELoss(), float((S - T).square().mean())),
        (lambda pred, teacher_pred: (pred - teacher_pred).abs().mean()[None], MEAN),
    ],
)
def test_functions_get_what_they_ask_for(function: Any, wanted: float) -> None:
    loss = as_loss(function)
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    value = loss(student, teacher, Y)
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-5)
    value.backward()
    assert student.grad is not None and teacher.grad is None
    assert float(copy.deepcopy(loss)(S, T, Y)) == pytest.approx(wanted, rel=1e-5)
    assert "0x" not in repr(loss)


def test_functions_pickle_and_have_a_scale() -> None:
    loss = LogitFunction(public, scale=3)
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert float(loss(S, T)) == pytest.approx(3 * MEAN)
    assert as_loss(with_target).needs_labels and as_loss(of_three).needs_labels and not as_loss(public).needs_labels
    with pytest.raises(ValueError, match="labels must be there for LogitFunction"):
        as_loss(with_target)(S, T)


def test_functions_of_features() -> None:
    loss = as_loss(partial(of_features, p=2))
    value = loss([S, S], [T, S])
    assert float(value) == pytest.approx(float((S - T).square().mean()))


def needs_more(pred: Tensor, teacher_pred: Tensor, epoch: int) -> Tensor:
    raise NotImplementedError


def features_and_logits(fm_s: Any, fm_t: Any, pred: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("SoftTargets", ValueError, r"loss must be one of .*DKD, .*SoftTarget.*got 'SoftTargets'; did you mean 'SoftTarget'\?"),
        (3, TypeError, r"loss must be a distillation loss, its name, its class or a function .*, got 3 \(int\)"),
        (None, TypeError, r"got None \(NoneType\)"),
        (nn.MSELoss, TypeError, r"pass one of its values: MSELoss\(...\)"),
        (lambda x: x, TypeError, "its arguments are x"),
        (needs_more, TypeError, "it needs epoch, but gets pred, target, teacher_pred: bind the others by functools.partial"),
        (features_and_logits, TypeError, "it needs pred, but gets fm_s, fm_t, target"),
        (partial(SoftTarget, heat=2), TypeError, "heat"),
    ],
)
def test_what_is_no_loss_is_refused(value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        as_loss(value)


def test_a_function_must_return_a_scalar() -> None:
    for function in (lambda a, b: a - b, lambda a, b: 0.5):
        with pytest.raises(ValueError, match=r"loss must return a scalar, got .* return its mean"):
            as_loss(function)(S, T)


def test_the_distiller_takes_them_all() -> None:
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    x = torch.randn(6, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(teacher, ["kd", DecoupledKD, partial(SoftTarget, T=1), public], weight=1.0)
    handle = attach(optimizer, distiller, total_steps=2, model=student)
    outputs = student(x)
    task = F.cross_entropy(outputs, Y)
    value = handle.loss(task, x, Y, outputs)
    others = teacher(x).detach()
    wanted = sum(float(one(outputs.detach(), others, Y)) for one in (SoftTarget(), DKD(), SoftTarget(T=1), as_loss(public)))
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-5)
    value.backward()
    optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())


@dataclass(frozen=True)
class Gap(FeatureLoss):
    """The mean distance of features, added up."""

    factor: float = 1.0

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Any, adapter: Adapter | None) -> Tensor:
        gaps = [(a - b).abs().mean() for a, b in zip(student, teacher, strict=True)]
        return self.factor * torch.stack(gaps).sum()


def test_features_in_dicts_as_the_public_fasterai_gives_them() -> None:
    assert float(Gap({"a": S, "b": S}, {"x": T, "y": S}, factor=2.0)) == pytest.approx(2 * MEAN)
    assert float(Gap(fm_s=S, fm_t=T, pred=S, teacher_pred=T, target=Y)) == pytest.approx(MEAN)
    assert float(Gap([S], [T], S)) == pytest.approx(MEAN)
    with pytest.raises(TypeError, match="Gap must be called with fm_s and fm_t, and settings by keyword"):
        Gap({"a": S})
