"""Timer of forward passes, alone and in turns, and measures of how much the times spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fasterai.model.running import device_of, wait_for

__all__ = ["HANDS", "by_turns", "dealt", "on_threads", "passes_in", "quartiles", "ratio_of", "seconds_per_pass", "spread_of"]

#: Passes of one block at most: a clock that shows next to nothing must not ask for millions.
MOST_PASSES = 10_000
#: Into how many parts turns are dealt; of each the fastest counts.
HANDS = 5

T = TypeVar("T")


def seconds_per_pass(model: nn.Module, inputs: tuple[Any, ...], count: int = 1) -> float:
    """Return the mean seconds of one of `count` forward passes in a row, after waiting for the accelerator.

    Python's garbage collector waits meanwhile. Mode, gradients and number of threads are the caller's.
    """
    device, collects = device_of(model, inputs), gc.isenabled()
    gc.disable()
    try:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            model(*inputs)
        wait_for(device)
        return (time.perf_counter() - start) / count
    finally:
        if collects:
            gc.enable()


def passes_in(block: float, seconds: float) -> int:
    """Return the number of passes of so many seconds that fill a block: at least 1, at most 10,000."""
    return max(1, round(min(MOST_PASSES, block / max(seconds, 1e-9))))


def by_turns(
    runs: Mapping[str, Callable[[], T]], is_enough: Callable[[Mapping[str, Sequence[T]], float], bool]
) -> dict[str, list[T]]:
    """Call functions in turns, each once a turn, so that a slower or faster machine affects all alike.

    Args:
        runs: Name -> function; every second turn goes backwards.
        is_enough: Results so far by name, and seconds since the start -> True to end. Called before each turn.

    Returns:
        Name -> what the function returned, turn by turn.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    start, turn = time.perf_counter(), 0
    while not is_enough(found, time.perf_counter() - start):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(runs[name]())
        turn += 1
    return found


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Set the number of CPU threads of torch's operations, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dealt(values: Sequence[float]) -> list[float]:
    """Give values out in turn to five hands, and return the least of each hand.

    Other work on the machine adds to times and takes nothing away. So the least of several passes is nearer to the time of
    the model alone, and how much the five differ tells how near. The longer the measurement, the less they do.

    >>> dealt([3.0, 1.0, 2.0]), dealt([5.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    ([3.0, 1.0, 2.0], [2.0, 1.0, 1.0, 1.0, 1.0])
    """
    return [min(values[hand::HANDS]) for hand in range(min(HANDS, len(values)))]


def ratio_of(first: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two models' times, and the ends of its spread.

    The ratio is that of the medians over the five hands, which are the times that are shown. The spread reaches from the first
    to the third quartile of the ratios hand by hand, and to the ratio where it lies outside, as on a machine so busy that the
    two ways to compare disagree.

    >>> ratio_of([4.0, 4.0, 8.0], [2.0, 2.0, 2.0]), ratio_of([9.0, 5.0, 8.0], [4.0, 8.0, 5.0])
    ((2.0, 2.0, 3.0), (1.6, 1.1125, 1.925))
    """
    first, own = dealt(first), dealt(own)
    low, high = quartiles([a / b for a, b in zip(first, own, strict=True)])
    ratio = statistics.median(first) / statistics.median(own)
    return ratio, min(low, ratio), max(high, ratio)


def spread_of(first: Sequence[float], own: Sequence[float]) -> float:
    """Return how far the ratio of two models' times spreads: the upper end over the lower one."""
    _, low, high = ratio_of(first, own)
    return high / low


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile of at least two values."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
