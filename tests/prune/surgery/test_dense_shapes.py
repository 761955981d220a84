"""Shapes before the first cut: known after any number of cuts, in copies and pickles, and gone when a cut is taken back."""

import copy
import pickle

import numpy as np
from torch import nn

from fasterai.prune.surgery.dense_shapes import dense_shapes
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan

DENSE = {"0.weight": (8, 3), "0.bias": (8,), "1.weight": (2, 8), "1.bias": (2,)}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))


def cut(model: nn.Module, before: int, after: int) -> Surgery:
    kept = np.arange(after)
    return Surgery(
        model,
        Plan(
            {"0.weight": (before, 3), "0.bias": (before,), "1.weight": (2, before)},
            {("0.weight", 0): kept, ("0.bias", 0): kept, ("1.weight", 1): kept},
            (("0", "out_features", before, after), ("1", "in_features", before, after)),
            {},
        ),
    )


def test_the_shapes_of_a_model_that_nothing_was_taken_out_of_are_its_own():
    assert dense_shapes(net()) == DENSE


def test_the_shapes_before_the_first_of_two_cuts_are_known():
    model = net()
    cut(model, 8, 6)
    cut(model, 6, 4)
    assert model[0].weight.shape == (4, 3)
    assert dense_shapes(model) == DENSE


def test_copies_and_pickles_know_them():
    model = net()
    cut(model, 8, 6)
    assert dense_shapes(copy.deepcopy(model)) == DENSE
    assert dense_shapes(pickle.loads(pickle.dumps(model))) == DENSE


def test_a_cut_that_is_taken_back_leaves_nothing_behind():
    model = net()
    attributes = [dict.fromkeys(vars(m)) for m in model.modules()]
    surgery = cut(model, 8, 6)
    surgery.undo()
    assert [dict.fromkeys(vars(m)) for m in model.modules()] == attributes
    surgery.redo()
    assert dense_shapes(model) == DENSE
    second = cut(model, 6, 4)
    second.undo()
    assert dense_shapes(model) == DENSE


def test_what_was_changed_since_the_cut_is_not_known():
    model = net()
    cut(model, 8, 6)
    model[1] = nn.Linear(6, 5)
    model[0].bias = nn.Parameter(model[0].bias.detach()[:4])
    assert dense_shapes(model) == {"0.weight": (8, 3)}


def test_a_part_that_was_cut_counts_in_the_whole():
    part = net()
    cut(part, 8, 6)
    whole = nn.Sequential(part, nn.Linear(2, 1))
    assert dense_shapes(whole) == {f"0.{name}": shape for name, shape in DENSE.items()}


def test_a_plan_that_takes_nothing_out_leaves_nothing_behind():
    model = net()
    attributes = [dict.fromkeys(vars(m)) for m in model.modules()]
    Surgery(model, Plan({}, {}, (), {}))
    assert [dict.fromkeys(vars(m)) for m in model.modules()] == attributes


def test_a_module_in_two_places_counts_in_both_and_one_without_shapes_in_none():
    layer = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(layer, layer, nn.LazyLinear(2))
    assert dense_shapes(model) == {"0.weight": (3, 3), "1.weight": (3, 3)}
