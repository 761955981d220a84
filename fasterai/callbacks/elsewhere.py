"""Callbacks of one framework that are given to another one: an error that names the right import, at the first thing asked.

To add a framework: its line in `FRAMEWORKS`, and what it asks a callback for first in `ASKED_BY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["ASKED_BY", "Elsewhere", "refuse_elsewhere"]

#: Module -> the framework's name, and the argument that takes its callbacks.
FRAMEWORKS = {
    "fastai": ("fastai", "cbs"),
    "lightning": ("Lightning", "callbacks"),
    "huggingface": ("Hugging Face", "callbacks"),
}
#: Module -> attributes that its framework asks a callback for first; fastai sets `learn` before it asks for any.
ASKED_BY: Mapping[str, frozenset[str]] = {
    "lightning": frozenset({"state_dict", "state_key", "setup", "on_exception"}),
    "huggingface": frozenset({"on_init_end"}),
}


def refuse_elsewhere(callback: object, own: str, other: str) -> NoReturn:
    """Refuse a callback that another framework was given.

    Args:
        callback: The callback.
        own: The module of its framework.
        other: The module of the other one.

    Raises:
        TypeError: In any case; it names the right import.
    """
    (name, _), (wanted, argument), kind = FRAMEWORKS[own], FRAMEWORKS[other], type(callback).__name__
    raise TypeError(f"{argument} must be {wanted}'s, got {name}'s {kind}; from fasterai.callbacks.{other} import {kind}")


class Elsewhere:
    """Refuses other frameworks than its own, one of Lightning and Hugging Face, before they do anything.

    Attributes:
        framework: The module of its own framework.
    """

    framework = ""

    def _refuse_learner(self, learner: Any) -> None:
        refuse_elsewhere(self, self.framework, "fastai")

    learn = property(fset=_refuse_learner)

    if not TYPE_CHECKING:  # a checker would take any attribute for there

        def __getattr__(self, name: str) -> Any:
            for other, asked in ASKED_BY.items():
                if name in asked and other != self.framework:
                    refuse_elsewhere(self, self.framework, other)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
