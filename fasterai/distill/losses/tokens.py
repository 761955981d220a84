"""Losses of the logits of language models: each token with its own label, padding left out.

>>> import torch
>>> loss = Tokens()
>>> student, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
>>> labels = torch.tensor([[3, 1, 4, 1, 5], [9, 2, -100, -100, -100]])
>>> teacher[1, 1:] += 1000 * torch.randn(4, 11)  # what would tell of padding
>>> same = teacher.clone()
>>> same[1, 1:] = 0
>>> bool(loss(student, teacher, labels) == loss(student, same, labels))
True
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch
from fasterai.core.checks import check_count
from fasterai.distill.losses.logits import SoftTarget, check_inner
from fasterai.distill.losses.loss import LogitLoss, as_rows, check_shapes, labels_as_rows

__all__ = ["Tokens"]

#: Ends of the names of Transformers' classes whose logits stand at their labels.
AT_LABELS = ("ForMaskedLM", "ForTokenClassification")


@dataclass(frozen=True)
class Tokens(LogitLoss):
    """Another loss, as the mean over the tokens that count: `sum_i m_i loss_i / sum_i m_i`, `m_i` 0 at padding, else 1.

    A token counts unless its label is `ignore`. With `shift`, the logits at a place belong to the label of the next place, as
    in models that write on (GPT); the last logits then have no label. Models whose logits stand at their labels need
    `shift=False`: encoders with masked words (BERT), decoders beside an encoder (T5), maps of classes `(B, C, H, W)`.

    With `shift`, where the model is called with an `attention_mask` of the labels' shape, what it masks does not count either,
    nor does what padding on the left says of the first token; without labels, the `input_ids` stand for them.

    `top_k` compares the teacher's `k` largest classes of each token alone: both networks' logits of these are what the loss
    sees, so a softmax is renormalised among them. With `rest`, all other classes are one more class, whose logit is the
    logarithm of the sum of their exponentials; at temperature 1 its probability is the sum of theirs.

    Args:
        loss: The loss of logits, of one token. One that compares tokens with each other (`DIST`) is given those that count,
            whose number is then read back from the device.
        ignore: The label of what does not count.
        shift: Whether logits belong to the next label.
        top_k: How many classes are compared; None for all.
        rest: Whether the classes beyond `top_k` are one more class.

    Raises:
        TypeError: The loss is none of logits.
        ValueError: `rest` is given without `top_k`, or a setting is out of range.
    """

    needs_labels: ClassVar[bool] = True
    is_outermost: ClassVar[bool] = True

    loss: LogitLoss = field(default=SoftTarget(T=2.0))
    ignore: int = -100
    shift: bool = True
    top_k: int | None = None
    rest: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_inner(self.loss)
        if self.top_k is not None:
            check_count("top_k", self.top_k, minimum=2)
        elif self.rest:
            raise ValueError("rest must be False without top_k, got True; pass top_k, the number of classes")

    @property
    def is_distance(self) -> bool:  # type: ignore[override]
        """Tell whether the loss is a distance."""
        return self.loss.is_distance

    def labels_of(self, batch: Batch) -> Any:
        """Return the labels, with `ignore` where the attention mask is 0, and where the logits before it stand at padding."""
        labels, mask = batch.labels, batch.keywords.get("attention_mask")
        if labels is None:
            labels = batch.keywords.get("input_ids") if self.shift else None if self.loss.needs_labels else mask
        elif not self.shift:  # the mask may be that of an encoder's inputs
            return labels
        if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.shape != labels.shape:
            return labels
        out = mask.to(labels.device) == 0
        if self.shift:  # nor does what padding in front says of the first token
            out = torch.cat([out[:, :1], out[:, 1:] | out[:, :-1]], 1)
        return labels.masked_fill(out, self.ignore)

    def check_run(self, student: nn.Module, batch: Batch) -> None:
        """Refuse a shift for a student of Transformers whose logits stand at their labels.

        Raises:
            ValueError: It is one.
        """
        kind = next((type(one).__name__ for one in student.modules() if self.shift and _stands_at_labels(one)), None)
        if kind is not None:
            raise ValueError(
                f"shift must be False for a {kind}, whose logits stand at their labels, got {self!r}; pass "
                "Tokens(..., shift=False)"
            )

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32: the mean over the tokens that count, 0 if there are none.

        Args:
            student: The student's logits `(B, T, C)`; without `shift` also `(B, C)` and `(B, C, H, W)`.
            teacher: The teacher's, of the same shape.
            labels: The labels `(B, T)`.
        """
        self._check_labels(labels)
        assert labels is not None
        check_shapes(student, teacher)
        if self.shift:
            if student.dim() != 3 or labels.shape != student.shape[:2]:
                shapes = f"{tuple(student.shape)} and {tuple(labels.shape)}"
                raise ValueError(f"logits and labels must be (B, T, C) and (B, T) with shift, got {shapes}; pass shift=False")
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        wanted = labels_as_rows(labels, student)
        if wanted.dim() > 1:
            raise ValueError(f"labels must be numbers for Tokens, got shares of shape {tuple(labels.shape)}")
        counts = wanted != self.ignore
        rows, others = (_only(x, counts) for x in (student, teacher.detach()))
        with torch.autocast(student.device.type, enabled=False):
            return self.scale * self._mean(rows, others, wanted, counts)

    def _mean(self, student: Tensor, teacher: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        values = self.of_rows(student, teacher, labels)
        if values.dim():
            return self.loss.scale * torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)
        return self.loss.scale * self.of_rows(student[counts], teacher[counts], labels[counts])

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of each token, of logits `(N, C)`, whether it counts or not."""
        if self.top_k is None or self.top_k >= student.shape[1]:
            return self.loss.of_rows(student, teacher, labels)
        there = teacher.topk(self.top_k, 1).indices
        shares = None if labels is None else (there == labels[:, None]).float()
        if self.rest and shares is not None:
            shares = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1)
        return self.loss.of_rows(self._among(student, there), self._among(teacher, there), shares)

    def _among(self, logits: Tensor, there: Tensor) -> Tensor:
        """Return the logits of the classes asked for, and that of all others as one."""
        found = logits.gather(1, there)
        if not self.rest:
            return found
        others = logits.scatter(1, there, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([found, others], 1)


def _stands_at_labels(model: nn.Module) -> bool:
    """Tell if a model of Transformers has a decoder beside its encoder, or says masked words or a class of each token."""
    config = getattr(model, "config", None)
    return getattr(config, "is_encoder_decoder", False) is True or type(model).__name__.endswith(AT_LABELS)


def _only(logits: Tensor, counts: Tensor) -> Tensor:
    """Return logits as rows, 0 where they do not count, so that what stands there changes no gradient."""
    rows = as_rows(logits)
    return rows.masked_fill(~counts[:, None], 0)
