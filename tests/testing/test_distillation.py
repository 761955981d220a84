"""Every distillation loss keeps the contract, and a loss that breaks a promise of it is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fasterai.distill.losses.given import as_loss, known_losses
from fasterai.distill.losses.logits import DIST, DKD, NKD, Logits, SoftTarget, Standardised
from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss, Loss
from fasterai.distill.losses.tokens import Tokens
from fasterai.testing import check_distillation_loss

SETTINGS: list[Loss] = [
    SoftTarget(T=1),
    SoftTarget(T=30, scale=0.1),
    DKD(alpha=0, beta=1, T=1),
    NKD(gamma=0),
    DIST(beta=2, gamma=0.5, T=4),
    Standardised(SoftTarget(T=2), scale=9),
    Standardised(DKD()),
    Standardised(DIST()),
    Tokens(shift=False),
    Tokens(DKD(), top_k=3, rest=True),
    Tokens(NKD(), top_k=3),
    Tokens(DIST()),
    Tokens(Standardised(Logits()), shift=False),
    as_loss(torch.nn.functional.mse_loss),
]


@pytest.mark.parametrize("name", known_losses())
def test_every_loss_keeps_its_contract(name: str) -> None:
    check_distillation_loss(known_losses()[name]())


@pytest.mark.parametrize("loss", SETTINGS, ids=repr)
def test_other_settings_keep_the_contract(loss: Loss) -> None:
    check_distillation_loss(loss)


def test_a_shape_that_must_be_taken_is_found_if_it_is_not() -> None:
    check_distillation_loss(Tokens(), [((2, 4, 5), (2, 4, 5))])
    with pytest.raises(AssertionError, match="must have a value, but it raised ValueError"):
        check_distillation_loss(Tokens(), [((2, 5), (2, 5))])


# --- broken losses ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(LogitLoss):
    """The squared error, or another function."""

    is_distance: ClassVar[bool] = True


def broken(of_rows: Callable[..., Tensor], **attributes: object) -> Loss:
    """Make a loss with another function, as a class of this module, so that it pickles."""
    made = dataclass(frozen=True)(type("Made", (LogitLoss,), {"of_rows": of_rows, "__module__": __name__, **attributes}))
    globals()["Made"] = made
    made.__qualname__ = "Made"
    return made()


def squares(_: Loss, s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return (s - t).square().mean(1)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, object], str]] = {
    "NaN": (lambda _, s, t, y: s.mean(1) / 0 * 0, {}, "must be finite"),
    "not scalar under scale": (squares, {"__call__": lambda _, s, t, y=None: s - t.detach()}, "must be a scalar in float32"),
    "no scale": (squares, {"__call__": lambda _, s, t, y=None: (s - t.detach()).float().square().mean()}, "twice the scale"),
    "half": (
        squares,
        {"__call__": lambda o, s, t, y=None: o.scale * (s - t.detach()).square().mean().float()},
        "must be computed in float32 for torch.bfloat16",
    ),
    "matrix product": (
        squares,
        {
            "__call__": lambda o, s, t, y=None: (
                o.scale * (s.float() @ torch.eye(s.shape[-1]) - t.detach()).float().square().mean()
            )
        },
        "computed in float32 under autocast",
    ),
    "teacher": (
        squares,
        {"__call__": lambda o, s, t, y=None: o.scale * (s - t).float().square().mean()},
        "no gradient for the teacher",
    ),
    "part without gradient": (
        lambda _, s, t, y: (s - t).square().mean(1) * s.detach().abs().sum(1),
        {},
        "gradient of its value",
    ),
    "no gradient": (lambda _, s, t, y: (s - t).detach().square().mean(1) + 0 * s.mean(1), {}, "must have a finite gradient"),
    "order": (lambda _, s, t, y: (s - t).square().mean(1) * torch.arange(1, len(s) + 1), {}, "order of the samples"),
    "below 0": (lambda _, s, t, y: -(s - t).square().mean(1), {}, "must be above 0"),
    "no distance": (lambda _, s, t, y: (s - 2 * t).square().mean(1), {}, "must be 0 where the student equals"),
    "kink": (
        lambda _, s, t, y: (s - t).abs().mean(1) + (s - t).sum(1),
        {"is_distance": True},
        "gradient where the student|above 0",
    ),
    "needs labels in secret": (lambda _, s, t, y: (s - t).square()[y == 0], {}, "without labels"),
    "writes": (lambda _, s, t, y: (s - t.zero_()).square().mean(1), {}, "must not write|must be the same each time"),
    "labels missing": (
        lambda _, s, t, y: squares(_, s, t, y) * (1 if y is None else 1.0),
        {"needs_labels": True, "_check_labels": lambda *_: None},
        "must ask for labels",
    ),
    "labels as shares": (
        lambda _, s, t, y: (s - t).square().mean(1) * (1.0 if y.dim() == 1 else 2.0),
        {"needs_labels": True},
        "must be the same with labels as shares",
    ),
    "negative scale": (squares, {"__post_init__": lambda _: None}, "must refuse a scale below 0"),
    "address": (squares, {"__repr__": object.__repr__}, "must be one line, without an address"),
}


def test_the_loss_without_a_defect_passes() -> None:
    check_distillation_loss(broken(squares))


@pytest.mark.parametrize("name", CASES)
def test_a_broken_loss_is_found(name: str) -> None:
    of_rows, attributes, complaint = CASES[name]
    with pytest.raises(AssertionError, match=complaint):
        check_distillation_loss(broken(of_rows, **attributes))


@dataclass(frozen=True)
class Flat(FeatureLoss):
    """Features that are vectors alone; a mean with a fault."""

    factor: float = 0.0

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        if student[0].dim() != 2 or student[0].shape != teacher[0].shape:
            raise ValueError("features must be vectors")
        own, other = student[0].float(), teacher[0].float()
        return (own - other).square().mean() + self.factor * own.sum()


def test_features_too() -> None:
    check_distillation_loss(Flat())
    with pytest.raises(AssertionError, match=r"must be 0 where|must be above 0"):
        check_distillation_loss(Flat(0.1))
    with pytest.raises(AssertionError, match="must have a value"):
        check_distillation_loss(Flat(), [((2, 3, 4, 4), (2, 3, 4, 4))])


def test_an_error_of_torch_for_a_shape_is_found() -> None:
    with pytest.raises(AssertionError, match=r"must have a value, or be refused with a ValueError, got RuntimeError: .*mat1"):
        check_distillation_loss(broken(lambda _, s, t, y: (s @ t).sum(1)))


def test_what_takes_no_shape_is_found() -> None:
    @dataclass(frozen=True)
    class Never(FeatureLoss):
        def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: object, adapter: object) -> Tensor:
            raise ValueError("features must be something else")

    globals()["Never"] = Never
    Never.__qualname__ = "Never"
    with pytest.raises(AssertionError, match="must take tensors of one of the shapes"):
        check_distillation_loss(Never())
