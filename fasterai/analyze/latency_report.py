"""Latency of one model or of several, as data, table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fasterai.analyze.layer_times import LayerTiming, layer_timings
from fasterai.analyze.timing import dealt, quartiles, ratio_of
from fasterai.display import (
    INK,
    Brief,
    Shown,
    Table,
    counted,
    dress,
    legend_above,
    model_colors,
    new_axes,
    short_time,
    styled,
    write_above,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NOISE", "NOISY", "Latency", "LatencyComparison", "Speed", "Timing", "against_first", "timing_of"]

#: Times closer to each other than this are called the same.
NOISE = 0.05
#: A ratio whose spread's upper end is more than so many times the lower is not named.
NOISY = 1.25


class Speed(NamedTuple):
    """Speed of a model relative to another, with how much it spread: 2.0 is twice as fast.

    Attributes:
        ratio: The other's time by its own.
        low: The lower end of its spread, over the middle half of the fastest passes at least.
        high: The upper end.
    """

    ratio: float
    low: float
    high: float

    @property
    def is_noisy(self) -> bool:
        """True if the middle half of the measured ratios lies so far apart that none of them can be named."""
        return self.high > NOISY * self.low

    @property
    def is_same(self) -> bool:
        """True if the times are equal within 5 %, or within a small spread."""
        return not self.is_noisy and (abs(self.ratio - 1) <= NOISE or self.low <= 1 <= self.high)

    @property
    def cell(self) -> str:
        """The ratio for a table: `1.84`, `same`, or the range where it spreads too far."""
        return "same" if self.is_same else f"{self.low:.2g} to {self.high:.2g}" if self.is_noisy else f"{self.ratio:.2f}"

    @property
    def share(self) -> str:
        """The share of the other's time for a table or picture: `54 %`, `same`, or the range where it spreads too far."""
        if self.is_noisy:
            return f"{1 / self.high:.0%} to {1 / self.low:.0%}"
        return "same" if self.is_same else f"{1 / self.ratio:.0%}"

    @property
    def bar(self) -> tuple[float, float]:
        """Start and length of a bar of the share of the other's time: the range alone where that spreads too far."""
        return (1 / self.high, 1 / self.low - 1 / self.high) if self.is_noisy else (0.0, 1 / self.ratio)

    def words(self, batch_size: int | None = None) -> str:
        """Write the speed in words, with the batch that it is of if there is one."""
        at = "" if batch_size is None else f" at batch {batch_size}"
        if self.is_noisy:
            return f"between {self.low:.2g}x and {self.high:.2g}x as fast{at}: too noisy to name one"
        return f"{'the same time' if self.is_same else f'{self.ratio:.2f}x as fast'}{at}"


@dataclass(frozen=True, repr=False)
class Timing(Brief):
    """Time of one forward pass. The turns are dealt out to five hands, and the fastest block of each hand counts.

    Attributes:
        batch_size: The number of samples; None where the inputs were taken as they are.
        median: Seconds, the median over the hands.
        iqr: Seconds between the first and the third quartile of the hands.
        blocks: The number of measured blocks of forward passes.
        layers: Name of a module -> the time of its own part, in passes apart from the blocks. These hold a few microseconds
            for each module, and need not add up to the whole. Empty for compiled models, which do not run layer by layer.
    """

    batch_size: int | None
    median: float
    iqr: float
    blocks: int
    layers: Mapping[str, LayerTiming] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Latency(Shown):
    """Latency of a model; `print` shows it as a table.

    Attributes:
        timings: One for each batch size.
        device: The device that it ran on.
        threads: The number of CPU threads.
        channels_last: True if images and weights lay in that memory format.
    """

    timings: tuple[Timing, ...]
    device: str
    threads: int
    channels_last: bool

    def __getitem__(self, batch_size: int | None) -> Timing:
        for timing in self.timings:
            if timing.batch_size == batch_size:
                return timing
        known = ", ".join(str(t.batch_size) for t in self.timings)
        raise KeyError(f"batch_size must be one of {known}, got {batch_size!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def _line(self) -> str:
        times = ", ".join(f"{short_time(t.median)} {_batch_words(t)}" for t in self.timings)
        return f"<Latency: {times}; {_conditions(self)}>"

    def _parts(self) -> Iterator[Table | str]:
        header = ("batch", "median", "IQR", "per sample", "blocks")
        body = [
            (_batch(t), short_time(t.median), short_time(t.iqr), short_time(t.median / (t.batch_size or 1)), str(t.blocks))
            for t in self.timings
        ]
        yield Table(header, body)
        yield _conditions(self)

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the median of each batch size, with the spread.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(6.0, 3.6) if ax is None else ax
        _draw_bars(axes, {"": self})
        dress(axes, f"Time of a forward pass, {_conditions(self)}", grid="y")
        return axes


@dataclass(frozen=True, repr=False)
class LatencyComparison(Shown):
    """Latencies of several models, measured in turns in one run; `print` shows them side by side.

    Attributes:
        models: Name -> its latency. The first is the one that the others are held against.
        ratios: Name -> for each batch size how many times as fast as the first it is: the first's time by its own, so that 2.0
            is twice as fast. Both times are those that are shown, medians over the five hands.
        quartiles: Name -> for each batch size the first and the third quartile of the ratios hand by hand; where the ratio
            lies outside of them, the nearer one is the ratio.
    """

    models: Mapping[str, Latency]
    ratios: Mapping[str, tuple[float, ...]]
    quartiles: Mapping[str, tuple[tuple[float, float], ...]]

    @property
    def batch_sizes(self) -> tuple[int | None, ...]:
        """Measured batch sizes; None stands for the inputs as given."""
        return tuple(t.batch_size for t in next(iter(self.models.values())).timings)

    def ratio(self, name: str, batch_size: int | None = None) -> float:
        """Return the first model's time divided by the named model's: 2.0 means twice as fast. A single batch needs no name."""
        return self.ratios[name][self._place(batch_size)]

    def speed(self, name: str, batch_size: int | None = None) -> Speed:
        """Return how many times as fast as the first model it is, with the spread; its text names no figure that is noise."""
        place = self._place(batch_size)
        return Speed(self.ratios[name][place], *self.quartiles[name][place])

    def _place(self, size: int | None) -> int:
        if size not in self.batch_sizes and (size is not None or len(self.batch_sizes) > 1):
            raise ValueError(f"batch_size must be one of {', '.join(map(str, self.batch_sizes))}, got {size!r}")
        return self.batch_sizes.index(size) if size in self.batch_sizes else 0

    def is_same(self, name: str) -> bool:
        """Tell if a model is as fast as the first one at every batch size: within 5 %, or within the spread of the turns."""
        pairs = zip(self.ratios[name], self.quartiles[name], strict=True)
        return all(abs(ratio - 1) <= NOISE or low <= 1 <= high for ratio, (low, high) in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        models = {name: one.to_dict() for name, one in self.models.items()}
        ratios = {name: list(values) for name, values in self.ratios.items()}
        return {"models": models, "ratios": ratios, "quartiles": {n: [list(q) for q in qs] for n, qs in self.quartiles.items()}}

    def _line(self) -> str:
        first = next(iter(self.models))
        speeds = [f"{n} {self.speed(n, size).words(size)}" for n in self.models if n != first for size in self.batch_sizes]
        return f"<LatencyComparison against {first}: {', '.join(speeds) or 'no other model'}>"

    def _parts(self) -> Iterator[Table | str]:
        first = next(iter(self.models))
        header = ("model", "batch", "median", "IQR", f"against {first}")
        body = [
            (
                name,
                _batch(t),
                short_time(t.median),
                short_time(t.iqr),
                "" if name == first else self.speed(name, t.batch_size).words(),
            )
            for batch_size in self.batch_sizes
            for name, one in self.models.items()
            for t in (one[batch_size],)
        ]
        yield Table(header, body)
        yield f"{_conditions(self.models[first])}, measured in turns"

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the medians side by side, with the spread and each model's speed relative to the first.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(max(5.0, 1.6 + 1.1 * len(self.models) * len(self.batch_sizes)), 3.8) if ax is None else ax
        _draw_bars(axes, self.models, self.speed)
        dress(axes, "Time of a forward pass", grid="y", below=_conditions(next(iter(self.models.values()))))
        legend_above(axes)
        return axes


def timing_of(
    batch_size: int | None, times: Sequence[float], passes: Sequence[Mapping[str, float]], blocks: int | None = None
) -> Timing:
    """Summarise the seconds per pass of turns, of so many blocks in all (by default one each), and of each layer's passes."""
    first, third = quartiles(fastest := dealt(times))
    return Timing(batch_size, statistics.median(fastest), third - first, blocks or len(times), layer_timings(passes))


def against_first(turns: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, tuple[float, float]]]:
    """Return name -> (first model's time / its time, the ends of its spread); both times are medians over the five hands.

    Args:
        turns: Name -> seconds of a forward pass, turn by turn.
    """
    first = next(iter(turns.values()))
    found = {name: ratio_of(first, times) for name, times in turns.items()}
    return {name: (ratio, (low, high)) for name, (ratio, low, high) in found.items()}


def _batch_words(timing: Timing) -> str:
    return "as given" if timing.batch_size is None else f"at batch {timing.batch_size}"


def _batch(timing: Timing) -> str:
    return "as given" if timing.batch_size is None else str(timing.batch_size)


def _conditions(one: Latency) -> str:
    layout = ", channels last" if one.channels_last else ""
    return f"{one.device}, {counted(one.threads, 'thread')}{layout}"


def _draw_bars(axes: Axes, models: Mapping[str, Latency], speed: Callable[[str, int | None], Speed] | None = None) -> None:
    width, colors = 0.8 / len(models), model_colors(models)
    sizes = [_batch(t) for t in next(iter(models.values())).timings]
    for i, (name, one) in enumerate(models.items()):
        places = [group + (i - (len(models) - 1) / 2) * width for group in range(len(sizes))]
        medians, spreads = [1e3 * t.median for t in one.timings], [5e2 * t.iqr for t in one.timings]
        axes.bar(places, medians, width * 0.92, yerr=spreads, color=colors[name], label=name or None, ecolor=INK)
        for group, (place, height, spread) in enumerate(zip(places, medians, spreads, strict=True)):
            text = short_time(height / 1e3)
            if speed is not None and i:
                found = speed(name, one.timings[group].batch_size)
                text += f"\n{found.cell}" + ("" if found.is_same else "x")
            write_above(axes, text, place, height + spread)
    axes.set_xticks(range(len(sizes)), [f"batch {size}" if size.isdigit() else size for size in sizes])
    axes.set_ylabel("ms")
    axes.margins(y=0.22)
    axes.set_ylim(bottom=0)
