"""A distillation loss: the two kinds, the tensors that they read, and the parts of them that train.

A loss is a frozen value that is called with the student's and the teacher's tensors. The catalogues are `logits.py`,
`features.py` and `embeddings.py`. To add a loss: a frozen dataclass there, its name in `__all__`, a row in the test of the
catalogue and a line in its page, `docs/distillation-losses.md` and so on.

A class that is called with tensors returns the loss at once, since the losses of the public fasterai are functions:
`SoftTarget(pred, teacher_pred, T=4)` is `SoftTarget(T=4)(pred, teacher_pred)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch
from fasterai.core.checks import check_number, warn

__all__ = ["Adapter", "FeatureLoss", "LogitLoss", "Loss", "as_rows", "labels_as_rows"]

#: The label of what torch's cross-entropy leaves out.
PADDING = -100
#: What the functions of the public fasterai are called with: the logits, the features, the labels.
TENSORS = ("pred", "teacher_pred", "fm_s", "fm_t", "target")


class Adapter(nn.Module, ABC):
    """A part of a loss that trains with the student, and reads features of its."""

    @abstractmethod
    def keep_(self, index: int, kept: Any) -> Mapping[nn.Parameter, Mapping[int, Any]]:
        """Follow the student, whose channels went: those `kept`, in order, of the feature at a place among the pairs, stay.

        Parameters stay the same objects and get smaller.

        Returns:
            What has got smaller: parameter -> dimension -> the indices that stay, by which an optimizer's state is cut.
        """


@dataclass(frozen=True)
class Loss(ABC):
    """A loss that compares a student with its teacher.

    Args:
        scale: The factor of the result, at least 0.

    Attributes:
        needs_labels: Whether the labels of the batch have to be there.
        is_distance: Whether it is 0 where the student says what the teacher says, and never below.

    Raises:
        ValueError: A setting is out of range.
        TypeError: A setting is of the wrong type.
    """

    needs_labels: ClassVar[bool] = False
    is_distance: ClassVar[bool] = True

    _: KW_ONLY
    scale: float = field(default=1.0)

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """Make a loss; with tensors, or dicts of them, return its value instead."""
        if not _holds_tensors(args[:1]) and not any(name in settings for name in TENSORS):
            return object.__new__(cls)
        given = {name: settings.pop(name, None) for name in TENSORS}
        own = object.__new__(cls)
        own.__init__(**settings)  # type: ignore[misc]
        return own._of_public(args, given)

    def __post_init__(self) -> None:
        """Check the settings."""
        check_number("scale", self.scale, at_least=0)

    @abstractmethod
    def _of_public(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        """Return the loss for the arguments of the public fasterai's function, by position or by name."""

    def labels_of(self, batch: Batch) -> Any:
        """Return the labels that the loss is called with."""
        return batch.labels

    def check_run(self, student: nn.Module, batch: Batch) -> None:
        """Look at the student and the first batch of a run, which may say that the loss is not meant for them.

        Raises:
            ValueError: It is not.
        """

    def _check_labels(self, labels: object) -> None:
        if self.needs_labels and labels is None:
            repair = "batches must have targets; in a loop of your own, pass them to handle.loss"
            raise ValueError(f"labels must be there for {type(self).__name__}, got None; {repair}")


@dataclass(frozen=True)
class LogitLoss(Loss):
    """A loss of logits: `(B, C)`, `(B, T, C)` or `(B, C, H, W)`.

    Attributes:
        least_classes: The number of classes that it takes.
        is_outermost: Whether it chooses rows itself, and so cannot be inside another one.
    """

    least_classes: ClassVar[int] = 2
    is_outermost: ClassVar[bool] = False

    def check_run(self, student: nn.Module, batch: Batch) -> None:
        """Warn of labels that leave tokens out, which the mean over rows counts all the same."""
        labels, shape = batch.labels, batch.logits.shape
        are_of_tokens = isinstance(labels, Tensor) and len(shape) == 3 and labels.shape == shape[:2]
        if are_of_tokens and not self.is_outermost and bool((labels == PADDING).any()):
            name = type(self).__name__
            warn(f"{name} counts the tokens whose label is {PADDING}, too, such as padding; Tokens({name}(...)) does not")

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32: the mean over rows, which are samples, tokens or places.

        Args:
            student: The student's logits; gradients go there alone.
            teacher: The teacher's, of the same shape.
            labels: The classes as numbers, whole ones of any type, of the shape of the logits without their classes; or
                shares of the classes, of the shape of the logits.

        Raises:
            ValueError: Shapes differ, labels are missing, or there are too few classes.
        """
        rows, others, wanted = self.rows(student, teacher, labels)
        with torch.autocast(student.device.type, enabled=False):
            return self.scale * self.of_rows(rows, others, wanted).mean()

    def rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what `of_rows` is called with, checked."""
        self._check_labels(labels)
        check_shapes(student, teacher)
        rows = as_rows(student)
        if rows.shape[1] < self.least_classes:
            raise ValueError(
                f"logits must have at least {self.least_classes} classes for {type(self).__name__}, got shape "
                f"{tuple(student.shape)}; Logits() compares values"
            )
        return rows, as_rows(teacher).detach(), None if labels is None else labels_as_rows(labels, student)

    def _of_public(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        tensors = dict(zip(("pred", "teacher_pred"), args, strict=False))
        if len(args) > 2 or any(tensors.get(n) is given[n] is None for n in ("pred", "teacher_pred")):
            raise TypeError(f"{type(self).__name__} must be called with pred and teacher_pred, and settings by keyword")
        named = {**given, **tensors}
        return self(named["pred"], named["teacher_pred"], named["target"])

    @abstractmethod
    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of each row `(N,)`, of logits `(N, C)` in float32; of labels `(N,)` or `(N, C)`.

        A loss that compares rows with each other returns a scalar.
        """


@dataclass(frozen=True)
class FeatureLoss(Loss):
    """A loss of features: outputs of layers, in pairs as given.

    Attributes:
        on_outputs: Whether it reads the outputs of the networks where no layers are named.
    """

    on_outputs: ClassVar[bool] = False

    def __call__(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in float32: the sum over pairs.

        Args:
            student: The student's features, one or several; gradients go there and to the adapter.
            teacher: The teacher's, as many.
            labels: The labels of the batch, for the losses that need them.
            adapter: The one that `adapter` has made for such pairs; None where shapes fit.
        """
        self._check_labels(labels)
        pairs = [student] if isinstance(student, Tensor) else list(student)
        others = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        with torch.autocast(pairs[0].device.type if pairs else "cpu", enabled=False):
            return self.scale * self.of_pairs([*pairs], [x.detach() for x in others], labels, adapter)

    @abstractmethod
    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the loss of all pairs, a scalar."""

    def _of_public(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        tensors = dict(zip(("fm_s", "fm_t", "pred"), args, strict=False))
        if len(args) > 3 or any(tensors.get(n) is given[n] is None for n in ("fm_s", "fm_t")):
            raise TypeError(f"{type(self).__name__} must be called with fm_s and fm_t, and settings by keyword")
        named = {**given, **tensors}
        return self(_features(named["fm_s"]), _features(named["fm_t"]), named["target"])

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make what has to train with the student so that features of these shapes can be compared; None for nothing.

        Raises:
            ValueError: Shapes cannot be adapted.
        """
        return None


def as_rows(logits: Tensor) -> Tensor:
    """Return logits as rows `(N, C)` in float32; the classes are the last of up to three dimensions, else the second.

    Numbers without classes, `(B,)`, are rows of one class.
    """
    if logits.dim() == 1:
        logits = logits[:, None]
    elif logits.dim() > 3:
        logits = logits.movedim(1, -1)
    return logits.reshape(-1, logits.shape[-1]).float()


def labels_as_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels as rows: numbers `(N,)`, or shares `(N, C)` in float32 where they have the shape of the logits.

    Raises:
        ValueError: They have neither of the shapes.
    """
    if labels.shape == logits.shape and logits.dim() > 1:
        return as_rows(labels)
    if labels.numel() * as_rows(logits).shape[1] != logits.numel():
        raise ValueError(
            f"labels must be one number for each row of the logits {tuple(logits.shape)}, or shares of that shape, got shape "
            f"{tuple(labels.shape)}"
        )
    return labels.reshape(-1).long()


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Check that logits have one shape.

    Raises:
        ValueError: They differ; in the classes, both numbers are named.
    """
    if student.shape == teacher.shape:
        return
    own, other = (tuple(x.shape) for x in (student, teacher))
    axis = 1 if len(own) > 3 else -1
    if len(own) == len(other) > 1 and own[axis] != other[axis]:
        raise ValueError(
            f"teacher must have the student's {own[axis]} classes, got {other[axis]}; give it a head, or a tokenizer, with the "
            "same ones in the same order"
        )
    raise ValueError(f"teacher must return logits of the student's shape {own}, got {other}")


def _holds_tensors(values: object) -> bool:
    """Tell if something is a tensor, or a list, tuple or dict that begins with one."""
    while isinstance(values, Mapping | list | tuple):
        values = next(iter(values.values() if isinstance(values, Mapping) else values), None)
    return isinstance(values, Tensor)


def _features(value: Any) -> list[Tensor]:
    """Return features as a list, of a tensor, a list or a dict by layer."""
    if isinstance(value, Tensor):
        return [value]
    return list(value.values() if isinstance(value, Mapping) else value)
