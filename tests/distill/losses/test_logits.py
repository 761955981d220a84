"""Losses of logits, held against numpy and scipy, in every shape, with every kind of labels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasterai.distill.losses import logits
from fasterai.distill.losses.logits import DIST, DKD, NKD, DecoupledKD, Logits, Mutual, SoftTarget, Standardised
from fasterai.distill.losses.loss import LogitLoss
from fasterai.distill.losses.tokens import Tokens

N, C = 7, 5


def tensors(seed: int = 0, shape: tuple[int, ...] = (N, C), spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(shape, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(0, C, (shape[0],), generator=generator)


# --- by other hands: one row after the other, in float64 -----------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(z.astype(np.float64))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(scipy.special.rel_entr(p, q).sum())


def soft_target(s: np.ndarray, t: np.ndarray, y: int, T: float = 5.0) -> float:
    return T * T * kl(softmax(t / T), softmax(s / T))


def dkd(s: np.ndarray, t: np.ndarray, y: int, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0) -> float:
    ps, pt = softmax(s / T)[y], softmax(t / T)[y]
    tckd = kl(np.array([pt, 1 - pt]), np.array([ps, 1 - ps]))
    nckd = kl(softmax(np.delete(t, y) / T), softmax(np.delete(s, y) / T))
    return T * T * (alpha * tckd + beta * nckd)


def nkd(s: np.ndarray, t: np.ndarray, y: int, gamma: float = 1.5, T: float = 1.0) -> float:
    others = softmax(np.delete(t, y) / T) @ np.log(softmax(np.delete(s, y) / T))
    return float(-softmax(t)[y] * np.log(softmax(s)[y]) - gamma * T * T * others)


def standardised(z: np.ndarray) -> np.ndarray:
    return (z - z.mean()) / (z.std(ddof=1) + 1e-7)


ROWS: list[tuple[LogitLoss, Callable[..., float]]] = [
    (SoftTarget(), soft_target),
    (SoftTarget(T=1.5), partial(soft_target, T=1.5)),
    (Logits(), lambda s, t, y: float(np.mean((s - t) ** 2))),
    (Mutual(), partial(soft_target, T=1)),
    (DKD(), dkd),
    (DKD(alpha=0.5, beta=2, T=1), partial(dkd, alpha=0.5, beta=2, T=1)),
    (NKD(), nkd),
    (NKD(gamma=0.3, T=2), partial(nkd, gamma=0.3, T=2)),
    (Standardised(), lambda s, t, y: soft_target(standardised(s), standardised(t), y, T=2)),
    (Standardised(DKD(scale=2)), lambda s, t, y: 2 * dkd(standardised(s), standardised(t), y)),
]


@pytest.mark.parametrize(("loss", "by_hand"), ROWS, ids=lambda x: repr(x) if isinstance(x, LogitLoss) else "")
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_the_mean_over_rows_is_that_of_another_implementation(
    loss: LogitLoss, by_hand: Callable[..., float], spread: float
) -> None:
    student, teacher, labels = tensors(spread=spread)
    wanted = [by_hand(s, t, y) for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), labels, strict=True)]
    assert float(loss(student, teacher, labels)) == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("loss", [DIST(), DIST(beta=2, gamma=0.5, T=4)])
def test_dist_is_correlation_of_rows_and_columns(loss: DIST) -> None:
    student, teacher, _ = tensors()
    s, t = (np.stack([softmax(row / loss.T) for row in x.double().numpy()]) for x in (student, teacher))
    rows = np.mean([scipy.stats.pearsonr(a, b).statistic for a, b in zip(s, t, strict=True)])
    columns = np.mean([scipy.stats.pearsonr(a, b).statistic for a, b in zip(s.T, t.T, strict=True)])
    wanted = loss.T**2 * (loss.beta * (1 - rows) + loss.gamma * (1 - columns))
    assert float(loss(student, teacher)) == pytest.approx(wanted, rel=1e-4)


def test_numbers_by_hand() -> None:
    # softmax of (log 1, log 3) is (1/4, 3/4); KL = 3/4 log 3 + 1/4 log(1/3) = log(3) / 2 where the student has it reversed
    teacher, student = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[3.0, 1.0]]).log()
    assert float(Mutual()(student, teacher)) == pytest.approx(np.log(3) / 2, rel=1e-5)
    assert float(Logits()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))) == 2  # (4 + 0) / 2
    assert float(Logits()(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))) == 2  # of values without classes
    # the classes that are not right stand 1 : 1 with both, so DKD is the right class alone: KL of (1/2, 1/2) from (1/3, 2/3)
    teacher, student = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.zeros(1, 3)
    wanted = np.log(1.5) / 2 + np.log(0.75) / 2
    assert float(DKD(T=1)(student, teacher, torch.tensor([0]))) == pytest.approx(wanted, rel=1e-5)
    assert float(NKD()(student, teacher, torch.tensor([0]))) == pytest.approx(np.log(3) / 2 + 1.5 * np.log(2), rel=1e-5)


def test_every_public_entry_has_a_case() -> None:
    assert {type(loss).__name__ for loss, _ in ROWS} | {"DIST"} == set(logits.__all__)


# --- what holds for all numbers ------------------------------------------------------------------------------------------

seeds = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, T=st.floats(0.5, 8), spread=st.floats(0.1, 5))
def test_distillation_is_dkd_weighted_by_the_teachers_doubt(seed: int, T: float, spread: float) -> None:
    student, teacher, labels = tensors(seed, spread=spread)
    right = torch.softmax(teacher / T, 1)[torch.arange(N), labels]
    shapes = student, teacher, labels
    tckd, nckd = DKD(alpha=1, beta=0, T=T).of_rows(*shapes), DKD(alpha=0, beta=1, T=T).of_rows(*shapes)
    torch.testing.assert_close(tckd + (1 - right) * nckd, SoftTarget(T=T).of_rows(*shapes), rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, factor=st.floats(0.1, 50), shift=st.floats(-20, 20))
@pytest.mark.parametrize("loss", [Standardised(), Standardised(Logits()), Standardised(NKD())])
def test_standardised_logits_may_be_scaled_and_shifted(loss: LogitLoss, seed: int, factor: float, shift: float) -> None:
    student, teacher, labels = tensors(seed)
    wanted = loss(student, teacher, labels)
    torch.testing.assert_close(loss(student, factor * teacher + shift, labels), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss(factor * student + shift, teacher, labels), wanted, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shift=st.floats(-20, 20))
@pytest.mark.parametrize("loss", [SoftTarget(), Mutual(), DKD(), NKD(), DIST(T=2)], ids=repr)
def test_a_shift_of_a_rows_logits_says_nothing(loss: LogitLoss, seed: int, shift: float) -> None:
    student, teacher, labels = tensors(seed)
    torch.testing.assert_close(
        loss(student + shift, teacher - shift, labels), loss(student, teacher, labels), rtol=1e-3, atol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(seed=seeds, factor=st.floats(0.01, 0.99))
def test_dist_is_free_in_the_size_of_what_rows_say(seed: int, factor: float) -> None:
    _, teacher, _ = tensors(seed)
    milder = (factor * torch.softmax(teacher, 1) + (1 - factor) / C).log()  # a straight line of each row's probabilities
    assert float(DIST()(milder, teacher)) == pytest.approx(0, abs=1e-4)
    assert float(SoftTarget(T=1)(milder, teacher)) > 0


@settings(max_examples=25, deadline=None)
@given(seed=seeds, spread=st.floats(0.1, 60))
@pytest.mark.parametrize("loss", [SoftTarget(), Mutual(), Logits(), DKD(), DIST(), Standardised()], ids=repr)
def test_distances_are_never_below_0(loss: LogitLoss, seed: int, spread: float) -> None:
    student, teacher, labels = tensors(seed, spread=spread)
    assert float(loss(student, teacher, labels)) >= -1e-5


# --- shapes, labels, extremes --------------------------------------------------------------------------------------------

EVERY = [SoftTarget(), Logits(), Mutual(), DKD(), NKD(), DIST(), Standardised(), Standardised(DKD())]


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_tokens_and_places_are_rows_like_samples(loss: LogitLoss) -> None:
    student, teacher, labels = tensors(shape=(12, C))
    wanted = loss(student, teacher, labels)
    by_token = loss(student.view(3, 4, C), teacher.view(3, 4, C), labels.view(3, 4))
    torch.testing.assert_close(by_token, wanted)
    places = [x.view(2, 3, 2, C).permute(0, 3, 1, 2) for x in (student, teacher)]
    torch.testing.assert_close(loss(*places, labels.view(2, 3, 2)), wanted)
    torch.testing.assert_close(loss(*(x.contiguous() for x in places), labels.view(2, 1, 3, 2)), wanted)
    last = [x.contiguous(memory_format=torch.channels_last) for x in places]
    torch.testing.assert_close(loss(*last, labels.view(2, 3, 2)), wanted)


@pytest.mark.parametrize("loss", [DKD(), NKD(), Standardised(DKD())], ids=repr)
def test_shares_of_two_classes_are_a_right_class_of_both(loss: LogitLoss) -> None:
    student, teacher, labels = tensors()
    one = torch.nn.functional.one_hot(labels, C)
    torch.testing.assert_close(loss(student, teacher, one), loss(student, teacher, labels))
    mixed = 0.7 * one + 0.3 * one.flip(0)
    value = loss(student, teacher, mixed)
    assert value.isfinite() and float(value) > 0
    assert float(DKD()(teacher, teacher, mixed)) == pytest.approx(0, abs=1e-5)


def test_shares_of_dkd_by_hand() -> None:
    student, teacher, _ = tensors(shape=(1, 3))
    shares = np.array([0.7, 0.3, 0.0])
    s, t = softmax(student[0].numpy()), softmax(teacher[0].numpy())
    right_s, right_t = shares @ s, shares @ t
    rest_s, rest_t = (1 - shares) * s / (1 - right_s), (1 - shares) * t / (1 - right_t)
    wanted = kl(np.array([right_t, 1 - right_t]), np.array([right_s, 1 - right_s])) + 8 * kl(rest_t, rest_s)
    value = DKD(T=1)(student, teacher, torch.tensor(shares)[None].float())
    assert float(value) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("loss", EVERY, ids=repr)
@pytest.mark.parametrize("size", [0.0, 1e-3, 1e2, 1e4])
def test_values_and_gradients_are_finite_for_logits_of_any_size(loss: LogitLoss, size: float) -> None:
    student, teacher, labels = tensors(spread=size)
    student.requires_grad_()
    loss(student, teacher, labels).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_one_row_and_two_classes_will_do(loss: LogitLoss) -> None:
    student = torch.tensor([[1.0, -2.0]], requires_grad=True)
    value = loss(student, torch.tensor([[0.5, 0.0]]), torch.tensor([1]))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_weight_means_the_same_for_a_map_of_classes_as_for_an_image() -> None:
    # the public fasterai divides the sum over places by the batch alone: it is H * W times as large
    student, teacher, _ = tensors(shape=(2, C, 8, 8))
    whole = SoftTarget()(student, teacher)
    rows = [SoftTarget()(student[..., i, j], teacher[..., i, j]) for i in range(8) for j in range(8)]
    torch.testing.assert_close(whole, torch.stack(rows).mean())
    summed = 25 * torch.nn.functional.kl_div((student / 5).log_softmax(1), (teacher / 5).softmax(1), reduction="batchmean")
    assert float(summed / whole) == pytest.approx(64, rel=1e-3)


# --- the calls of the public fasterai ------------------------------------------------------------------------------------


def test_classes_called_with_logits_return_the_loss() -> None:
    student, teacher, labels = tensors()
    wanted = SoftTarget(T=30)(student, teacher)
    torch.testing.assert_close(SoftTarget(student, teacher, T=30), wanted)
    torch.testing.assert_close(SoftTarget(pred=student, teacher_pred=teacher, T=30, fm_s={}, fm_t={}, target=None), wanted)
    torch.testing.assert_close(partial(SoftTarget, T=30)(student, teacher_pred=teacher), wanted)
    torch.testing.assert_close(DKD(pred=student, teacher_pred=teacher, target=labels), DKD()(student, teacher, labels))
    torch.testing.assert_close(Mutual(student, teacher), Mutual()(student, teacher))
    with pytest.raises(TypeError, match="SoftTarget must be called with pred and teacher_pred, and settings by keyword"):
        SoftTarget(student)
    with pytest.raises(TypeError, match="settings by keyword"):
        SoftTarget(student, teacher, 30)
    with pytest.raises(ValueError, match="T must be a number above 0, got 0"):
        SoftTarget(student, teacher, T=0)
    with pytest.raises(TypeError, match="heat"):
        SoftTarget(student, teacher, heat=1)


def test_decoupled_kd_has_the_arguments_of_the_public_one() -> None:
    student, teacher, labels = tensors()
    wanted = DKD(T=2, alpha=0.5, beta=3)(student, teacher, labels)
    torch.testing.assert_close(DecoupledKD(student, teacher, 2, 0.5, 3, labels), wanted)
    torch.testing.assert_close(
        DecoupledKD(pred=student, teacher_pred=teacher, target=labels, T=2, alpha=0.5, beta=3, fm_s=None), wanted
    )
    assert DecoupledKD() == DKD()
    with pytest.warns(UserWarning, match=r"normalize=True gives the numbers of DKD.*NKD\(\)"):
        assert DecoupledKD(normalize=True) == DKD()
    for targets in (labels[:, None], labels.float(), torch.nn.functional.one_hot(labels, C).float()):
        torch.testing.assert_close(DecoupledKD(student, teacher, 2, 0.5, 3, targets), wanted)


def test_normalize_of_the_public_dkd_is_dkd_and_not_nkd() -> None:
    student, teacher, labels = tensors()
    hidden = -1000 * torch.nn.functional.one_hot(labels, C)
    left = ~torch.nn.functional.one_hot(labels, C).bool()
    for x in (student, teacher):
        masked = torch.softmax(x + hidden, 1)[left].view(N, C - 1)
        torch.testing.assert_close(masked, torch.softmax(x[left].view(N, C - 1), 1))
    assert float(NKD()(teacher, teacher, labels)) > 0.1  # while DKD is 0
    assert float(DKD()(teacher, teacher, labels)) == pytest.approx(0, abs=1e-5)


# --- values and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_a_loss_is_a_frozen_value(loss: LogitLoss) -> None:
    assert copy.deepcopy(loss) == loss == pickle.loads(pickle.dumps(loss))
    assert len({loss, copy.deepcopy(loss)}) == 1
    with pytest.raises(AttributeError):
        loss.scale = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: SoftTarget(T=0), ValueError, "T must be a number above 0, got 0"),
        (lambda: SoftTarget(T=float("nan")), ValueError, "T must be a number above 0, got nan"),
        (lambda: SoftTarget(T="4"), TypeError, r"T must be a number above 0, got '4' \(str\)"),
        (lambda: SoftTarget(T=True), TypeError, r"T must be a number above 0, got True \(bool\)"),
        (lambda: DKD(alpha=-1), ValueError, "alpha must be a number of at least 0, got -1"),
        (lambda: DKD(beta=float("inf")), ValueError, "beta must be a number of at least 0, got inf"),
        (lambda: NKD(gamma=-0.1), ValueError, "gamma must be a number of at least 0, got -0.1"),
        (lambda: DIST(T=-1), ValueError, "T must be a number above 0, got -1"),
        (lambda: Mutual(scale=-1), ValueError, "scale must be a number of at least 0, got -1"),
        (lambda: Standardised(SoftTarget), TypeError, r"loss must be a loss of logits, got .*pass one of its values"),
        (lambda: Standardised(Tokens()), ValueError, r"loss must be one of single rows, got Tokens.*Tokens\(Standardised"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "labels", "message"),
    [
        (
            SoftTarget(),
            (2, 5),
            (2, 7),
            None,
            "have the student's 5 classes, got 7; give it a head, or a tokenizer",
        ),
        (SoftTarget(), (2, 3, 50), (2, 3, 64), None, "the student's 50 classes, got 64"),
        (SoftTarget(), (2, 5, 4, 4), (2, 6, 4, 4), None, "the student's 5 classes, got 6"),
        (SoftTarget(), (2, 5), (3, 5), None, r"logits of the student's shape \(2, 5\), got \(3, 5\)"),
        (SoftTarget(), (2, 5, 4, 4), (2, 5, 2, 2), None, r"student's shape \(2, 5, 4, 4\), got \(2, 5, 2, 2\)"),
        (SoftTarget(), (4, 1), (4, 1), None, r"logits must have at least 2 classes for SoftTarget, got shape \(4, 1\); Logits"),
        (DIST(), (4,), (4,), None, r"at least 2 classes for DIST, got shape \(4,\)"),
        (DKD(), (2, 5), (2, 5), None, "labels must be there for DKD, got None; batches must have targets"),
        (NKD(), (2, 5), (2, 5), None, "labels must be there for NKD"),
        (Standardised(DKD()), (2, 5), (2, 5), None, "labels must be there for Standardised"),
        (DKD(), (2, 5), (2, 5), (3,), r"labels must be one number for each row of the logits \(2, 5\).*got shape \(3,\)"),
        (DKD(), (2, 5), (2, 5), (2, 4), r"or shares of that shape, got shape \(2, 4\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    loss: LogitLoss, student: tuple[int, ...], teacher: tuple[int, ...], labels: tuple[int, ...] | None, message: str
) -> None:
    wanted = None if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(student), torch.zeros(teacher), wanted)
