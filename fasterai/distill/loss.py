"""A distillation loss: the two kinds, the tensors that they read, and the parts of them that train.

A loss is a frozen value that is called with the student's and the teacher's tensors. The catalogues are `logits.py`,
`features.py` and `embeddings.py`. To add a loss: a frozen dataclass there, its name in `__all__`, a row in the test of the
catalogue and a line in its page, `docs/distillation-losses.md` and so on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Adapter", "FeatureLoss", "LogitLoss", "Loss", "as_rows"]


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
    """

    needs_labels: ClassVar[bool] = False

    _: KW_ONLY
    scale: float = field(default=1.0)


@dataclass(frozen=True)
class LogitLoss(Loss):
    """A loss of logits: `(B, C)`, `(B, T, C)` or `(B, C, H, W)`."""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32: the mean over rows, which are samples, tokens or places.

        Args:
            student: The student's logits; gradients go there alone.
            teacher: The teacher's, of the same shape.
            labels: The classes as numbers, of the shape of the logits without their classes, or shares of the shape of the
                logits.
        """
        wanted = None if labels is None else labels_as_rows(labels, student)
        return self.scale * self.of_rows(as_rows(student), as_rows(teacher).detach(), wanted).mean()

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
        pairs = [student] if isinstance(student, Tensor) else list(student)
        others = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        return self.scale * self.of_pairs([*pairs], [x.detach() for x in others], labels, adapter)

    @abstractmethod
    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the loss of all pairs, a scalar."""

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make what has to train with the student so that features of these shapes can be compared; None for nothing.

        Raises:
            ValueError: Shapes cannot be adapted.
        """
        return None


def as_rows(logits: Tensor) -> Tensor:
    """Return logits as rows `(N, C)` in float32; the classes are the last of three dimensions, else the second."""
    if logits.dim() > 3:
        logits = logits.movedim(1, -1)
    return logits.reshape(-1, logits.shape[-1]).float()


def labels_as_rows(labels: Any, logits: Tensor) -> Tensor:
    """Return labels as rows: numbers `(N,)`, or shares `(N, C)` where they have the shape of the logits."""
    return as_rows(labels) if labels.shape == logits.shape else labels.reshape(-1)
