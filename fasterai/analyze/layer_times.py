"""Times of single layers in a forward pass, taken by marks before and after every module."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fasterai.analyze.counting import followed
from fasterai.analyze.timing import quartiles
from fasterai.display import Brief
from fasterai.model.names import unwrap
from fasterai.model.running import device_of, wait_for

__all__ = ["LayerTiming", "layer_times", "layer_timings", "quartiles"]


@dataclass(frozen=True, repr=False)
class LayerTiming(Brief):
    """Time of one module without its submodules, which have times of their own.

    Attributes:
        median: Seconds, the median over the passes.
        iqr: Seconds between the first and the third quartile of the passes.
        passes: The number of measured passes.
    """

    median: float
    iqr: float
    passes: int


def layer_times(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, float]:
    """Run a model once, and return module name -> seconds without its submodules, summed over all its calls.

    A mark is set, by torch's global hooks, where a module begins and where it ends; the time between two marks belongs to the
    module under way. On accelerators marks are events on the stream, and the pass waits for nothing. Each mark takes some
    microseconds, so that the parts add up to more than a pass without them, and those of small layers on CPU are too long.

    Args:
        model: The model, in the mode that it is to run in. A compiled one does not run layer by layer: it has no times.
        inputs: Its positional arguments.
    """
    if _is_compiled(model):
        return {}
    names = {id(module): name for name, module in unwrap(model).named_modules()}
    device = device_of(model, inputs)
    mark, seconds = _clock(device)
    marks: list[tuple[str, Any]] = []  # whose time ends here, and when
    under_way = [""]

    def enter(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            marks.append((under_way[-1], mark()))
            under_way.append(names[id(module)])

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            marks.append((under_way.pop(), mark()))

    wait_for(device)
    with followed(enter, leave):
        model(*inputs)
    wait_for(device)
    spent: dict[str, float] = {}
    for (_, start), (name, end) in pairwise(marks):
        spent[name] = spent.get(name, 0.0) + seconds(start, end)
    return {name: spent[name] for name in names.values() if name in spent}


def layer_timings(passes: Sequence[Mapping[str, float]]) -> dict[str, LayerTiming]:
    """Return the median and spread of each layer over several passes; a layer that a pass did not reach took 0 s there."""
    timings = {}
    for name in dict.fromkeys(name for one in passes for name in one):
        times = [one.get(name, 0.0) for one in passes]
        first, third = quartiles(times)
        timings[name] = LayerTiming(statistics.median(times), third - first, len(times))
    return timings


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return two functions: one sets a mark, one gives the seconds between two marks after waiting for the device."""
    if device.type == "cpu":
        return time.perf_counter, lambda start, end: end - start
    stream = torch.accelerator.current_stream(device)

    def mark() -> Any:
        event = torch.Event(device=device, enable_timing=True)
        event.record(stream)
        return event

    return mark, lambda start, end: start.elapsed_time(end) / 1e3
