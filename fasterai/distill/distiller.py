"""The distiller: a student learns from a teacher while it trains, beside its own task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import schedules
from fasterai.core.batch import Batch, Fit
from fasterai.core.checks import check_fraction, from_catalogue
from fasterai.core.participant import Participant
from fasterai.core.schedules import Schedule
from fasterai.display import Shown, Table, settings
from fasterai.distill.capture import Capture, find_layers
from fasterai.distill.loss import Adapter, FeatureLoss, LogitLoss, Loss
from fasterai.distill.losses import as_loss
from fasterai.distill.teachers import Answers, NetworkTeacher, Teacher

__all__ = ["Distiller"]

Layers = Sequence[str | nn.Module]


class Distiller(Shown, Participant):
    """Adds what a teacher knows to the loss of the task: `(1 - w) * task + w * distillation`.

    The teacher runs in eval mode and without gradients, on the inputs of each training batch; its parameters never change.
    Validation is the task's alone. What has to train along, such as adapters between features of other shapes, joins the
    optimizer with the first batch, is saved and resumed with the run, and leaves with it.

    Args:
        teacher: The network that is learned from, or a `Teacher`.
        loss: The loss, or several, which are added up: values, their classes or names, or functions of the student's and the
            teacher's logits.
        activations_student: Layers of the student whose outputs the losses of features read, by name or themselves.
        activations_teacher: Those of the teacher, as many: the first belongs to the first, and so on.
        weight: The share `w` of the distillation in the loss, in [0, 1].
        schedule: The share of `weight` at each position of the run, its name, or a function; None for all of it throughout.

    Raises:
        ValueError: A weight is out of range, lists of layers are not of one length, or a loss of features has none.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher,
        loss: Any,
        activations_student: Layers | None = None,
        activations_teacher: Layers | None = None,
        *,
        weight: float = 0.5,
        schedule: Schedule | Callable[[float], float] | str | None = None,
    ) -> None:
        self.teacher = teacher if isinstance(teacher, Teacher) else NetworkTeacher(teacher)
        self.losses = [as_loss(one) for one in (loss if isinstance(loss, list | tuple) else [loss])]
        self.layers = list(activations_student or ()), list(activations_teacher or ())
        self.weight = check_fraction("weight", weight)
        self.schedule = None if schedule is None else from_catalogue("schedule", schedule, schedules)
        self._adapters: list[Adapter | None] = []
        self._adapter_states: list[Mapping[str, Any]] = []
        self._capture: Capture | None = None
        self._seen: tuple[Answers, Answers] | None = None
        self._step, self._total_steps = 0, 1
        self._value: Tensor | None = None

    def _line(self) -> str:
        names = ", ".join(type(one).__name__ for one in self.losses)
        return f"<Distiller: {names}, weight {self.weight:g}>"

    def _parts(self) -> Iterator[Table | str]:
        yield settings({"losses": self.losses, "weight": self.weight, "schedule": self.schedule})

    # --- a run -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Put hooks on the layers, and the teacher into eval mode."""
        assert fit.model is not None
        found = find_layers("activations_student", fit.model, self.layers[0])
        self.teacher.begin(fit.model, self.layers[1])
        self._capture = Capture(found, graph=True)
        self._step, self._total_steps = 0, fit.total_steps

    def after_forward(self, batch: Batch) -> None:
        """Let the teacher answer for the batch."""
        assert self._capture is not None
        own = Answers(batch.logits, [x for x in self._capture.take() if x is not None])
        self._seen = own, self.teacher.answer(batch)

    def on_first_batch(self, batch: Batch) -> Iterable[nn.Parameter]:
        """Make the adapters for the shapes of the first batch."""
        assert self._seen is not None
        own, other = self._seen
        self._adapters = [
            one.adapter(*self._pairs(one, own, other)) if isinstance(one, FeatureLoss) else None for one in self.losses
        ]
        for one, saved in zip(self._adapters, self._adapter_states, strict=False):
            if one is not None:
                one.load_state_dict(saved)
        self._adapter_states = []
        device = batch.logits.device
        return [p for one in self._adapters if one is not None for p in one.to(device).parameters()]

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return `(1 - w) * loss + w * distillation`."""
        assert self._seen is not None
        (own, other), self._seen = self._seen, None
        with torch.autocast(loss.device.type, enabled=False):
            parts = [self._loss_of(one, adapter, own, other, one.labels_of(batch)) for one, adapter in self._with_adapters()]
        value = torch.stack(parts).sum()
        self._value = value.detach()
        return torch.lerp(loss, value.to(loss.dtype), self._weight)

    def _with_adapters(self) -> list[tuple[Loss, Adapter | None]]:
        return list(zip(self.losses, self._adapters, strict=True))

    def _loss_of(self, one: Loss, adapter: Adapter | None, own: Answers, other: Answers, labels: Any) -> Tensor:
        if isinstance(one, FeatureLoss):
            return one(*self._pairs(one, own, other), labels, adapter)
        assert isinstance(one, LogitLoss)
        assert own.logits is not None
        assert other.logits is not None
        return one(own.logits, other.logits, labels)

    def _pairs(self, one: FeatureLoss, own: Answers, other: Answers) -> tuple[list[Tensor], list[Tensor]]:
        if not self.layers[0] and one.on_outputs:
            assert own.logits is not None
            assert other.logits is not None
            return [own.logits], [other.logits]
        return list(own.features), list(other.features)

    @property
    def _weight(self) -> float:
        """The weight of the step under way."""
        if self.schedule is None:
            return self.weight
        return self.weight * float(self.schedule((self._step + 1) / self._total_steps))

    def after_step(self, position: float) -> None:
        """Count the step."""
        self._step = round(position * self._total_steps)
        self.teacher.after_step()

    def metrics(self) -> dict[str, float]:
        """Return the last distillation loss."""
        return {"distill_loss": float("nan") if self._value is None else float(self._value)}

    def on_fit_end(self, completed: bool) -> None:
        """Take the hooks off, and give the teacher its modes back."""
        if self._capture is not None:
            self._capture.remove()
        self._capture = self._seen = None
        self.teacher.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the adapters and the teacher's state."""
        adapters = self._adapter_states or [{} if one is None else dict(one.state_dict()) for one in self._adapters]
        return {"step": self._step, "adapters": adapters, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; adapters take theirs over when they are made, with the first batch."""
        self._step, self._adapter_states = state["step"], list(state["adapters"])
        self.teacher.load_state_dict(state["teacher"])
