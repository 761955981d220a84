"""Measurement of a model with and without its channels, in turns, while both states can be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.cost import cost
from fasterai.analyze.latency_report import Latency, LatencyComparison, against_first, timing_of
from fasterai.analyze.layer_times import layer_times
from fasterai.analyze.timing import by_turns, passes_in, seconds_per_pass, spread_of
from fasterai.display import Brief
from fasterai.graph.inputs import InputCut, cut_inputs
from fasterai.model.names import unwrap
from fasterai.model.running import at_rest, copies, device_name
from fasterai.model.supported import said
from fasterai.prune.surgery.operate import Surgery

__all__ = ["DENSE", "SMALL", "Measurement", "measured"]

DENSE, SMALL = "dense", "small"
#: Seconds of one block. Timing ends when the ratio spreads by no more than 2 %; after 0.2 seconds 10 % will do, and after 1.5
#: seconds anything.
BLOCK = 0.001
SPREADS = ((0.0, 1.02), (0.2, 1.1), (1.5, float("inf")))
FEWEST = 5
#: In how many turns each layer is timed as well.
LAYER_TURNS = 3


@dataclass(frozen=True, repr=False)
class Measurement(Brief):
    """Comparison of the dense and the small model, or the reason why there are no figures.

    Attributes:
        comparison: Their cost and their speed; None if they were not measured.
        inputs: A description of the inputs that they were run on.
        why_not: The reason why there are no figures.
    """

    comparison: Comparison | None = None
    inputs: str = ""
    why_not: str = "measure=False was given"


def measured(
    model: nn.Module, surgery: Surgery, inputs: tuple[Any, ...], description: str, cuts: Sequence[InputCut] = ()
) -> Measurement:
    """Count and time a model before and after a surgery.

    A forward pass of each is timed in turns, in changing order, at least five times each, until the ratio of the times has
    settled, for 1.5 seconds at most; in three of them also a pass of each layer by layer. The model ends small, with modes,
    buffers, gradients and random generators as they were.

    Args:
        model: The model, small already.
        surgery: The surgery that made it small.
        inputs: Positional arguments.
        description: A description of the inputs.
        cuts: What the small model takes of the inputs, where it takes less.
    """
    model = unwrap(model)
    try:
        with surgery.undone():
            dense = cost(model, inputs)
        less = cut_inputs(model, inputs, cuts)
        costs = {DENSE: dense, SMALL: cost(model, less)}
        given = {DENSE: copies(inputs), SMALL: copies(less)}
        return Measurement(Comparison(costs, _timed(model, surgery, given)), description, "")
    except Exception as error:  # a removal that went well is not to fail for its figures
        return Measurement(None, description, said(error))


def _timed(model: nn.Module, surgery: Surgery, given: Mapping[str, tuple[Any, ...]]) -> LatencyComparison:
    """Time both states of a model in turns."""
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {DENSE: surgery.undone, SMALL: nullcontext}
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    counts: dict[str, int] = {}

    def turn(name: str) -> float:
        inputs = given[name]
        with states[name](), at_rest(model):
            if name not in counts:
                seconds_per_pass(model, inputs)
                counts[name] = passes_in(BLOCK, seconds_per_pass(model, inputs))
            if counts[name] > 1:
                seconds_per_pass(model, inputs)  # the other's weights are in the cache
            seconds = seconds_per_pass(model, inputs, counts[name])
            if len(passes[name]) < LAYER_TURNS:
                passes[name].append(layer_times(model, inputs))
        return seconds

    times = by_turns({name: partial(turn, name) for name in states}, _is_enough)
    ratios = against_first(times)
    device, threads = device_name(model, given[DENSE]), torch.get_num_threads()
    return LatencyComparison(
        {name: Latency((timing_of(None, values, passes[name]),), device, threads, False) for name, values in times.items()},
        {name: (ratio,) for name, (ratio, _) in ratios.items()},
        {name: (spread,) for name, (_, spread) in ratios.items()},
    )


def _is_enough(times: Mapping[str, Sequence[float]], seconds: float) -> bool:
    """Tell if the ratio of the times has settled, or the time for measuring is used up."""
    if len(times[SMALL]) < FEWEST:
        return False
    allowed = max(spread for since, spread in SPREADS if seconds >= since)
    return spread_of(times[DENSE], times[SMALL]) <= allowed
