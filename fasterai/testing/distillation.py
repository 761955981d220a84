"""Checks of distillation losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss, Loss
from fasterai.testing.promises import attempt, check_refused, check_value, require, same

__all__ = ["check_distillation_loss"]

Shapes = tuple[tuple[int, ...], tuple[int, ...]]

#: Shapes of logits, of the student and of the teacher.
LOGITS: Sequence[Shapes] = [((8, 5), (8, 5)), ((4, 3, 5), (4, 3, 5)), ((4, 5, 3, 2), (4, 5, 3, 2))]
#: Shapes of features.
FEATURES: Sequence[Shapes] = [
    ((6, 8, 4, 4), (6, 8, 4, 4)),
    ((6, 8, 4, 4), (6, 12, 2, 2)),
    ((6, 4, 8), (6, 4, 8)),
    ((6, 8), (6, 8)),
    ((6, 8), (6, 12)),
]
STEP = 1e-2  # of the difference that is held against the gradient


def check_distillation_loss(loss: Loss, shapes: Sequence[Shapes] | None = None) -> None:
    """Check the promises of a distillation loss.

    It is a frozen value that pickles, with a `repr` of one line; it returns a finite scalar in float32, in half precision and
    under autocast as well; its gradient goes to the student, is that of the value and finite, and none to the teacher; what it
    is given stays as it is; the order of the samples does not matter; where it says `is_distance`, it is 0 for a student that
    says what the teacher says, and nowhere below; `scale` is a factor and refused below 0; labels that it needs are asked for,
    and may be numbers of any type and shares alike.

    Args:
        loss: The loss.
        shapes: Shapes of the student's and the teacher's tensors, which it must take; by default all kinds, of which it may
            refuse some with a ValueError.

    Raises:
        AssertionError: A promise is broken, or it takes none of the shapes.
    """
    require(check_value(loss) == loss == copy.deepcopy(loss), f"{loss!r} must be equal to its copies")
    text = repr(loss)
    require("\n" not in text and "0x" not in text, f"{text} must be one line, without an address")
    check_refused(f"{loss!r} must refuse a scale below 0", "scale", lambda: replace(loss, scale=-1.0))
    known = LOGITS if isinstance(loss, LogitLoss) else FEATURES
    fitting = [pair for pair in shapes or known if shapes or _Case.made(loss, *pair).is_taken()]
    require(fitting, f"{loss!r} must take tensors of one of the shapes {[pair[0] for pair in known]}")
    for case in (_Case.made(loss, *pair) for pair in fitting):
        _check_value(case)
        _check_gradient(case)
        _check_precision(case)
        _check_order(case)
        _check_distance(case)
        _check_labels(case)


@dataclass(frozen=True)
class _Case:
    """A loss with tensors to call it with."""

    loss: Loss
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    adapter: Adapter | None = None

    @classmethod
    def made(cls, loss: Loss, own: tuple[int, ...], other: tuple[int, ...]) -> _Case:
        """Make tensors of two shapes."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(own, generator=generator), torch.randn(other, generator=generator)
        if isinstance(loss, LogitLoss):
            axis = 1 if len(own) > 3 else -1
            rows = student.movedim(axis, -1)[..., 0]
            labels = (torch.arange(rows.numel()) % 3).view(rows.shape)
        else:
            labels = torch.arange(own[0]) % 3
        return cls(loss, student, teacher, labels)

    @property
    def where(self) -> str:
        """Say what is called with what."""
        return f"{self.loss!r} of {tuple(self.student.shape)} and {tuple(self.teacher.shape)}"

    def is_taken(self) -> bool:
        """Tell if the loss takes the shapes."""
        try:
            self.with_adapter().value()
        except ValueError:
            return False
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise AssertionError(f"{self.where} must have a value, or be refused with a ValueError, got {said}") from error
        return True

    def with_adapter(self) -> _Case:
        """Make the adapter, the same one each time."""
        if not isinstance(self.loss, FeatureLoss):
            return self
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return replace(self, adapter=self.loss.adapter([self.student], [self.teacher]))

    def value(self, seed: int = 0) -> Tensor:
        """Call the loss."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(self.loss, FeatureLoss):
                adapter = self.adapter or self.with_adapter().adapter
                return self.loss(self.student, self.teacher, self.labels, adapter)
            assert isinstance(self.loss, LogitLoss)
            return self.loss(self.student, self.teacher, self.labels)


def _check_value(case: _Case) -> None:
    before = case.student.clone(), case.teacher.clone()
    value: Tensor = attempt(f"{case.where} must have a value", case.value)
    require(value.shape == () and value.dtype == torch.float32, f"{case.where} must be a scalar in float32, got {value!r}")
    require(value.isfinite(), f"{case.where} must be finite, got {value.detach():g}")
    require(same(value, case.value()), f"{case.where} must be the same each time")
    kept = same(case.student, before[0]) and same(case.teacher, before[1])
    require(kept, f"{case.where} must not write into what it is given")
    half = replace(case, loss=replace(case.loss, scale=0.5 * case.loss.scale))
    require(_close(half.value(), 0.5 * value), f"{case.where} must be twice as large with twice the scale")


def _check_gradient(case: _Case) -> None:
    student, teacher = case.student.clone().requires_grad_(), case.teacher.clone().requires_grad_()
    value = replace(case, student=student, teacher=teacher).value()
    attempt(f"{case.where} must be differentiable", value.backward)
    require(teacher.grad is None, f"{case.where} must have no gradient for the teacher")
    grad = student.grad
    if grad is None or not grad.isfinite().all() or not grad.any():
        raise AssertionError(f"{case.where} must have a finite gradient for the student, which is not 0")
    way = STEP * grad / grad.norm()
    rise = replace(case, student=case.student + way).value() - replace(case, student=case.student - way).value()
    told = 2 * STEP * grad.norm()
    close = torch.isclose(rise, told, rtol=0.05, atol=1e-5 * float(value.detach().abs()) + 1e-6)
    require(close, f"{case.where} must have the gradient of its value: it rises by {rise.detach():g}, not {told:g}")


def _check_precision(case: _Case) -> None:
    for kind in (torch.float16, torch.bfloat16):
        half = replace(case, student=case.student.to(kind), teacher=case.teacher.to(kind))
        full = replace(case, student=half.student.float(), teacher=half.teacher.float())
        value: Tensor = attempt(f"{case.where} must take {kind}", half.value)
        require(value.dtype == torch.float32, f"{case.where} must be in float32 for {kind}, got {value.dtype}")
        require(_close(value, full.value()), f"{case.where} must be computed in float32 for {kind}")
    with torch.autocast("cpu", torch.bfloat16):
        value = attempt(f"{case.where} must have a value under autocast", case.value)
    require(
        value.dtype == torch.float32 and _close(value, case.value()), f"{case.where} must be computed in float32 under autocast"
    )


def _check_order(case: _Case) -> None:
    if not same(case.value(0), case.value(1)):  # of random numbers, which go by place
        return
    order = torch.randperm(len(case.student), generator=torch.Generator().manual_seed(1))
    labels = None if case.labels is None else case.labels[order]
    other = replace(case.with_adapter(), student=case.student[order], teacher=case.teacher[order], labels=labels)
    require(_close(other.value(), case.value()), f"{case.where} must not change with the order of the samples")


def _check_distance(case: _Case) -> None:
    adapter = case.with_adapter().adapter
    learns = adapter is not None and any(True for _ in adapter.parameters())
    if not case.loss.is_distance or learns or case.student.shape != case.teacher.shape:
        return
    require(case.value() > 0, f"{case.where} must be above 0 where the student differs")
    equal = replace(case, student=case.teacher.clone().requires_grad_())
    value = equal.value()
    require(value.abs() < 1e-5, f"{case.where} must be 0 where the student equals the teacher, got {value.detach():g}")
    attempt(f"{case.where} must be differentiable", value.backward)
    grad = equal.student.grad
    flat = grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) < 1e-4
    require(flat, f"{case.where} must have no gradient where the student equals the teacher")


def _check_labels(case: _Case) -> None:
    if not case.loss.needs_labels:
        value = attempt(f"{case.where} must have a value without labels", replace(case, labels=None).value)
        require(value.isfinite(), f"{case.where} must be finite without labels, got {value.detach():g}")
        return
    without = replace(case, labels=None)
    check_refused(f"{case.where} must ask for labels", "labels", without.value)
    if not isinstance(case.loss, LogitLoss) or case.loss.is_outermost:
        return
    assert case.labels is not None
    value = case.value()
    for what, labels in _label_kinds(case.labels, case.student).items():
        found = attempt(f"{case.where} must take labels as {what}", partial(replace(case, labels=labels).value))
        require(_close(found, value), f"{case.where} must be the same with labels as {what}")


def _label_kinds(labels: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Return the same labels in all forms."""
    classes = torch.nn.functional.one_hot(labels, logits.shape[1 if logits.dim() > 3 else -1])
    shares = classes.movedim(-1, 1) if logits.dim() > 3 else classes
    alone = labels[:, None]
    return {"float": labels.float(), "int32": labels.int(), "numbers of shape (B, 1, ...)": alone, "shares": shares}


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-6))
