"""Checks of criteria, schedules, granularities and contexts.

Over 300 lines, since it holds the checks of four catalogues.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Granularity
from fasterai.core.schedules import Custom, Schedule, as_schedule
from fasterai.core.selection import Scores, TensorScores
from fasterai.core.types import EVIDENCE, Evidence, Layout, Limits
from fasterai.testing.promises import attempt, check_refused, check_value, require, same

__all__ = ["LAYOUTS", "check_context", "check_criterion", "check_granularity", "check_schedule"]


def _layout(shape: Sequence[int], *axes: str) -> Layout:
    return Layout(tuple(shape), tuple(frozenset(names.split("+")) for names in axes))


#: Parameters of every kind, by what holds them; small, and no two dimensions of one the same.
LAYOUTS: dict[str, Layout] = {
    "Linear": _layout((5, 4), "out", "in"),
    "Embedding": _layout((5, 4), "in", "out"),
    "vector": _layout((5,), "out"),
    "experts": _layout((2, 5, 3), "expert", "out", "in"),
    "Conv1d": _layout((4, 3, 2), "out", "in", "width"),
    "Conv2d": _layout((5, 4, 2, 3), "out", "in", "height", "width"),
    "Conv3d": _layout((4, 3, 1, 5, 2), "out", "in", "depth", "height", "width"),
    "ConvTranspose2d": _layout((4, 5, 2, 3), "in", "out", "height", "width"),
    "Conv2d, 2 groups": _layout((2, 3, 4, 1, 5), "out+in", "out", "in", "height", "width"),
    "Conv2d, depthwise": _layout((4, 1, 1, 3, 2), "out+in", "out", "in", "height", "width"),
}


# --- criteria ------------------------------------------------------------------------------------------------------


def check_criterion(criterion: Criterion | Callable[[Tensor], Tensor]) -> None:
    """Check the promises of a criterion.

    It is a frozen value that pickles; it scores with the evidence that it says it needs and no other; its scores are
    finite, of the weight's shape, in float32 at least; same evidence, same scores; it writes into nothing that it is given
    and leaves torch's generator alone; what it says of itself (elementwise, nonnegative, ufunc) is so.

    Args:
        criterion: A criterion or a function of the weight.

    Raises:
        AssertionError: A promise is broken.
    """
    criterion = as_criterion(criterion)
    copy = check_value(criterion)
    for shape in [(4, 3, 2, 2), (5, 3), (7,)]:
        evidence = _evidence(shape, criterion)
        scores = _check_scores(criterion, evidence)
        require(same(copy(evidence), scores), f"{criterion!r} must score the same after pickling")
        _check_half(criterion, evidence)
        _check_claims(criterion, evidence, scores)
        if criterion.joint is not None:
            _check_scores(criterion.of_parts(), evidence)


def _evidence(shape: tuple[int, ...], criterion: Criterion) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    known = {name: torch.randn(shape, generator=generator) for name in ("weight", *EVIDENCE)}
    spread = [n if dim == 1 or len(shape) == 1 else 1 for dim, n in enumerate(shape)]
    known["activation"] = torch.rand(spread, generator=generator)
    known["weight"].view(-1)[::3] = 0
    gathered = {name: torch.randn(shape, generator=generator) for name in criterion.gatherers}
    named: dict[str, Any] = {name: known[name] for name in criterion.evidence_names}
    return Evidence("layer.weight", known["weight"], gathered=gathered, **named)


def _tensors(evidence: Evidence) -> dict[str, Tensor]:
    named = {f.name: value for f in fields(evidence) if isinstance(value := getattr(evidence, f.name), Tensor)}
    return {**named, **evidence.gathered}


def _check_scores(criterion: Criterion, evidence: Evidence) -> Tensor:
    before = {name: value.clone() for name, value in _tensors(evidence).items()}
    state = torch.get_rng_state()
    needs = ", ".join([*criterion.evidence_names, *criterion.gatherers]) or "nothing more"
    scores: Tensor = attempt(f"{criterion!r} must score with the weight and {needs}", lambda: criterion(evidence))
    for name, value in _tensors(evidence).items():
        require(same(value, before[name]), f"{criterion!r} must not write into the {name} that it is given")
    require(torch.equal(state, torch.get_rng_state()), f"{criterion!r} must leave torch's global generator alone")
    require(same(scores, criterion(evidence)), f"{criterion!r} must give the same scores for the same evidence")
    require(scores.shape == evidence.weight.shape, f"{criterion!r} must return scores of the weight's shape")
    require(scores.is_floating_point(), f"{criterion!r} must return floating-point scores, got {scores.dtype}")
    require(scores.isfinite().all(), f"{criterion!r} must return finite scores for finite evidence")
    return scores


def _check_half(criterion: Criterion, evidence: Evidence) -> None:
    half = evidence.map(lambda x: x.to(torch.bfloat16))
    scores = criterion(half)
    wanted = criterion(half.map(lambda x: x.float()))
    require(same(scores, wanted), f"{criterion!r} must score half precision in float32, got {scores.dtype}")


def _check_claims(criterion: Criterion, evidence: Evidence, scores: Tensor) -> None:
    if criterion.elementwise:
        part = criterion(evidence.map(lambda x: x.reshape(-1)[2:6]))
        require(same(part, scores.reshape(-1)[2:6]), f"{criterion!r} is not elementwise: a part alone scores differently")
    if criterion.nonnegative:
        require((scores >= 0).all(), f"{criterion!r} is not nonnegative: it gave {scores.min():g}")
        require((scores[evidence.weight == 0] == 0).all(), f"{criterion!r} is not nonnegative: a weight of 0 scores above 0")
    if criterion.ufunc is not None:
        by_numpy = torch.from_numpy(criterion.ufunc(evidence.weight.numpy()))
        require(same(by_numpy, scores), f"{criterion!r} must have a ufunc that gives its scores")


# --- schedules -----------------------------------------------------------------------------------------------------


def check_schedule(schedule: Schedule | Callable[[float], float] | Sequence[Custom]) -> None:
    """Check the promises of a schedule.

    It is a frozen value that pickles; it gives a share in [0, 1] at every position in [0, 1], the same each time and in
    whatever order it is asked, and refuses positions outside.

    Args:
        schedule: A schedule, a function of the position, or a list of schedules with windows.

    Raises:
        AssertionError: A promise is broken.
    """
    schedule = as_schedule(schedule)
    copy = check_value(schedule)
    positions = [i / 1000 for i in range(1001)]
    shares = [attempt(f"{schedule!r} must have a share at {p}", partial(schedule, p)) for p in positions]
    for position, share in zip(positions, shares, strict=True):
        require(isinstance(share, float), f"{schedule!r} must return a float, got {share!r} at {position}")
        require(0 <= share <= 1, f"{schedule!r} must return a share in [0, 1], got {share!r} at {position}")
    again = [schedule(p) for p in reversed(positions)][::-1]
    require(again == shares, f"{schedule!r} must give the same share at the same position, whatever was asked before")
    require([copy(p) for p in positions] == shares, f"{schedule!r} must give the same shares after pickling")
    for outside in (-0.1, 1.1, float("nan")):
        check_refused(f"{schedule!r} must refuse the position {outside}", "position", partial(schedule, outside))


# --- granularities -------------------------------------------------------------------------------------------------


def check_granularity(granularity: Granularity, layouts: Iterable[Layout] | None = None) -> None:
    """Check the promises of a granularity, for every layout that it fits.

    It is a frozen value that pickles; its units part the weights, each weight in exactly one; `reduce` gives the mean or
    the sum over each unit, `expand` the mask that keeps the units asked for, and the two undo each other; what it says of
    itself (`is_weight`, `is_whole`, `drops_outputs`) is so.

    Args:
        granularity: The granularity.
        layouts: Layouts to check it on; by default those of `LAYOUTS`.

    Raises:
        AssertionError: A promise is broken, or it fits none of the layouts.
    """
    require(check_value(granularity) == granularity, f"{granularity!r} must be equal to its pickled copy")
    fitting = [layout for layout in layouts or LAYOUTS.values() if granularity.fits(layout)]
    require(fitting, f"{granularity!r} must fit at least one of the layouts")
    for layout in fitting:
        members = _units(granularity, layout)
        _check_reduce(granularity, layout, members)
        _check_nature(granularity, layout, members)


def _units(granularity: Granularity, layout: Layout) -> Tensor:
    """Return (unit, weight) flags that tell which weights belong to which unit, from the masks of single units."""
    where = f"{granularity!r} on {layout.shape}"
    shape = granularity.unit_shape(layout)
    require(len(shape) == len(layout.shape), f"{where} must have as many unit dimensions as the layout, got {shape}")
    masks = []
    for i in range(torch.Size(shape).numel()):
        keep = torch.zeros(shape, dtype=torch.bool)
        keep.view(-1)[i] = True
        mask = granularity.expand(keep, layout)
        require(mask.dtype == torch.bool, f"{where} must expand to a bool mask, got {mask.dtype}")
        masks.append(attempt(f"{where} must expand to a mask that broadcasts", partial(mask.expand, layout.shape)))
    members = torch.stack(masks).reshape(len(masks), -1)
    require((members.sum(0) == 1).all(), f"{where} must put every weight into exactly one unit")
    require(members.any(1).all(), f"{where} must not have a unit without weights")
    return members


def _check_reduce(granularity: Granularity, layout: Layout, members: Tensor) -> None:
    where = f"{granularity!r} on {layout.shape}"
    scores = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = scores.clone()
    sums = members.double() @ scores.reshape(-1)
    for reducer, wanted in {"sum": sums, "mean": sums / members.sum(1)}.items():
        got = granularity.reduce(scores, layout, reducer)
        shape = granularity.unit_shape(layout)
        require(tuple(got.shape) == shape, f"{where} must reduce to the unit shape {shape}, got {tuple(got.shape)}")
        close = torch.allclose(got.reshape(-1), wanted, rtol=1e-9, atol=1e-12)
        require(close, f"{where} must reduce to the {reducer} over each unit's weights")
    require(same(scores, before), f"{where} must not write into the scores")


def _check_nature(granularity: Granularity, layout: Layout, members: Tensor) -> None:
    where = f"{granularity!r} on {layout.shape}"
    if granularity.is_weight:
        require(granularity.unit_shape(layout) == layout.shape, f"{where} says is_weight, but its units are coarser")
    if granularity.is_whole(layout):
        require(len(members) == 1, f"{where} says is_whole, but has {len(members)} units")
    if granularity.drops_outputs(layout):
        silent = [_silences(mask.view(layout.shape), layout) for mask in members]
        require(all(silent), f"{where} says drops_outputs, but a unit leaves every output something")


def _silences(mask: Tensor, layout: Layout) -> bool:
    """Tell if a mask covers all weights of some output."""
    others = [i for i, names in enumerate(layout.axes) if "out" not in names]
    return bool((mask.all(dim=others) if others else mask).any())


# --- contexts ------------------------------------------------------------------------------------------------------

# Eighths of these counts are whole, so that rounding per target and over all of them come to the same.
_POOL = {
    "first": _layout((8, 8), "out", "in"),
    "second": _layout((4, 4), "out", "in"),
    "third": _layout((4, 8, 3, 3), "out", "in", "height", "width"),
}
_EIGHTHS = tuple(i / 8 for i in range(8))


def check_context(context: Context) -> None:
    """Check the promises of a context, on targets called `first`, `second` and `third`.

    It is a frozen value that pickles; it returns bool decisions of the units' shapes; exactly the asked number of units
    goes, ties or not, the same ones each time; the highest score of a target stays; `min_keep` units stay in each; what is
    pruned stays pruned while the sparsity rises, and what is kept stays kept while it falls; the scores are not written
    to; `asked` changes when the number of pruned units does; NaN scores and sparsities above 1 are refused.

    Args:
        context: The context; one with settings per target must ask the same share of all three.

    Raises:
        AssertionError: A promise is broken.
    """
    copy = check_value(context)
    layouts = {name: layout for name, layout in _POOL.items() if context.fits(layout.shape, layout) is None}
    require(layouts, f"{context!r} must fit at least one of the units' shapes {[x.shape for x in _POOL.values()]}")
    reachable = [s for s in _EIGHTHS if _reaches(context, s)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values in _score_sets(layouts):
            for sparsity in reachable:
                _check_choice(context, copy, layouts, values, sparsity)
            _check_nested(context, layouts, values, reachable)
        _check_refusals(context, layouts)
    _check_asked(context, layouts, reachable)


def _reaches(context: Context, sparsity: float) -> bool:
    try:
        context.check(sparsity)
    except ValueError:
        return False
    return True


def _score_sets(layouts: dict[str, Layout]) -> list[dict[str, Tensor]]:
    """Make sets of scores: all different with negative ones, few different ones, all equal, far apart by target."""
    generator = torch.Generator().manual_seed(0)
    normal = {name: torch.randn(layout.shape, generator=generator) for name, layout in layouts.items()}
    return [
        normal,
        {name: x.abs().mul(2).round() for name, x in normal.items()},
        {name: torch.ones_like(x) for name, x in normal.items()},
        {name: x.abs() * 100**i for i, (name, x) in enumerate(normal.items())},
    ]


def _pool(values: dict[str, Tensor], keeps: Sequence[Tensor | None] | None = None) -> list[Scores]:
    return [TensorScores(name, x, keep) for (name, x), keep in zip(values.items(), keeps or [None] * len(values), strict=True)]


def _pruned(keeps: Iterable[Tensor]) -> int:
    return sum(int((~keep).sum()) for keep in keeps)


def _check_choice(
    context: Context, copy: Context, layouts: dict[str, Layout], values: dict[str, Tensor], sparsity: float
) -> None:
    where = f"{context!r} at sparsity {sparsity}"
    before = {name: x.clone() for name, x in values.items()}
    shapes = list(layouts.values())
    keeps = attempt(f"{where} must choose", lambda: context(_pool(values), shapes, sparsity))
    require(all(same(values[name], x) for name, x in before.items()), f"{where} must not write into the scores")
    require(len(keeps) == len(values), f"{where} must return one decision per target, got {len(keeps)}")
    for (name, x), keep in zip(values.items(), keeps, strict=True):
        require(keep.dtype == torch.bool and keep.shape == x.shape, f"{where} must decide in bool for each unit of {name}")
        require(keep[x == x.max()].any(), f"{where} must keep the highest score of {name}")
    total = sum(x.numel() for x in values.values())
    pruned = _pruned(keeps)
    require(pruned == round(sparsity * total), f"{where} must prune {round(sparsity * total)} of {total} units, got {pruned}")
    for again in (context(_pool(values), shapes, sparsity), copy(_pool(values), shapes, sparsity)):
        require(all(map(same, keeps, again)), f"{where} must choose the same each time, pickled or not")
    for keep, name in zip(context(_pool(values), shapes, sparsity, Limits(min_keep=2)), values, strict=True):
        require(int(keep.sum()) >= 2, f"{where} must keep min_keep=2 units of {name}, got {int(keep.sum())}")


def _check_nested(context: Context, layouts: dict[str, Layout], values: dict[str, Tensor], sparsities: Sequence[float]) -> None:
    shapes = list(layouts.values())
    other = {name: x.flip(0) for name, x in values.items()}  # the scores have moved since the last decision
    for low, high in itertools.pairwise(sparsities):
        few = context(_pool(values), shapes, low)
        more = context(_pool(other, few), shapes, high, Limits(may_fall=False))
        returned = any(bool((b & ~a).any()) for a, b in zip(few, more, strict=True))
        require(not returned, f"{context!r} must not bring units back while the sparsity rises from {low} to {high}")
        fewer = context(_pool(other, more), shapes, low)
        gone = any(bool((a & ~b).any()) for a, b in zip(more, fewer, strict=True))
        require(not gone, f"{context!r} must not prune kept units while the sparsity falls from {high} to {low}")


def _check_refusals(context: Context, layouts: dict[str, Layout]) -> None:
    shapes = list(layouts.values())
    values = _score_sets(layouts)[0]
    percent = f"{context!r} must refuse a sparsity of 50"
    check_refused(percent, "sparsity", lambda: context(_pool(values), shapes, 50))
    broken = next(reversed(values))
    values[broken] = values[broken].clone()
    values[broken].view(-1)[3] = float("nan")
    check_refused(f"{context!r} must refuse NaN scores", broken, lambda: context(_pool(values), shapes, 0.25))


def _check_asked(context: Context, layouts: dict[str, Layout], sparsities: Sequence[float]) -> None:
    counts = {name: torch.Size(layout.shape).numel() for name, layout in layouts.items()}
    asked = [context.asked(counts, s) for s in sparsities]
    require(asked == [context.asked(counts, s) for s in sparsities], f"{context!r} must ask the same each time")
    require(len(set(asked)) == len(asked), f"{context!r} must ask something else when another number of units is to go")
