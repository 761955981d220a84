"""Distillation for the callbacks of every framework: its signature, and what a teacher may be given as."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fasterai.callbacks.methods import Method
from fasterai.core import schedules
from fasterai.core.checks import check_fraction, entry_or_repr
from fasterai.core.schedules import Schedule
from fasterai.display import brief
from fasterai.distill.distiller import Distiller
from fasterai.distill.teachers import Teacher

__all__ = ["DistillMethod"]


class DistillMethod(Method):
    """Lets the model learn from a teacher while it trains: `(1 - w) * task + w * distillation`.

    What is validated, and what the framework logs as its loss of training, is the task's alone, except with Hugging Face,
    whose Trainer logs the loss that it trains on. The mean of the distillation loss over an epoch is a figure of its
    own, `distill_loss`. A second fit with the same callback goes on with the adapters of the first.

    Args:
        teacher: The network that is learned from, a learner or trainer with one as its `model`, or a `Teacher`; or a list of
            several.
        loss: The loss, or several, which are added up: values, their classes or names, or functions of the student's and the
            teacher's logits.
        activations_student: Layers of the student whose outputs the losses of features read, by name or themselves.
        activations_teacher: Those of the teacher, as many: the first belongs to the first, and so on.
        weight: The share `w` of the distillation in the loss, in [0, 1].
        schedule: The share of `weight` at each position of the run, its name, or a function; None for all of it throughout.
        **options: Further arguments of the `Distiller`.

    Attributes:
        distiller: The participant, a `Distiller`.

    Raises:
        ValueError: A weight is out of range, lists of layers are not of one length, or a loss of features has none.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    is_late = False

    def __init__(
        self,
        teacher: Any,
        loss: Any,
        activations_student: Sequence[str | nn.Module] | None = None,
        activations_teacher: Sequence[str | nn.Module] | None = None,
        weight: float = 0.5,
        schedule: Schedule | Callable[[float], float] | str | None = None,
        **options: Any,
    ) -> None:
        network = [_network(one) for one in teacher] if isinstance(teacher, list | tuple) else _network(teacher)
        layers = activations_student, activations_teacher
        self.distiller = Distiller(network, loss, *layers, weight=weight, schedule=schedule, **options)
        super().__init__(self.distiller)

    @property
    def weight(self) -> float:
        """The share of the distillation in the loss, in [0, 1]; another one counts from the next batch on."""
        return self.distiller.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.distiller.weight = check_fraction("weight", value)

    def _settings(self) -> str:
        losses = " + ".join(re.sub(r"scale=1\.0(, )?", "", brief(one)) for one in self.distiller.losses)
        schedule = self.distiller.schedule
        known = entry_or_repr(schedule, schedules)
        more = (
            ""
            if schedule is None
            else f", schedule {known if hasattr(schedules, known) else brief(getattr(schedule, 'function', schedule))}"
        )
        return f"{losses}, weight {brief(self.distiller.weight)}{more}"


def _network(teacher: Any) -> Any:
    """Return a teacher unchanged, of a learner or trainer its network."""
    if isinstance(teacher, nn.Module | Teacher):
        return teacher
    inner = getattr(teacher, "model", None)
    return inner if isinstance(inner, nn.Module) else teacher
