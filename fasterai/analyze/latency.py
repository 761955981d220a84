"""How long a forward pass takes on this machine: measured, never computed from counts."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.analyze.layer_times import LayerTiming, layer_times, layer_timings, quartiles
from fasterai.core.checks import check_count
from fasterai.display import INK, QUIET, SERIES, dress, new_axes, short_time, table
from fasterai.model.inputs import positional
from fasterai.model.running import at_rest, copies, device_name
from fasterai.model.supported import check_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.benchmark import Timer

__all__ = ["Latency", "LatencyComparison", "Timing", "batch_of", "compare_latency", "latency", "timing_of"]

#: In how many turns each model is measured, so that a machine that grows slower or faster does so for all of them.
TURNS = 15
#: In how many of them each layer is timed as well, and in how many passes of a quick model in each.
LAYER_TURNS, LAYER_PASSES = 5, 4
#: Times closer to each other than this are called the same.
NOISE = 0.05
WARM_UP = 3
#: Seconds of a block of a model quicker than that: long against the clock and the loop around the calls.
BLOCK = 0.005


@dataclass(frozen=True)
class Timing:
    """How long one forward pass took.

    Attributes:
        batch_size: Of how many samples; None where the inputs were taken as they are.
        median: Seconds, the median over the measured blocks.
        iqr: Seconds between the first and the third quartile of the blocks.
        blocks: How many blocks of forward passes were measured.
        layers: Name of a module -> the time of its own part, in passes apart from the blocks. These hold a few microseconds
            for each module, and need not add up to the whole. Empty for compiled models, which do not run layer by layer.
    """

    batch_size: int | None
    median: float
    iqr: float
    blocks: int
    layers: Mapping[str, LayerTiming] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """How long a model takes; `print` shows it as a table.

    Attributes:
        timings: One for each batch size.
        device: What it ran on.
        threads: On how many CPU threads.
        channels_last: Whether images and weights lay in that memory format.
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
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("batch", "median", "IQR", "per sample", "blocks")
        body = [
            (_batch(t), short_time(t.median), short_time(t.iqr), short_time(t.median / (t.batch_size or 1)), str(t.blocks))
            for t in self.timings
        ]
        return "\n".join([*table(header, body), _conditions(self)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the median of each batch size, with the spread.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(6.0, 3.6) if ax is None else ax
        _draw_bars(axes, {"": self})
        dress(axes, f"Time of a forward pass, {_conditions(self)}", grid="y")
        return axes


@dataclass(frozen=True)
class LatencyComparison:
    """Several models, measured in turns in one run; `print` shows them side by side.

    Attributes:
        models: Name -> its latency. The first is the one that the others are held against.
        ratios: Name -> for each batch size how many times as fast as the first it is: the median over the turns of the
            first's time by its own, so that 2.0 is twice as fast.
        quartiles: Name -> for each batch size the first and the third quartile of that over the turns.
    """

    models: Mapping[str, Latency]
    ratios: Mapping[str, tuple[float, ...]]
    quartiles: Mapping[str, tuple[tuple[float, float], ...]]

    @property
    def batch_sizes(self) -> tuple[int | None, ...]:
        """What was measured."""
        return tuple(t.batch_size for t in next(iter(self.models.values())).timings)

    def ratio(self, name: str, batch_size: int | None) -> float:
        """How many times as fast as the first model one is."""
        return self.ratios[name][self.batch_sizes.index(batch_size)]

    def is_same(self, name: str) -> bool:
        """Whether a model is as fast as the first at every batch size: within 5 %, or within the spread of the turns."""
        pairs = zip(self.ratios[name], self.quartiles[name], strict=True)
        return all(abs(ratio - 1) <= NOISE or low <= 1 <= high for ratio, (low, high) in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        models = {name: one.to_dict() for name, one in self.models.items()}
        ratios = {name: list(values) for name, values in self.ratios.items()}
        return {"models": models, "ratios": ratios, "quartiles": {n: [list(q) for q in qs] for n, qs in self.quartiles.items()}}

    def __str__(self) -> str:
        first = next(iter(self.models))
        header = ("model", "batch", "median", "IQR", f"against {first}")
        body = [
            (name, _batch(t), short_time(t.median), short_time(t.iqr), f"{self.ratio(name, t.batch_size):.2f}x as fast")
            for batch_size in self.batch_sizes
            for name, one in self.models.items()
            for t in (one[batch_size],)
        ]
        return "\n".join([*table(header, body), f"{_conditions(self.models[first])}, measured in turns"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the medians side by side, with the spread and how many times as fast as the first each is.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(max(5.0, 1.6 + 1.1 * len(self.models) * len(self.batch_sizes)), 3.8) if ax is None else ax
        _draw_bars(axes, self.models, self.ratios)
        dress(axes, f"Time of a forward pass, {_conditions(next(iter(self.models.values())))}", grid="y")
        axes.legend(loc="upper left", frameon=False, labelcolor=QUIET)
        return axes


def latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    threads: int = 1,
    channels_last: bool = False,
    min_run_time: float = 1.0,
) -> Latency:
    """Measure a model's forward pass, in eval mode and without gradients, by `torch.utils.benchmark`.

    Args:
        model: The model, compiled or not; measured as it is.
        example_inputs: A tensor, or a tuple or list of positional arguments, on the model's device.
        batch_sizes: For each, the samples of the inputs are repeated to as many: tensors whose first dimension is that of the
            first tensor are batches. None measures the inputs as they are.
        threads: CPU threads of the measured operations; as many as before afterwards.
        channels_last: Measure a copy of the model in that memory format, with images in it.
        min_run_time: For how many seconds each batch size is measured at least, beyond the warm-up.

    Raises:
        TypeError: `model` is no module, or a size or number of threads is not whole.
        ValueError: A number is out of range, or the model does not run on these inputs.
    """
    options = {"threads": threads, "channels_last": channels_last, "min_run_time": min_run_time}
    return compare_latency({"model": model}, example_inputs, batch_sizes=batch_sizes, **options).models["model"]  # type: ignore[arg-type]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    threads: int = 1,
    channels_last: bool = False,
    min_run_time: float = 1.0,
) -> LatencyComparison:
    """Measure models side by side: they take turns, in changing order, so that all see the same machine.

    Args:
        models: Name -> model; the others are held against the first.
        example_inputs: As for `latency`; all models get the same.
        batch_sizes: As for `latency`.
        threads: As for `latency`.
        channels_last: As for `latency`.
        min_run_time: For how many seconds each model and batch size is measured at least, over all turns.

    Raises:
        TypeError: A model is no module, or a size or number of threads is not whole.
        ValueError: There is no model, a number is out of range, or a model does not run on these inputs.
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models must be a dict of at least one name and model, got {models!r}")
    for name, model in models.items():
        check_model(model, f"models[{name!r}]", holds_values=True)
    sizes = _check_sizes(batch_sizes)
    check_count("threads", threads)
    if not (isinstance(min_run_time, int | float) and 0 < min_run_time < math.inf):
        raise ValueError(f"min_run_time must be a number of seconds above 0, got {min_run_time!r}")
    inputs = copies(positional(example_inputs))
    if channels_last:
        models = {name: copy.deepcopy(model).to(memory_format=torch.channels_last) for name, model in models.items()}  # type: ignore[call-overload]
        inputs = tree_map(_as_channels_last, inputs)
    timings: dict[str, list[Timing]] = {name: [] for name in models}
    ratios: dict[str, list[float]] = {name: [] for name in models}
    spreads: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with _all_at_rest(models):
        for size in sizes:
            turns, passes = _take_turns(models, batch_of(inputs, size), threads, min_run_time)
            first = next(iter(turns.values()))
            for name, blocks in turns.items():
                times = [seconds for turn in blocks for seconds in turn]
                timings[name].append(timing_of(size, times, passes[name]))
                pairs = zip(first, blocks, strict=True)
                by_turn = [statistics.median(a) / statistics.median(b) for a, b in pairs]
                ratios[name].append(statistics.median(by_turn))
                spreads[name].append(quartiles(by_turn))
    device = device_name(next(iter(models.values())), inputs)
    measured = {name: Latency(tuple(ts), device, threads, channels_last) for name, ts in timings.items()}
    within = {name: tuple(values) for name, values in spreads.items()}
    return LatencyComparison(measured, {name: tuple(values) for name, values in ratios.items()}, within)


def _take_turns(
    models: Mapping[str, nn.Module], inputs: tuple[Any, ...], threads: int, min_run_time: float
) -> tuple[dict[str, list[list[float]]], dict[str, list[dict[str, float]]]]:
    """Name -> for each turn the seconds per forward pass of its blocks; name -> for each timed pass those of the layers."""
    from torch.utils.benchmark import Timer, set_torch_threads

    timers = {
        name: Timer("model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=threads)
        for name, model in models.items()
    }
    counts = {}
    for name, timer in timers.items():
        try:
            timer.timeit(WARM_UP)
        except Exception as error:
            raise ValueError(f"example_inputs must be arguments that the models run on, got an error: {error}") from error
        counts[name] = max(1, round(BLOCK / timer.timeit(WARM_UP).median))
    blocks: dict[str, list[list[float]]] = {name: [] for name in models}
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for turn in range(TURNS):
        for name in sorted(timers, key=list(timers).index, reverse=bool(turn % 2)):
            blocks[name].append(_turn(timers[name], counts[name], min_run_time / TURNS))
            if turn < LAYER_TURNS:
                with set_torch_threads(threads):
                    passes[name] += [layer_times(models[name], inputs) for _ in range(min(counts[name], LAYER_PASSES))]
    return blocks, passes


def _turn(timer: Timer, count: int, seconds: float) -> list[float]:
    """Seconds per forward pass of each block, until so many seconds have passed."""
    if count == 1:
        return list(timer.blocked_autorange(min_run_time=seconds).times)
    # For a quick model blocked_autorange spends 0.2 seconds on finding the size of a block, in every turn anew.
    times: list[float] = []
    while not times or count * sum(times) < seconds:
        times.append(timer.timeit(count).median)
    return times


@contextmanager
def _all_at_rest(models: Mapping[str, nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(at_rest(model))
        yield


def _check_sizes(batch_sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    if batch_sizes is None:
        return (None,)
    if isinstance(batch_sizes, int):
        batch_sizes = (batch_sizes,)
    sizes = tuple(dict.fromkeys(check_count("batch_sizes", size) for size in batch_sizes))
    if not sizes:
        raise ValueError("batch_sizes must be at least one size, or None for the inputs as they are, got none")
    return sizes


def batch_of(inputs: tuple[Any, ...], size: int | None) -> tuple[Any, ...]:
    """The inputs with their samples repeated, or cut, to a batch of another size."""
    if size is None:
        return inputs
    first = next((x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), None)
    if first is None or not len(first):
        raise ValueError("example_inputs must hold a tensor with at least one sample to make batches of; pass batch_sizes=None")
    samples = len(first)

    def resized(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != samples:
            return x
        return x[torch.arange(size, device=x.device) % samples]

    result: tuple[Any, ...] = tree_map(resized, inputs)
    return result


def _as_channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def timing_of(batch_size: int | None, times: Sequence[float], passes: Sequence[Mapping[str, float]]) -> Timing:
    """What blocks took as a whole, and layers in passes apart."""
    first, third = quartiles(times)
    return Timing(batch_size, statistics.median(times), third - first, len(times), layer_timings(passes))


def _batch(timing: Timing) -> str:
    return "as given" if timing.batch_size is None else str(timing.batch_size)


def _conditions(one: Latency) -> str:
    layout = ", channels last" if one.channels_last else ""
    return f"{one.device}, {one.threads} thread{'s' if one.threads > 1 else ''}{layout}"


def _draw_bars(axes: Axes, models: Mapping[str, Latency], ratios: Mapping[str, tuple[float, ...]] | None = None) -> None:
    width = 0.8 / len(models)
    sizes = [_batch(t) for t in next(iter(models.values())).timings]
    for i, (name, one) in enumerate(models.items()):
        places = [group + (i - (len(models) - 1) / 2) * width for group in range(len(sizes))]
        medians, spreads = [1e3 * t.median for t in one.timings], [5e2 * t.iqr for t in one.timings]
        color = SERIES[i % len(SERIES)]
        axes.bar(places, medians, width * 0.92, yerr=spreads, color=color, label=name or None, ecolor=INK)
        for group, (place, height, spread) in enumerate(zip(places, medians, spreads, strict=True)):
            text = short_time(height / 1e3)
            if ratios is not None and i:
                text += f"\n{ratios[name][group]:.2f}x"
            axes.annotate(
                text, (place, height + spread), xytext=(0, 3), textcoords="offset points", ha="center", color=QUIET, fontsize=8
            )
    axes.set_xticks(range(len(sizes)), [f"batch {size}" if size.isdigit() else size for size in sizes])
    axes.set_ylabel("ms")
    axes.margins(y=0.22)
    axes.set_ylim(bottom=0)
