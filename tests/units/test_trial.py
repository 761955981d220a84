"""A wrong criterion of one's own is found when it is given, not when the masks first move."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core.criteria import Criterion, large_final, variety
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow
from tests.networks import perceptron


def two_arguments(weight, gradient):
    return weight * gradient


WRONG = {
    "shape": (lambda w: w.flatten(), ValueError, r"weight's shape \(4, 10\) for 2.weight, got \(40,\)"),
    "None": (lambda w: None, TypeError, r"must return a tensor of scores for 2.weight, got None from <lambda>"),
    "numpy": (lambda w: np.ones(w.shape), TypeError, r"got ndarray\(4, 10\) from <lambda>$"),
    "NaN": (lambda w: (w - 9).sqrt(), ValueError, "must return finite scores, got NaN or infinity from <lambda> for 2.weight"),
    "two arguments": (two_arguments, TypeError, "missing 1 required positional argument: 'gradient'"),
    "unwrapped": (lambda e: e.weight.abs(), TypeError, r"reads \.weight of evidence; wrap it"),
    "no needs": (Criterion(lambda e: e.weight * e.gradient), TypeError, r"evidence\.gradient is None; .*needs={'gradient'}\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_criterion_is_refused_when_the_sparsifier_or_pruner_is_made(kind):
    criterion, error, message = WRONG[kind]
    model = perceptron(6, 10, 4)
    with pytest.raises(error, match=message) as found:
        Sparsifier(model, "weight", "local", criterion)
    assert kind != "two arguments" or "raised by the criterion two_arguments, for 2.weight" in found.value.__notes__
    with pytest.raises(error, match=message):
        Pruner(model, 0.5, "local", criterion, example_inputs=torch.randn(2, 6))


def test_the_smallest_target_is_tried_once_and_nothing_else_is_changed():
    seen = []

    def noisy(evidence):
        seen.append((evidence.name, evidence.layout is not None))
        evidence.weight.zero_()  # against the contract, and yet the model stays
        return torch.rand(evidence.weight.shape)

    model = perceptron(6, 10, 4)
    before, state = model[2].weight.clone(), torch.get_rng_state()
    Sparsifier(model, "weight", "local", Criterion(noisy))
    assert seen == [("2.weight", True)]  # 40 weights, the first has 60
    assert torch.equal(model[2].weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_criterion_for_some_targets_alone_stays_allowed():
    def of_kernels(weight):
        return weight.abs().sum((2, 3), keepdim=True).expand_as(weight)  # fails on a matrix

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    sparsifier = Sparsifier(model, "weight", "local", of_kernels)
    sparsifier.sparsify_layer(model[0], 0.5)
    assert sparsifier.sparsity["0.weight"] == 0.5


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
def test_what_is_no_number_only_for_constant_or_zero_weights_is_not_refused(values):
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values).view(2, 2))
    Sparsifier(model, "weight", "local", lambda w: (w / w.std()).log().square() if w.any() else w / w)


def test_what_needs_evidence_and_what_is_of_the_catalogue_is_not_tried():
    def never(evidence):
        raise AssertionError("called")

    model = perceptron(6, 10, 4)
    Sparsifier(model, "weight", "local", Criterion(never, needs={"initial"}))
    assert large_final.ufunc is not None  # by which it is known
    Sparsifier(model, "weight", "local", Criterion(never, ufunc=large_final.ufunc))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"granularity": "weight"}, "several units of several weights each for variety.'cosine'., got weight; take 'filter'"),
        ({"granularity": "layer"}, "several units of several weights each .*, got layer"),
        ({"granularity": "weight", "rule": DropAndGrow(grow=variety("random"))}, "several units of several weights each"),
        (
            {"granularity": "column", "criteria": variety("large_final", on="activations")},
            "outputs as its units for .*, got column",
        ),
    ],
)
def test_where_there_are_no_units_to_compare_variety_is_refused_before_anything_changes(axes, message):
    model = perceptron(6, 10, 4)
    before = copy.deepcopy(model.state_dict())
    criteria = {"criteria": "large_final"} if "rule" in axes else {"criteria": "variety(large_final)"}
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, **{**criteria, **axes}, sparsity=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_target_without_pairs_among_others_is_none_of_the_kind():
    model = perceptron(6, 10, 1)
    Sparsifier(model, "row", "local", "variety(large_final)", targets=["0", "2"]).sparsify_model(0.5)
