"""Callbacks made of a participant's class: its arguments without the model, in every framework.

To add one: `class MyMethod(ParticipantMethod)` with `makes = MyParticipant` beside the others, and its line in each framework's
file.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

from fasterai.callbacks.methods import Method
from fasterai.core.loop import Participant
from fasterai.display import brief
from fasterai.misc.ternary.training import TernaryTraining
from fasterai.model.names import unwrap
from fasterai.sparse.nm.srste import SRSTE, STE

__all__ = ["ParticipantMethod", "SRSTEMethod", "STEMethod", "TernarizeMethod"]


class ParticipantMethod(Method):
    """Lets a participant of one class take part: the callback's arguments are the participant's, without the model.

    A second fit of the same model goes on with the participant of the first.

    Args:
        *arguments: The participant's arguments after the model.
        model: The part of the model that it is made for; all of it if left out.
        **options: Its keyword arguments.

    Attributes:
        makes: The participant's class. It may have a static method `check_settings` that takes all arguments but the model by
            name, and refuses those that no model makes right.
        figures: Names of the participant's metrics, which tables ask for before it is made.
        participant: The participant of the last run, None before the first.

    Raises:
        ValueError: `check_settings` refuses an argument.
        TypeError: An argument is none of the participant's, is missing or of the wrong type.
    """

    makes: ClassVar[type[Participant]]
    figures: ClassVar[tuple[str, ...]] = ("sparsity",)

    def __init__(self, *arguments: Any, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(self._make)
        try:
            bound = inspect.signature(self.makes).bind(nn.Identity(), *arguments, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}; the arguments are {self._signature()}") from None
        self.part = model
        self.participant: Any = None
        self.arguments = dict(list(bound.arguments.items())[1:])
        bound.apply_defaults()
        check = getattr(self.makes, "check_settings", None)
        if check is not None:
            check(**dict(list(bound.arguments.items())[1:]))

    @classmethod
    def _signature(cls) -> inspect.Signature:
        own = inspect.signature(cls.makes)
        return own.replace(parameters=list(own.parameters.values())[1:], return_annotation=inspect.Signature.empty)

    def _make(self, model: nn.Module) -> list[Participant]:
        part: Any = model if self.part is None else self.part
        if self.participant is not None and unwrap(self.participant.model) is unwrap(part):
            self.participant.model = part  # a wrapper may have come or gone
        else:
            self.participant = self.makes(part, **self.arguments)  # type: ignore[call-arg]
        return [self.participant]

    def _settings(self) -> str:
        return ", ".join(f"{name} {brief(value)}" for name, value in self.arguments.items()) or "by default"

    def metrics(self) -> dict[str, float]:
        """Return the participant's figures; zeros before the first batch."""
        found: dict[str, float] = dict.fromkeys(self.figures, 0.0) if self.participant is None else self.participant.metrics()
        return found


class SRSTEMethod(ParticipantMethod):
    """Trains the model at N:M from the first step: arguments of `SRSTE`, without the model."""

    makes = SRSTE


class STEMethod(ParticipantMethod):
    """Trains the model at N:M without decay: arguments of `STE`, without the model."""

    makes = STE


class TernarizeMethod(ParticipantMethod):
    """Trains the model with ternary groups, straight through: arguments of `TernaryTraining`, without the model."""

    makes = TernaryTraining
    figures = ("zeros",)
