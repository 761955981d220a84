from __future__ import annotations

import math
import types
from fractions import Fraction

import numpy as np
import pytest
import torch

from fasterai.core import checks, contexts, criteria, granularities, schedules
from fasterai.core.checks import check_choice, check_count, check_fraction, entry_or_repr, from_catalogue, unknown
from fasterai.units import rules


@pytest.mark.parametrize(
    ("value", "share"),
    [(0, 0.0), (1, 1.0), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(1), 1.0), (Fraction(1, 4), 0.25)],
    ids=repr,
)
def test_a_fraction_comes_back_as_a_float(value, share):
    found = check_fraction("sparsity", value)
    assert found == share
    assert type(found) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (50, "sparsity must be in [0, 1], got 50; pass 0.5 for 50 %"),
        (1.5, "sparsity must be in [0, 1], got 1.5; pass 0.015 for 1.5 %"),
        (100, "sparsity must be in [0, 1], got 100; pass 1 for 100 %"),
        (101, "sparsity must be in [0, 1], got 101"),
        (-0.1, "sparsity must be in [0, 1], got -0.1"),
        (math.nan, "sparsity must be in [0, 1], got nan"),
        (math.inf, "sparsity must be in [0, 1], got inf"),
    ],
)
def test_a_fraction_out_of_range_is_refused_with_the_fraction_meant(value, message):
    with pytest.raises(ValueError) as error:
        check_fraction("sparsity", value)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [True, False, None, "50%", "0.5", [0.5], torch.tensor(0.5), 0.5j], ids=repr)
def test_what_is_no_number_is_no_fraction(value):
    with pytest.raises(TypeError, match="schedule's share must be a number in") as error:
        check_fraction("schedule's share", value)
    assert f"got {value!r} ({type(value).__name__})" in str(error.value)


@pytest.mark.parametrize(("value", "minimum", "count"), [(1, 1, 1), (0, 0, 0), (np.int32(7), 2, 7), (-3, -5, -3)])
def test_a_count_comes_back_as_an_int(value, minimum, count):
    found = check_count("n_steps", value, minimum)
    assert found == count
    assert type(found) is int


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "n_steps must be at least 1, got 0"),
        (-2, ValueError, "n_steps must be at least 1, got -2"),
        (math.inf, ValueError, "n_steps must be a finite whole number of at least 1, got inf"),
        (math.nan, ValueError, "n_steps must be a finite whole number of at least 1, got nan"),
        (2.0, TypeError, "n_steps must be a whole number of at least 1, got 2.0 (float)"),
        (True, TypeError, "n_steps must be a whole number of at least 1, got True (bool)"),
        ("3", TypeError, "n_steps must be a whole number of at least 1, got '3' (str)"),
        (None, TypeError, "n_steps must be a whole number of at least 1, got None (NoneType)"),
    ],
)
def test_what_is_no_count_is_refused(value, error, message):
    with pytest.raises(error) as caught:
        check_count("n_steps", value)
    assert str(caught.value) == message


def test_a_choice_is_one_of_the_known():
    assert check_choice("reducer", "sum", ("mean", "sum")) == "sum"
    assert check_choice("reducer", "sum", iter(["mean", "sum"])) == "sum"
    with pytest.raises(ValueError, match="reducer must be one of mean, sum, got 'som'; did you mean 'sum'") as error:
        check_choice("reducer", "som", ("mean", "sum"))
    assert str(error.value).endswith("?")
    with pytest.raises(TypeError, match=r"reducer must be one of mean, sum, got 3 \(int\)"):
        check_choice("reducer", 3, ("mean", "sum"))


def test_an_unknown_name_far_from_all_gets_no_hint_and_long_lists_are_cut():
    assert str(unknown("targets", "zzz", ["a", "b"])) == "targets must be one of a, b, got 'zzz'"
    assert str(unknown("targets", "x", [], "a name of")) == "targets must be a name of (there is none), got 'x'"
    long = str(unknown("targets", "zzz", [f"layer{i}" for i in range(31)]))
    assert "layer29, ..., got 'zzz'" in long and "layer30" not in long


def test_a_catalogues_entry_is_found_by_name_and_anything_else_comes_back():
    assert from_catalogue("schedule", "agp", schedules) is schedules.agp
    assert from_catalogue("context", "global", contexts) is contexts.global_  # `global` is a keyword of Python
    own = schedules.OneCycle(beta=5)
    assert from_catalogue("schedule", own, schedules) is own
    with pytest.raises(ValueError, match="one of agp, alternating, cos, dsd, iterative, lin, one_cycle, one_shot, got"):
        from_catalogue("schedule", "one_cicle", schedules)
    with pytest.raises(ValueError, match="got 'AGP'"):  # in the file, but no entry
        from_catalogue("schedule", "AGP", schedules)


def test_a_new_entry_is_known_by_being_in_all():
    catalogue = types.ModuleType("catalogue")
    catalogue.__all__ = ["mine"]
    catalogue.mine = catalogue.other = object()
    assert from_catalogue("x", "mine", catalogue) is catalogue.mine
    with pytest.raises(ValueError, match="x must be one of mine, got 'other'"):
        from_catalogue("x", "other", catalogue)


def test_all_names_exist():
    assert all(callable(getattr(checks, name)) for name in checks.__all__)


@pytest.mark.parametrize(("text", "repair"), [("50%", "0.5"), ("50 %", "0.5"), ("0.5", "0.5"), (".25", "0.25"), ("1", "1")])
def test_a_share_in_text_is_answered_with_the_number(text, repair):
    with pytest.raises(TypeError, match=rf"sparsity must be a number in \[0, 1\], got '{text}' \(str\); pass {repair}$"):
        check_fraction("sparsity", text)


@pytest.mark.parametrize("text", ["half", "150%", "-1", ""])
def test_other_text_is_answered_without(text):
    with pytest.raises(TypeError, match=r"\(str\)$"):
        check_fraction("sparsity", text)


def test_a_warning_stands_at_the_users_line_and_not_at_a_frameworks():
    frames = {name: types.ModuleType(name) for name in ("fasterai.some.room", "torch.optim", "fastai.learner")}
    for module in frames.values():
        exec("def call(function): return function()", module.__dict__)
    ours, torchs, fastais = (module.call for module in frames.values())
    with pytest.warns(UserWarning, match="doubtful") as seen:
        fastais(lambda: torchs(lambda: ours(lambda: checks.warn("doubtful"))))
    assert seen[0].filename == __file__
    code = compile("call(lambda: warn('doubtful'))", "framework.py", "exec")
    with pytest.warns(UserWarning, match="doubtful") as seen:
        exec(code, {"__name__": "torch.optim", "call": ours, "warn": checks.warn})
    assert seen[0].filename == __file__  # of this test, beyond torch's frame


@pytest.mark.parametrize(
    ("name", "value", "catalogue", "message"),
    [
        (
            "criteria",
            schedules.agp,
            criteria,
            "criteria must be a criterion or its name, got AGP(start_pct=0.2, end_pct=1.0), which is a schedule; are criteria "
            "and schedule in each other's place?",
        ),
        (
            "schedule",
            criteria.large_final,
            schedules,
            "schedule must be a schedule or its name, got Criterion(large_final), which is a criterion; are schedule and "
            "criteria in each other's place?",
        ),
        ("context", granularities.filter, contexts, "a granularity; are context and granularity in each other's place?"),
        ("granularity", rules.nested, granularities, "a rule; are granularity and rule in each other's place?"),
        ("grow", contexts.local, criteria, "which is a context; pass it as context="),
    ],
)
def test_a_value_of_another_catalogue_is_refused(name, value, catalogue, message):
    with pytest.raises(TypeError) as error:
        from_catalogue(name, value, catalogue)
    assert str(error.value).endswith(message)


def test_a_value_of_ones_own_is_of_the_catalogue_that_it_extends():
    class Late(schedules.Schedule):
        def __call__(self, position):
            return float(position > 0.9)

    late = Late()
    assert from_catalogue("schedule", late, schedules) is late
    with pytest.raises(TypeError, match="which is a schedule"):
        from_catalogue("criteria", late, criteria)


def test_a_value_is_named_after_its_entry():
    assert entry_or_repr(schedules.AGP(), schedules) == "agp"
    assert entry_or_repr(contexts.global_, contexts) == "global"
    assert entry_or_repr(schedules.AGP(start_pct=0.25), schedules) == "AGP(start_pct=0.25, end_pct=1.0)"
