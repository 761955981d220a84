"""A model with and without its channels, counted and timed in turns, while both can be had."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.cost import cost
from fasterai.analyze.latency import Latency, LatencyComparison, timing_of
from fasterai.analyze.layer_times import layer_times, quartiles
from fasterai.model.names import unwrap
from fasterai.model.running import at_rest, copies, device_name, device_of, wait_for
from fasterai.model.supported import said
from fasterai.prune.surgery.operate import Surgery

__all__ = ["DENSE", "SMALL", "Measurement", "measured"]

DENSE, SMALL = "dense", "small"
#: Seconds of timing in all, beyond the fewest turns; seconds of one block; the spread at which there are enough turns.
BUDGET, BLOCK, SETTLED = 0.2, 0.001, 0.02
FEWEST, MOST = 5, 15
#: In how many turns each layer is timed as well.
LAYER_TURNS = 3


@dataclass(frozen=True)
class Measurement:
    """The dense and the small model side by side, or why there are no figures.

    Attributes:
        comparison: What they cost, and how fast they are; None if it was not measured.
        inputs: What they were run on.
        why_not: Why there are no figures.
    """

    comparison: Comparison | None = None
    inputs: str = ""
    why_not: str = "it was not asked for"


def measured(model: nn.Module, surgery: Surgery, inputs: tuple[Any, ...], description: str) -> Measurement:
    """Count and time a model before and after a surgery.

    A forward pass of each is timed in turns, in changing order, at least five times each, until the ratio of the times has
    settled or 0.2 seconds have passed; in three of them also a pass of each layer by layer. The model ends
    small, with modes, buffers, gradients and random generators as they were.

    Args:
        model: The model, small already.
        surgery: That made it small.
        inputs: Positional arguments.
        description: What they are.
    """
    model = unwrap(model)
    try:
        with surgery.undone():
            dense = cost(model, inputs)
        costs = {DENSE: dense, SMALL: cost(model, inputs)}
        return Measurement(Comparison(costs, _timed(model, surgery, copies(inputs))), description, "")
    except Exception as error:  # a removal that went well is not to fail for its figures
        return Measurement(None, description, said(error))


def _timed(model: nn.Module, surgery: Surgery, inputs: tuple[Any, ...]) -> LatencyComparison:
    """The times of both states, by turns."""
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {DENSE: surgery.undone, SMALL: nullcontext}
    times: dict[str, list[float]] = {name: [] for name in states}
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    counts: dict[str, int] = {}
    start = time.perf_counter()
    while not _is_enough(times, time.perf_counter() - start):
        for name in sorted(states, reverse=bool(len(times[SMALL]) % 2)):
            with states[name](), at_rest(model):
                if name not in counts:
                    _block(model, inputs, 1)
                    counts[name] = max(1, min(100, round(BLOCK / _block(model, inputs, 1))))
                if counts[name] > 1:
                    _block(model, inputs, 1)  # the other's weights are in the cache
                times[name].append(_block(model, inputs, counts[name]))
                if len(passes[name]) < LAYER_TURNS:
                    passes[name].append(layer_times(model, inputs))
    ratios = [a / b for a, b in zip(times[DENSE], times[SMALL], strict=True)]
    by_name = {DENSE: [1.0] * len(ratios), SMALL: ratios}
    models = {
        name: Latency((timing_of(None, values, passes[name]),), device_name(model, inputs), torch.get_num_threads(), False)
        for name, values in times.items()
    }
    return LatencyComparison(
        models, {n: (statistics.median(r),) for n, r in by_name.items()}, {n: (quartiles(r),) for n, r in by_name.items()}
    )


def _is_enough(times: Mapping[str, Sequence[float]], seconds: float) -> bool:
    turns = len(times[SMALL])
    if turns < FEWEST:
        return False
    first, third = quartiles([a / b for a, b in zip(times[DENSE], times[SMALL], strict=True)])
    return turns >= MOST or seconds >= BUDGET or third - first <= SETTLED * first


def _block(model: nn.Module, inputs: tuple[Any, ...], count: int) -> float:
    """Seconds of a forward pass, over so many."""
    device = device_of(model, inputs)
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        model(*inputs)
    wait_for(device)
    return (time.perf_counter() - start) / count
