"""Look of removals that go on for several steps: their settings in one line, their groups as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fasterai.display import Shown, Table, brief, counted

__all__ = ["ShownChannels"]


class ShownChannels(Shown):
    """Base of what removes channels from a model; subclasses have `channels`, the counts at first and now by group."""

    channels: Any

    def _settings(self) -> tuple[Any, ...]:
        """Return the ratio and the axes, as they were given or read."""
        raise NotImplementedError

    def _line(self) -> str:
        first, now = (sum(counts[i] for counts in self.channels.values()) for i in (0, 1))
        left = f"{now:,} of {counted(first, 'channel')} left" if first else "not begun"
        return f"<{type(self).__name__}: {', '.join(map(_word, self._settings()))}; {left}>"

    def _parts(self) -> Iterator[Table | str]:
        yield ", ".join(map(_word, self._settings()))
        body = [(name, f"{first:,}", f"{now:,}") for name, (first, now) in self.channels.items()]
        yield Table(("group", "channels", "now"), body) if body else "no channels have been looked at yet"


def _word(value: Any) -> str:
    """Write a setting: a name as it is, a few shares in full."""
    if isinstance(value, str):
        return value
    return f"shares of {counted(len(value), 'layer')}" if isinstance(value, Mapping) else brief(value)
