"""Distillation for the callbacks of every framework: its signature, and what a teacher and a loss may be given as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from fasterai.callbacks.methods import Method
from fasterai.core.schedules import Schedule
from fasterai.display import brief
from fasterai.distill.distiller import Distiller
from fasterai.distill.loss import Loss
from fasterai.distill.teachers import Teacher

__all__ = ["DistillMethod"]

#: A loss, or what makes one without arguments: its class, or a `partial` of it.
Makes = Loss | Callable[[], Loss]


class DistillMethod(Method):
    """Lets the model learn from a teacher while it trains: `(1 - w) * task + w * distillation`.

    What is validated, and what the framework logs as its loss of training, is the task's alone, except with Hugging Face,
    whose Trainer logs the loss that it trains on. The last distillation loss of an epoch is a figure of its own,
    `distill_loss`. A second fit with the same callback goes on with the adapters of the first.

    Args:
        teacher: The network that is learned from, a learner or trainer with one as its `model`, or a `Teacher`.
        loss: The loss, or several, which are added up; a class stands for its defaults.
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
        loss: Makes | Sequence[Makes],
        activations_student: Sequence[str | nn.Module] | None = None,
        activations_teacher: Sequence[str | nn.Module] | None = None,
        weight: float = 0.5,
        schedule: Schedule | Callable[[float], float] | str | None = None,
        **options: Any,
    ) -> None:
        losses = [_made(one) for one in loss] if isinstance(loss, list | tuple) else _made(loss)
        layers = activations_student, activations_teacher
        self.distiller = Distiller(_network(teacher), losses, *layers, weight=weight, schedule=schedule, **options)
        super().__init__(self.distiller)

    def _settings(self) -> str:
        names = " + ".join(type(one).__name__ for one in self.distiller.losses)
        return f"{names}, weight {brief(self.distiller.weight)}"


def _network(teacher: Any) -> Any:
    """Return a teacher as it is, or the network of a learner or trainer."""
    if isinstance(teacher, nn.Module | Teacher):
        return teacher
    inner = getattr(teacher, "model", None)
    return inner if isinstance(inner, nn.Module) else teacher


def _made(loss: Any) -> Any:
    """Return a loss as it is, or what its class or a `partial` of it makes."""
    kind = loss.func if isinstance(loss, partial) else loss
    return loss() if isinstance(kind, type) and issubclass(kind, Loss) else loss
