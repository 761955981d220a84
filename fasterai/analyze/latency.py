"""Latency of a model: the measured time of a forward pass on this machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.analyze.latency_report import NOISE, Latency, LatencyComparison, Speed, Timing, against_first, timing_of
from fasterai.analyze.layer_times import layer_times
from fasterai.analyze.timing import by_turns, on_threads, passes_in, seconds_per_pass, spread_of
from fasterai.core.checks import check_count
from fasterai.model.inputs import batch_of, positional
from fasterai.model.running import at_rest, copies, device_name
from fasterai.model.supported import check_model

__all__ = ["NOISE", "Latency", "LatencyComparison", "Speed", "Timing", "batch_of", "compare_latency", "latency", "timing_of"]

#: In how many turns each model is measured, so that a machine that grows slower or faster does so for all of them.
TURNS = 15
#: The spread of the ratios at which there are enough turns, and how many times as long it takes at most until then.
SETTLED, LONGER = 1.05, 3
#: In how many of them each layer is timed as well, and in how many passes of a quick model in each.
LAYER_TURNS, LAYER_PASSES = 5, 4
WARM_UP = 6
#: Seconds of a block of a model quicker than that: long against the clock and the loop around the calls.
BLOCK = 0.001


def latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    threads: int = 1,
    channels_last: bool = False,
    min_run_time: float = 1.0,
) -> Latency:
    """Measure a model's forward pass in eval mode, without gradients: after a warm-up, blocks of several passes are timed.

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
    """Measure several models in turns, in changing order, so that a slower or faster machine affects all alike.

    Where the ratios of the times still spread by more than 5 % at the end, turns go on, for three times as long at most.

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
    _check_models(models)
    sizes = _check_sizes(batch_sizes)
    check_count("threads", threads)
    if not (isinstance(min_run_time, int | float) and 0 < min_run_time < math.inf):
        raise ValueError(f"min_run_time must be a number of seconds above 0, got {min_run_time!r}")
    inputs = copies(positional(example_inputs))
    if channels_last:
        models = {name: copy.deepcopy(model).to(memory_format=torch.channels_last) for name, model in models.items()}  # type: ignore[call-overload]
        inputs = tree_map(_as_channels_last, inputs)
    timings: dict[str, list[Timing]] = {name: [] for name in models}
    ratios: dict[str, list[tuple[float, tuple[float, float]]]] = {name: [] for name in models}
    with _all_at_rest(models):
        for size in sizes:
            blocks, passes = _take_turns(models, batch_of(inputs, size), threads, min_run_time)
            fastest = {name: [min(turn) for turn in turns] for name, turns in blocks.items()}
            for name, ratio in against_first(fastest).items():
                timings[name].append(timing_of(size, fastest[name], passes[name], sum(map(len, blocks[name]))))
                ratios[name].append(ratio)
    device = device_name(next(iter(models.values())), inputs)
    return LatencyComparison(
        {name: Latency(tuple(ts), device, threads, channels_last) for name, ts in timings.items()},
        {name: tuple(ratio for ratio, _ in found) for name, found in ratios.items()},
        {name: tuple(spread for _, spread in found) for name, found in ratios.items()},
    )


def _take_turns(
    models: Mapping[str, nn.Module], inputs: tuple[Any, ...], threads: int, min_run_time: float
) -> tuple[dict[str, list[list[float]]], dict[str, list[dict[str, float]]]]:
    """Time models in turns: name -> for each turn the seconds per pass of its blocks, and name -> those of the layers."""
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in models}

    def turn(name: str) -> list[float]:
        model, times = models[name], list[float]()
        # A pass that is not counted: the other models' weights are in the cache. The fastest tells how many make a block.
        fastest[name] = min(fastest[name], seconds_per_pass(model, inputs))
        count = passes_in(BLOCK, fastest[name])
        while not times or count * sum(times) < min_run_time / TURNS:
            times.append(seconds_per_pass(model, inputs, count))
        at_once = min(count, LAYER_PASSES)
        if len(passes[name]) < LAYER_TURNS * at_once:
            passes[name] += [layer_times(model, inputs) for _ in range(at_once)]
        return times

    with on_threads(threads):
        fastest = {name: _warm_up(model, inputs) for name, model in models.items()}
        runs = {name: partial(turn, name) for name in models}
        blocks = by_turns(runs, partial(_is_enough, longest=LONGER * min_run_time * len(models)))
    return blocks, passes


def _is_enough(found: Mapping[str, Sequence[Sequence[float]]], seconds: float, longest: float) -> bool:
    """Tell if there are enough turns: all that were asked for, and more while the ratios spread, for so many seconds."""
    if len(next(iter(found.values()))) < TURNS:
        return False
    if seconds >= longest:
        return True
    first, *others = ([min(turn) for turn in turns] for turns in found.values())
    return all(spread_of(first, own) <= SETTLED for own in others)


def _warm_up(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Run a model several times, and return the seconds of its fastest pass.

    Raises:
        ValueError: It does not run on the inputs.
    """
    try:
        return min(seconds_per_pass(model, inputs) for _ in range(WARM_UP))
    except Exception as error:
        raise ValueError(f"example_inputs must be arguments that the models run on, got an error: {error}") from error


@contextmanager
def _all_at_rest(models: Mapping[str, nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(at_rest(model))
        yield


def _check_models(models: Mapping[str, nn.Module]) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models must be a dict of at least one name and model, got {models!r}")
    for name, model in models.items():
        check_model(model, f"models[{name!r}]", holds_values=True)


def _check_sizes(batch_sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    if batch_sizes is None:
        return (None,)
    if isinstance(batch_sizes, int):
        batch_sizes = (batch_sizes,)
    sizes = tuple(dict.fromkeys(check_count("batch_sizes", size) for size in batch_sizes))
    if not sizes:
        raise ValueError("batch_sizes must be at least one size, or None for the inputs as they are, got none")
    return sizes


def _as_channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x
