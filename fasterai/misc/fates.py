"""Fates of the layers of a model, as the reports of folding and factoring say them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from fasterai.display import Shown, Table

__all__ = ["Fates", "Familiar"]


class Fates(Shown):
    """Report of what became of each layer: a sentence, and a line for each of them.

    Attributes:
        kind: The word for what the lines are of.
        left: Name of each layer that stayed -> why.
    """

    kind: ClassVar[str] = "layer"
    left: Mapping[str, str]

    @abstractmethod
    def _head(self) -> str:
        """Return the sentence."""

    @abstractmethod
    def _changed(self) -> Iterable[tuple[str, str]]:
        """Return (name, what became of it) of the layers that did not stay."""

    def _line(self) -> str:
        return f"<{type(self).__name__}: {self._head()}>"

    def _parts(self) -> Iterator[Table | str]:
        fates = [*self._changed(), *((name, f"left alone, {why}") for name, why in self.left.items())]
        body = [(name or "the model", fate) for name, fate in fates]
        yield self._head()
        if body:
            yield Table((self.kind, "what becomes of it"), body, left=2, text=[f"{name}: {fate}" for name, fate in body])


class Familiar(Shown):
    """Object of the familiar calls, shown as the report of its last one.

    Attributes:
        report: That report.
    """

    report: Fates

    def _line(self) -> str:
        return f"<{type(self).__name__}: {self.report._head()}>"

    def _parts(self) -> Iterable[Table | str]:
        return self.report._parts()
