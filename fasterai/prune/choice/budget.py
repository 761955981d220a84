"""Budgets: the channels to remove so that a given share of the parameters, of the MACs or of the time is left.

The search in small numbers. Two groups of three channels are to leave a share of 0.5. Each channel costs a sixth; at a
sparsity s of `choose` a group loses a channel at 1/3, and another at 2/3:

    sparsity 0     kept 3 3    share 1.00    above the budget
    sparsity 1     kept 1 1    share 0.33    below
    sparsity 0.5   kept 2 2    share 0.67    above
    sparsity 0.75  kept 1 1    share 0.33    below

Halving goes on until no other choice lies between the two, 2 2 above and 1 1 below. `_step_between` then goes from the one to
the other group by group: 1 2 leaves 0.50, which is the budget.

Over 300 lines, since the budgets stand beside the search that meets them, a chain of small steps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import nn

from fasterai.core.checks import check_count
from fasterai.core.words import find_entry
from fasterai.display import Table
from fasterai.graph.channels import ChannelGraph
from fasterai.graph.labels import Flags
from fasterai.model.inputs import batch_of
from fasterai.model.running import copies
from fasterai.prune.choice.cost_left import Share, macs_left, parameters_left, time_left

__all__ = ["Budget", "fit_budget", "least_left"]

Kept = list[Flags]

#: How far below the budget counts as reached, and from where on it is not worth looking for better.
REACHED, CLOSE = 0.01, 0.005
#: The same of measured times, above the budget and below.
SLOWER, FASTER = 0.01, 0.03
TRIALS = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class Budget:
    """The share of a dense model that may be left; exactly one of the three shares is given.

    Attributes:
        macs: Share of its multiply-accumulates, in (0, 1].
        params: Share of its parameters, in (0, 1].
        latency: Share of the time of its forward pass, in (0, 1], measured on this machine on one CPU thread or on the GPU.
        batch: For a latency, the number of samples that the example inputs are repeated to; None takes them as they are.

    Raises:
        TypeError: A share or `batch` is no number, or there is no such share.
        ValueError: None or several shares are given, one is out of range, or `batch` is below 1 or goes with no latency.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    batch: int | None = None

    def __new__(cls, *args: Any, **shares: Any) -> Budget:
        """Refuse a share of nothing or of something else by name, before the dataclass does so without a hint."""
        if args:
            got = ", ".join(map(repr, args))
            raise TypeError(f"Budget must be given macs=, params= or latency=, got {got}; a share of what, as in macs=0.5?")
        for name in shares.keys() - {f.name for f in fields(cls)}:
            meant = find_entry("budgets", name)
            hint = f"; did you mean {meant}={shares[name]!r}?" if meant != name else ""
            raise TypeError(f"Budget must be given macs=, params= or latency=, got {name}={shares[name]!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self)[:3] if (value := getattr(self, f.name)) is not None}
        if len(given) != 1:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
            raise ValueError(f"Budget must be given exactly one of macs, params and latency, got {got}")
        _check_share(self.kind, given[self.kind])
        if self.batch is None:
            return
        if self.latency is None:
            raise ValueError(f"batch must be left out for a budget of {self.kind}, got {self.batch!r}; it goes with latency")
        check_count("batch", self.batch)

    def __repr__(self) -> str:
        return f"Budget({self.kind}={self.share!r}{'' if self.batch is None else f', batch={self.batch}'})"

    def _repr_html_(self) -> str:
        batch = [] if self.batch is None else [("batch", str(self.batch))]
        return Table(("budget", "share of the dense model"), [(self.kind, repr(self.share)), *batch]).html()

    @property
    def kind(self) -> str:
        """Name of the given share: `macs`, `params` or `latency`."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def share(self) -> float:
        """Share that may be left."""
        return float(getattr(self, self.kind))


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r} ({type(value).__name__})")
    if not 0 < float(value) <= 1:
        repair = f"; pass {float(value) / 100:g} for {value:g} %" if 1 < float(value) <= 100 else ""
        raise ValueError(f"{name} must be in (0, 1], got {value!r}{repair}")


def fit_budget(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: tuple[Any, ...],
    choose: Callable[[float], Kept],
    budget: Budget,
    dense: nn.Module | None = None,
    dense_inputs: tuple[Any, ...] | None = None,
) -> Kept:
    """Choose the channels to keep so that the model stays within a budget, and uses it up.

    What is left of parameters and MACs is at most the budget and less than 1 % of the dense model below it, unless a single
    channel costs more than that; of the time it is within 5 %. Between two neighbouring choices it goes from the one to the
    other group by group, and holds a group that moves too much; if all of that is too coarse, channel by channel in one group.
    Groups without which the model's code fails keep their channels.

    Args:
        model: The model; not changed.
        graph: Its channel graph.
        inputs: Its positional arguments.
        choose: A sparsity in [0, 1] -> for each group of the graph a bool array, True for channels to keep. At a higher
            sparsity none is kept that went at a lower one.
        budget: The share that may be left.
        dense: The model that the share is of, if `model` has been cut since; `model` itself if it is left out.
        dense_inputs: Its inputs, if `model` has been cut to take less of them.

    Returns:
        For each group a bool array over its channels.

    Raises:
        ValueError: The budget is below the share that is left when every removable channel is removed, which the message
            names; or the budget is of MACs, and the model does not multiply anything.
    """
    everything = _everything(graph)
    dense = model if dense is None else dense
    if budget.share == 1 and not _is_larger(model, dense):
        return everything
    macs = _remembered(macs_left(model, graph, inputs, dense, dense_inputs))
    if budget.macs is not None and not macs(everything):
        raise ValueError(f"macs must be left out for a model without multiplications, got {budget.macs}; pass params")
    fixed = _indispensable(macs, everything, choose(1.0))

    def allowed(sparsity: float) -> Kept:
        return _but(fixed, everything, choose(sparsity)) if sparsity else everything

    left = _counted(model, graph, inputs, budget, dense, macs, dense_inputs)
    if budget.kind == "latency":
        return _fit_time(left, macs, allowed, everything, budget.share)
    return _fit(left, allowed, everything, budget)


def least_left(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: tuple[Any, ...],
    least: Kept,
    budget: Budget,
    dense: nn.Module | None = None,
    dense_inputs: tuple[Any, ...] | None = None,
) -> float:
    """Return the share of MACs, parameters or time that is left when every channel that may be removed is removed.

    Args:
        model: As for `fit_budget`.
        graph: As for `fit_budget`.
        inputs: As for `fit_budget`.
        least: For each group of the graph the channels that stay at sparsity 1.
        budget: As for `fit_budget`; how much it allows has no say.
        dense: As for `fit_budget`.
        dense_inputs: As for `fit_budget`.
    """
    everything, dense = _everything(graph), model if dense is None else dense
    macs = _remembered(macs_left(model, graph, inputs, dense, dense_inputs))
    fixed = _indispensable(macs, everything, least)
    return _counted(model, graph, inputs, budget, dense, macs, dense_inputs)(_but(fixed, everything, least))


def _is_larger(model: nn.Module, dense: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in dense.parameters())


def _everything(graph: ChannelGraph) -> Kept:
    return [np.ones(group.channels, np.bool_) for group in graph.groups]


def _but(fixed: Collection[int], everything: Kept, kept: Kept) -> Kept:
    """Return a choice with all channels of some groups kept."""
    return [whole if i in fixed else keep for i, (whole, keep) in enumerate(zip(everything, kept, strict=True))]


def _counted(
    model: nn.Module,
    graph: ChannelGraph,
    inputs: tuple[Any, ...],
    budget: Budget,
    dense: nn.Module,
    macs: Share,
    dense_inputs: tuple[Any, ...] | None,
) -> Share:
    """Make the function that measures a choice: its share of the dense model's MACs, parameters or time."""
    if budget.kind == "latency":
        given = [inputs] if dense_inputs is None else [inputs, dense_inputs]
        less, *whole = (batch_of(copies(one), budget.batch) for one in given)
        return time_left(model, graph, less, dense, *whole)
    return macs if budget.kind == "macs" else _remembered(parameters_left(model, graph, dense))


# --- the search ----------------------------------------------------------------------------------------------------------


def _indispensable(run: Share, everything: Kept, least: Kept) -> set[int]:
    """Find by halves the groups whose channels the model's code needs, since it fails without them."""
    gone: set[int] = set()
    fixed: set[int] = set()
    stack = [list(range(len(everything)))]
    while stack:
        some = stack.pop()
        trial = gone.union(some)
        try:
            run([least[i] if i in trial else keep for i, keep in enumerate(everything)])
        except Exception:
            if len(some) == 1:
                fixed.update(some)
            else:
                stack += [some[len(some) // 2 :], some[: len(some) // 2]]
        else:
            gone = trial
    return fixed


def _fit(left: Share, choose: Callable[[float], Kept], everything: Kept, budget: Budget) -> Kept:
    """Choose by the counted cost (MACs, parameters), not by measured time."""
    if left(everything) <= budget.share:
        return everything
    floor = left(choose(1.0))
    if floor > budget.share:
        raise _too_small(budget.kind, budget.share, floor)
    return _search(left, choose, budget.share)


def _too_small(kind: str, share: float, floor: float) -> ValueError:
    least = math.ceil(round(floor * 1000, 6)) / 1000
    return ValueError(f"{kind} must be at least {least:.3f} for this model, got {share}; that share cannot be removed")


@dataclass(frozen=True)
class _Step:
    """Two choices that differ in one group only: `above` exceeds the budget, `below` does not."""

    above: Kept
    below: Kept
    group: int


def _remembered(left: Share) -> Share:
    """Return the same function with a memory of its results."""
    known: dict[bytes, float] = {}

    def remembered(kept: Sequence[Flags]) -> float:
        key = b"".join(keep.tobytes() for keep in kept)
        if key not in known:
            known[key] = left(kept)
        return known[key]

    return remembered


def _search(left: Share, choose: Callable[[float], Kept], share: float) -> Kept:
    """Find a choice that meets the budget: by sparsity, then group by group, then channel by channel.

    Args:
        left: The share that a choice leaves.
        choose: Sparsity in [0, 1] -> choice.
        share: The share that may be left.

    The example of the file's head:

    >>> def choose(sparsity):
    ...     return [np.arange(3) >= min(2, int(3 * sparsity)) for _ in range(2)]
    >>> def left(kept):
    ...     return sum(int(keep.sum()) for keep in kept) / 6
    >>> [int(keep.sum()) for keep in _search(left, choose, 0.5)]
    [1, 2]
    """
    held: dict[int, Flags] = {}
    steps: list[_Step] = []
    sparsity = 0.0

    def chosen(sparsity: float) -> Kept:
        return [held.get(i, keep) for i, keep in enumerate(choose(sparsity))]

    while left(chosen(1.0)) <= share:
        more, less, sparsity = _neighbours(left, chosen, share, sparsity)
        if share - left(less) <= CLOSE:
            return less
        step = _step_between(left, more, less, share)
        if share - left(step.below) <= CLOSE:
            return step.below
        steps.append(step)
        # What moves too much at once stays as it is, and the others go on.
        held[step.group] = step.above[step.group]
    best = max((step.below for step in steps), key=left)
    if share - left(best) <= REACHED:
        return best
    return max((_channel_by_channel(left, step, share) for step in steps), key=left)


def _neighbours(left: Share, choose: Callable[[float], Kept], share: float, low: float) -> tuple[Kept, Kept, float]:
    """Find by halving the choices just above and just below the budget, and the sparsity of the one above.

    The search starts at a sparsity at which the budget is exceeded, and stops early where the choice below is close to it.
    """
    high = 1.0
    more, less = choose(low), choose(high)
    while high - low > 1e-6 and share - left(less) > CLOSE:
        middle = (low + high) / 2
        kept = choose(middle)
        if left(kept) > share:
            low, more = middle, kept
        else:
            high, less = middle, kept
    return more, less, low


def _step_between(left: Share, more: Kept, less: Kept, share: float) -> _Step:
    """Go from one choice to the other group by group, and return the step that meets the budget."""
    moving = [i for i, (a, b) in enumerate(zip(more, less, strict=True)) if not np.array_equal(a, b)]

    def after(moves: int) -> Kept:
        return [less[i] if i in moving[:moves] else keep for i, keep in enumerate(more)]

    moves = _first(lambda n: left(after(n)) <= share, len(moving))
    return _Step(after(moves - 1), after(moves), moving[moves - 1])


def _channel_by_channel(left: Share, step: _Step, share: float) -> Kept:
    """Go through a step channel by channel, until the budget is met."""
    going = np.flatnonzero(step.above[step.group] & ~step.below[step.group])

    def after(moves: int) -> Kept:
        result = list(step.above)
        result[step.group] = step.above[step.group].copy()
        result[step.group][going[:moves]] = False
        return result

    return after(_first(lambda n: left(after(n)) <= share, len(going)))


def _first(holds: Callable[[int], bool], last: int) -> int:
    """Find by halving the first of 1, 2, ..., `last` at which a condition begins to hold; `last` if it never does.

    >>> _first(lambda n: n * n >= 20, 8)  # tries 4, 6, 5
    5
    """
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _fit_time(measure: Share, macs: Share, choose: Callable[[float], Kept], everything: Kept, share: float) -> Kept:
    """Choose by measured time: find the choice nearest to the share, along the MACs, with which time grows about evenly."""
    least = choose(1.0)
    slow, fast = (macs(everything), measure(everything)), (macs(least), measure(least))
    if slow[1] <= share:
        return everything
    if fast[1] > share:
        raise _too_small("latency", share, fast[1])
    tried = [(fast[1], least)]
    for _ in range(TRIALS):
        way = (slow[1] - share) / max(1e-9, slow[1] - fast[1])
        target = slow[0] + min(0.9, max(0.1, way)) * (fast[0] - slow[0])
        kept = _search(macs, choose, target)
        found = macs(kept), measure(kept)
        tried.append((found[1], kept))
        if -FASTER <= found[1] - share <= SLOWER:
            return kept
        slow, fast = (found, fast) if found[1] > share else (slow, found)
    return min(tried, key=lambda t: abs(t[0] - share))[1]
