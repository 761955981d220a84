from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fasterai.core.criteria import Criterion, Random, large_final, movement, variety
from fasterai.core.granularities import Coupled
from fasterai.regularize.penalties import L1, GroupLasso, group_lasso
from fasterai.regularize.regularizer import Regularizer
from fasterai.regularize.settings import read_settings

GOOD = {
    "criteria": "large_final",
    "granularity": "filter",
    "weight": 0.01,
    "schedule": None,
    "penalty": "l1",
    "how": "loss",
}
BAD = [
    ({"granularity": "filters"}, ValueError, "granularity must be one of .* got 'filters'; did you mean 'filter'"),
    ({"granularity": []}, ValueError, r"granularity must be one or a list of at least one, got \[\]"),
    ({"granularity": Coupled("mean")}, ValueError, "granularity must be 'coupled' for a penalty"),
    ({"criteria": "bigness"}, ValueError, "criteria must be one of .* got 'bigness'"),
    ({"criteria": "random"}, ValueError, "criteria must have a gradient by the weight for a penalty, got random"),
    ({"criteria": Random(3)}, ValueError, "criteria must have a gradient"),
    ({"criteria": "large_init"}, ValueError, "criteria must have a gradient by the weight for a penalty, got large_init"),
    ({"criteria": "small_final"}, ValueError, "criteria must score no weight below 0 for a penalty, got small_final"),
    ({"criteria": lambda w: w}, ValueError, "criteria must score no weight below 0"),
    ({"criteria": lambda w: (w > 0).float()}, ValueError, "criteria must have a gradient"),
    ({"criteria": "wanda"}, ValueError, "criteria must be of the weight, .* got wanda, which needs activation; take 'large_f"),
    ({"criteria": "updating_movement"}, ValueError, "got updating_movement, which needs previous"),
    ({"criteria": variety(large_final)}, ValueError, "criteria must be without unit_rule and normalizer"),
    ({"criteria": large_final.using(normalizer="max")}, ValueError, "criteria must be without unit_rule and normalizer"),
    ({"criteria": 3}, TypeError, "criteria must be a criterion, its name, or a function of the weight, got 3"),
    ({"weight": -0.1}, ValueError, "weight must be a number of at least 0, got -0.1"),
    ({"weight": float("nan")}, ValueError, "weight must be a number of at least 0, got nan"),
    ({"weight": "strong"}, TypeError, "weight must be a number of at least 0, got 'strong'"),
    ({"schedule": "fast"}, ValueError, "schedule must be one of .* got 'fast'"),
    ({"schedule": 3}, TypeError, "schedule must be a schedule"),
    ({"penalty": "l3"}, ValueError, "penalty must be one of group_lasso, growing, l1, slimming, got 'l3'"),
    ({"penalty": GroupLasso}, TypeError, r"penalty must be one of .*; pass one of its values: GroupLasso\(...\)"),
    (
        {"penalty": large_final},
        TypeError,
        "penalty must be a penalty or its name, .* which is a criterion; are penalty",
    ),
    ({"criteria": group_lasso}, TypeError, "criteria must be a criterion or its name, .* which is a penalty"),
    ({"how": "step"}, ValueError, "how must be one of loss, gradient, proximal, got 'step'"),
    ({"how": "proximal", "criteria": "squared_final"}, ValueError, "criteria must be 'large_final' for how='proximal'"),
    ({"penalty": "slimming", "criteria": "movement"}, ValueError, "criteria must be of the weight alone for penalty=Slimming"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_settings_are_refused_with_the_argument_and_its_value(changed, kind, message):
    with pytest.raises(kind, match=message):
        read_settings(**{**GOOD, **changed})


def test_good_ones_are_read():
    found = read_settings([large_final, "squared_final"], ["weight", "filter"], 1, lambda position: position, "lasso", "loss")
    assert (len(found.criteria), len(found.granularities), found.weight, found.penalty) == (2, 2, 1.0, L1())
    assert found.schedule(0.25) == 0.25
    for criterion in (movement, "mov_large_final", "movmag", torch.square, Criterion(lambda e: e.weight.abs(), reducer="sum")):
        read_settings(**{**GOOD, "criteria": criterion})
    assert read_settings(**{**GOOD, "penalty": "Network-Slimming"}).penalty.on_scales


def test_what_a_model_lacks_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(TypeError, match=re.escape("model must be a torch.nn.Module, got 'net'")):
        Regularizer("net")
    with pytest.raises(ValueError, match="granularity must be one of column, layer, row, weight, got filter"):
        Regularizer(nn.Sequential(nn.Linear(3, 4)), granularity="filter")
    with pytest.raises(ValueError, match=r"targets must be .* got 'head'"):
        Regularizer(model, targets="head")
    with pytest.raises(ValueError, match="layer_type must match a layer of the model, got Linear"):
        Regularizer(model, layer_type=nn.Linear)
    with pytest.raises(ValueError, match=r"penalty must find norms with a scale behind the filters, got none for 'slimming'$"):
        Regularizer(model, granularity="filter", penalty="slimming", example_inputs=x)
    with pytest.raises(ValueError, match="example_inputs must be given for granularity 'coupled'"):
        Regularizer(model, granularity="coupled").get_norm()
    with pytest.raises(ValueError, match="for 'slimming'; pass example_inputs="):
        Regularizer(model, granularity="filter", penalty="slimming").get_norm()
