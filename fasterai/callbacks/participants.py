"""Callbacks made of a participant's class: its arguments without the model, in every framework.

To add one: `class MyMethod(ParticipantMethod)` with `makes = MyParticipant` beside the others, and its line in each framework's
file. Signature and docstring are the participant's.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from fasterai.callbacks.methods import Method
from fasterai.core.loop import Participant, numbered
from fasterai.display import brief
from fasterai.model.names import unwrap

__all__ = ["ParticipantMethod"]

MODEL = inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="nn.Module | None")
SECTION = re.compile(r"^(Args|Attributes|Raises):$", re.MULTILINE)


class ParticipantMethod(Method):
    """Lets a participant of one class take part: the callback's arguments are the participant's, without the model.

    A second fit of the same model goes on with the participant of the first; another model gets one of its own.

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
    __signature__: ClassVar[inspect.Signature | None]

    def __init_subclass__(cls, **options: Any) -> None:
        """Give a callback the signature and the text of what it makes."""
        super().__init_subclass__(**options)
        if "makes" in vars(cls):
            cls.__doc__ = _text(vars(cls).get("__doc__"), cls.makes)
        is_stated_here = getattr(cls.__init__, "__code__", None) is ParticipantMethod.__init__.__code__
        cls.__signature__ = cls._signature() if is_stated_here and hasattr(cls, "makes") else None

    def __init__(self, *arguments: Any, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(self._make)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module inside the model that is trained, or be left out, got {brief(model)}")
        bound = self._bound(arguments, options)
        self.part = model
        self.participant: Any = None
        self._positional, self._by_name = bound.args[1:], bound.kwargs
        self.arguments = _flat(bound)
        bound.apply_defaults()
        check = getattr(self.makes, "check_settings", None)
        if check is not None:
            check(**_flat(bound))

    def _bound(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> inspect.BoundArguments:
        kind, taken = type(self).__name__, self._signature()
        if arguments and isinstance(arguments[0], nn.Module):
            raise TypeError(
                f"model must be left out for the one that is trained, or given by its name, got {type(arguments[0]).__name__} "
                f"in the place of {next(iter(taken.parameters))}; it is {kind}{taken}"
            )
        try:
            return inspect.signature(self.makes).bind(nn.Identity(), *arguments, **options)
        except TypeError as error:
            close = [difflib.get_close_matches(name, taken.parameters, n=1) for name in options if name not in taken.parameters]
            hint = f"; did you mean {close[0][0]!r}?" if close and close[0] else ""
            raise TypeError(f"{kind}() {error}{hint}; it is {kind}{taken}") from None

    @classmethod
    def _signature(cls) -> inspect.Signature:
        """Return the participant's signature without its model, and with the callback's."""
        _, *own = inspect.signature(cls.makes).parameters.values()
        last = [one for one in own if one.kind is one.VAR_KEYWORD]
        return inspect.Signature([*(one for one in own if one not in last), MODEL, *last])

    def _make(self, model: nn.Module) -> list[Participant]:
        part: Any = model if self.part is None else self.part
        if self.participant is not None and unwrap(self.participant.model) is unwrap(part):
            self.participant.model = part  # a wrapper may have come or gone
        else:
            self.participant = self.makes(part, *self._positional, **self._by_name)  # type: ignore[call-arg]
        return [self.participant]

    def _settings(self) -> str:
        return ", ".join(f"{name} {brief(value)}" for name, value in self.arguments.items()) or "by default"

    def metrics(self) -> dict[str, float]:
        """Return the participant's figures, zeros before the first batch; numbered where a callback beside has the names."""
        found = dict.fromkeys(self.figures, 0.0) if self.participant is None else self.participant.metrics()
        result: dict[str, float] = {}
        taken = {name for one in self._before() for name in one.metrics()}
        for name, value in found.items():
            result[numbered(name, "_", taken | result.keys())] = value
        return result

    def _before(self) -> list[Any]:
        """List the callbacks whose figures keep their names: all that are of another kind, and those of this kind before."""
        beside = [one for one in self.neighbours() if isinstance(one, Method)]
        own = beside.index(self) if self in beside else 0
        return [one for i, one in enumerate(beside) if i < own or not isinstance(one, ParticipantMethod)]


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return all arguments but the first by name, those of `**options` among them."""
    kinds = bound.signature.parameters
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        found.update(value if kinds[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found


def _text(own: str | None, kind: type[Participant]) -> str:
    """Return a callback's docstring: its own words or the participant's, and the participant's arguments without the model.

    The arguments may stand at a base class.
    """
    written = [inspect.cleandoc(base.__doc__) for base in kind.__mro__ if base.__doc__]
    words = inspect.cleandoc(own) if own else SECTION.split(written[0])[0].strip()
    if SECTION.search(words):
        return words
    _, *rest = SECTION.split(next((text for text in written if "\nArgs:\n" in text), ""))
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    _, _, *entries = [*re.split(r"\n(?=    \S)", sections.get("Args", "").rstrip()), ""]
    arguments = [*filter(None, entries), "    model: The part of the model that it is made for; all of it if left out."]
    parts = [words, "\n".join(["Args:", *arguments])]
    parts.append("Attributes:\n    participant: The participant of the last run, None before.")
    raises = sections.get("Raises", "").strip("\n")
    return "\n\n".join([*parts, f"Raises:\n{raises}"] if raises else parts)
