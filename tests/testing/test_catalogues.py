"""Each contract holds for every entry of its catalogue, and fails on an entry that breaks it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.core.contexts import Context, Local, PerTarget
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Block, Keep, Named
from fasterai.core.schedules import Custom, Schedule, sched_lin
from fasterai.core.types import Limits
from fasterai.testing import LAYOUTS, check_context, check_criterion, check_granularity, check_schedule

# --- every entry keeps its contract ---


@pytest.mark.parametrize("name", criteria.__all__)
def test_every_criterion_keeps_its_contract(name):
    check_criterion(getattr(criteria, name))
    check_criterion(getattr(criteria, name).using(reducer="sum", normalizer="max"))


@pytest.mark.parametrize("on", ["weights", "activations"])
def test_criteria_with_variety_keep_their_contract(on):
    check_criterion(criteria.variety("movement", "pearson", on))


@pytest.mark.parametrize("name", schedules.__all__)
def test_every_schedule_keeps_its_contract(name):
    check_schedule(getattr(schedules, name))


@pytest.mark.parametrize("name", granularities.__all__)
def test_every_granularity_keeps_its_contract(name):
    check_granularity(getattr(granularities, name))


@pytest.mark.parametrize("granularity", [Block(2, 3), Block(1, 4), Block(7, 7), Keep("out"), Keep("expert", "in")])
def test_granularities_with_settings_keep_their_contract(granularity):
    check_granularity(granularity)


@pytest.mark.parametrize("name", contexts.__all__)
def test_every_context_keeps_its_contract(name):
    check_context(getattr(contexts, name))


@pytest.mark.parametrize(
    "context", [contexts.NM(1, 4), contexts.NM(3, 4), PerTarget({"first": 1.0, "second": 1.0, "third": 1.0})], ids=repr
)
def test_contexts_with_settings_keep_their_contract(context):
    check_context(context)


# --- criteria that break it ---


def cube(w):
    return w**3


def writing(e):
    return e.weight.abs_()


def narrow(e):
    return e.weight.sum(0)


def whole(e):
    return e.weight.long()


def endless(e):
    return 1 / e.weight.abs()


def drawing(e):
    return torch.rand(e.weight.shape)


def unsaid(e):
    return e.weight * e.gradient


calls = itertools.count()


def forgetful(e):
    return e.weight + next(calls)


def ranked(e):
    return e.weight.flatten().argsort().argsort().view(e.weight.shape).float()


def signed(e):
    return e.weight


def shifted(e):
    return e.weight.abs() + 1


@dataclass
class Thawed(Schedule):
    def __call__(self, position):
        return position


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda w: w.abs(), "must pickle"),
        (Criterion(writing), "must not write into the weight"),
        (Criterion(narrow), "must score with the weight and nothing more, but it raised ValueError"),
        (Criterion(whole), "floating-point scores, got torch.int64"),
        (Criterion(endless), "finite scores"),
        (Criterion(drawing), "leave torch's global generator alone"),
        (Criterion(unsaid), "with the weight and nothing more"),
        (Criterion(forgetful), "the same scores for the same evidence"),
        (Criterion(ranked, elementwise=True), "is not elementwise"),
        (Criterion(signed, nonnegative=True), "is not nonnegative: it gave -"),
        (Criterion(shifted, nonnegative=True), "a weight of 0 scores above 0"),
        (Criterion(signed, ufunc=np.absolute), "a ufunc that gives its scores"),
    ],
)
def test_a_broken_criterion_is_found(criterion, message):
    with pytest.raises(AssertionError, match=message):
        check_criterion(criterion)


def test_a_criterion_that_scores_in_half_precision_is_found(monkeypatch):
    check_criterion(cube)
    monkeypatch.setattr(Criterion, "__call__", lambda self, e: e.weight.abs())
    with pytest.raises(AssertionError, match=r"half precision in float32, got torch.bfloat16"):
        check_criterion(criteria.large_final)


def test_a_criterion_that_is_not_frozen_is_found(monkeypatch):
    monkeypatch.setattr(Criterion, "__setattr__", object.__setattr__)
    monkeypatch.setattr(Criterion, "__delattr__", object.__delattr__)
    with pytest.raises(AssertionError, match="must be frozen"):
        check_criterion(criteria.large_final)


# --- schedules that break it ---


@dataclass(frozen=True)
class Above(Schedule):
    def __call__(self, position):
        schedules.check_fraction("position", position)
        return 1.01 * position


@dataclass(frozen=True)
class Whole(Schedule):
    def __call__(self, position):
        schedules.check_fraction("position", position)
        return int(position)


@dataclass(frozen=True)
class Careless(Schedule):
    def __call__(self, position):
        return min(1.0, abs(position))


@dataclass(frozen=True)
class Nameless(Schedule):
    def __call__(self, position):
        if not 0 <= position <= 1:
            raise ValueError("no")
        return float(position)


@dataclass(frozen=True)
class Remembering(Schedule):
    def __call__(self, position):
        schedules.check_fraction("position", position)
        return min(1.0, next(calls) * 1e-9)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Thawed(), "must be frozen"),
        (lambda p: p, "must pickle"),
        (Above(), r"share in \[0, 1\], got 1.0"),
        (Whole(), "must return a float, got 0 at 0.0"),
        (Careless(), "must refuse the position -0.1 with a ValueError"),
        (Nameless(), "an error that names 'position', got: no"),
        (Remembering(), "the same share at the same position"),
        (Custom(lambda start, end, pos: 0.5), "must pickle"),
    ],
)
def test_a_broken_schedule_is_found(schedule, message):
    with pytest.raises(AssertionError, match=message):
        check_schedule(schedule)


def test_a_list_of_schedules_is_checked_as_one():
    check_schedule([Custom(sched_lin, 0.0, 0.5, 0.0, 0.4), Custom(sched_lin, 0.5, 1.0, 0.4, 1.0)])


# --- granularities that break it ---

frozen = dataclass(frozen=True, init=False, repr=False)


@frozen
class Summing(Keep):
    def reduce(self, scores, layout, reducer="mean"):
        return super().reduce(scores, layout, "sum")


@frozen
class Averaging(Keep):
    def reduce(self, scores, layout, reducer="mean"):
        return super().reduce(scores, layout, "mean")


@frozen
class Squeezing(Keep):
    def reduce(self, scores, layout, reducer="mean"):
        return super().reduce(scores, layout, reducer).squeeze()


@frozen
class Scribbling(Keep):
    def reduce(self, scores, layout, reducer="mean"):
        result = super().reduce(scores, layout, reducer)
        scores.neg_() if reducer == "mean" else None
        return result


@frozen
class Overlapping(Block):
    def expand(self, keep, layout):
        mask = super().expand(keep, layout)
        return mask | mask.roll(1, 0)


@frozen
class Floating(Keep):
    def expand(self, keep, layout):
        return keep.float()


@frozen
class Flat(Keep):
    def unit_shape(self, layout):
        return super().unit_shape(layout)[:1]


@frozen
class Weightless(Keep):
    @property
    def is_weight(self):
        return True


@frozen
class Single(Keep):
    def is_whole(self, layout):
        return True


@frozen
class Outspoken(Keep):
    def drops_outputs(self, layout):
        return True


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (Summing("out"), "reduce to the mean over"),
        (Averaging("out"), "reduce to the sum over"),
        (Squeezing("out"), r"reduce to the unit shape \(5, 1\), got \(5,\)"),
        (Scribbling("out"), "must not write into the scores"),
        (Overlapping(2, 2), "every weight into exactly one unit"),
        (Floating("out"), "a bool mask, got torch.float32"),
        (Flat("out"), r"as many unit dimensions as the layout, got \(5,\)"),
        (Weightless("out"), "says is_weight, but its units are coarser"),
        (Single("out"), "says is_whole, but has 5 units"),
        (Outspoken("in"), "says drops_outputs, but a unit leaves"),
    ],
)
def test_a_broken_granularity_is_found(granularity, message):
    with pytest.raises(AssertionError, match=message):
        check_granularity(granularity, [LAYOUTS["Linear"]])


def test_a_granularity_that_fits_nothing_is_found():
    with pytest.raises(AssertionError, match="must fit at least one of the layouts"):
        check_granularity(Named("kernels only", "out"), [LAYOUTS["Linear"]])


# --- contexts that break it ---


@dataclass(frozen=True)
class OneMore(Local):
    def select(self, scores, layouts, sparsity, limits):
        return [contexts.keep_highest([s], min(s.count - 2, round(sparsity * s.count) + 1), limits)[0] for s in scores]


@dataclass(frozen=True)
class Lowest(Local):
    def select(self, scores, layouts, sparsity, limits):
        return super().select([contexts.TensorScores(s.name, -s.tensor(), s.keep) for s in scores], layouts, sparsity, limits)


@dataclass(frozen=True)
class Wild(Local):
    def select(self, scores, layouts, sparsity, limits):
        noise = [torch.randn(s.shape) for s in scores]
        best = [torch.where(s.tensor() == s.tensor().max(), 1e9, x) for s, x in zip(scores, noise, strict=True)]
        pool = [contexts.TensorScores(s.name, x, s.keep) for s, x in zip(scores, best, strict=True)]
        return super().select(pool, layouts, sparsity, limits)


@dataclass(frozen=True)
class Amnesic(Local):
    def select(self, scores, layouts, sparsity, limits):
        fresh = [contexts.TensorScores(s.name, s.tensor()) for s in scores]
        return super().select(fresh, layouts, sparsity, limits)


@dataclass(frozen=True)
class Floats(Local):
    def select(self, scores, layouts, sparsity, limits):
        return [keep.float() for keep in super().select(scores, layouts, sparsity, limits)]


@dataclass(frozen=True)
class Writes(Local):
    def select(self, scores, layouts, sparsity, limits):
        keeps = super().select(scores, layouts, sparsity, limits)
        for s in scores:
            s.tensor().add_(1)
        return keeps


@dataclass(frozen=True)
class First(Local):
    def select(self, scores, layouts, sparsity, limits):
        return super().select(scores, layouts, sparsity, limits)[:1]


@dataclass(frozen=True)
class Unchecked(Local):
    def __call__(self, scores, layouts, sparsity, limits=None):
        return self.select(scores, layouts, min(sparsity, 1.0), limits or Limits())


@dataclass(frozen=True)
class Blind(Local):
    def select(self, scores, layouts, sparsity, limits):
        seen = [contexts.TensorScores(s.name, s.tensor().nan_to_num(), s.keep) for s in scores]
        return super().select(seen, layouts, sparsity, limits)


@dataclass(frozen=True)
class Silent(Local):
    def asked(self, counts, sparsity):
        return (0,)


@dataclass(frozen=True)
class Picky(Local):
    def fits(self, shape, layout):
        return "nothing does"


@dataclass
class Loose(Context):
    def select(self, scores, layouts, sparsity, limits):
        return Local().select(scores, layouts, sparsity, limits)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (OneMore(), r"must prune 0 of 368 units, got 3"),
        (Lowest(), "must keep the highest score of first"),
        (Wild(), "must choose the same each time"),
        (Amnesic(), "must not bring units back while the sparsity rises from 0.125 to 0.25"),
        (Floats(), "must decide in bool for each unit of first"),
        (Writes(), "must not write into the scores"),
        (First(), "one decision per target, got 1"),
        (Unchecked(), "must refuse a sparsity of 50 with a ValueError"),
        (Blind(), "must refuse NaN scores with a ValueError"),
        (Silent(), "must ask something else"),
        (Picky(), "must fit at least one"),
        (Loose(), "must be frozen"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_broken_context_is_found(context, message):
    with pytest.raises(AssertionError, match=message):
        check_context(context)


@dataclass(frozen=True)
class KeepsOne(contexts.Global):
    def select(self, scores, layouts, sparsity, limits):
        return super().select(scores, layouts, sparsity, replace(limits, min_keep=1))


def test_a_context_that_leaves_less_than_min_keep_is_found():
    with pytest.raises(AssertionError, match="must keep min_keep=2 units of second, got 1"):
        check_context(KeepsOne())
