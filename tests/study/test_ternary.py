"""Study of ternary groups: each kind of run trains what it says."""

from __future__ import annotations

import copy

import pytest
import torch

from fasterai.analyze.cost import cost
from fasterai.misc.ternary.norms import measure_norms_
from fasterai.misc.ternary.ternarize import ternarize
from fasterai.study import ternary
from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.ternary import ANEW, KEPT, TUNED, trial
from fasterai.study.workbench import accuracy

SIZE = Size("tiny", 96, 60, 8, epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


def run(data, weights, group, stage):
    return trial({"weights": weights, "group": group, "stage": stage}, 0, SIZE, data)


def test_each_stage_shows_what_it_says_and_the_dense_network_stays(data):
    dense = ternary._dense(0, SIZE, data)
    before, x = copy.deepcopy(dense.state_dict()), data.train[0][:1]
    new = ternarize(dense, 16, rule="threshold", example_inputs=x)
    assert run(data, "threshold", "16", KEPT)["accuracy"] == accuracy(new, data)
    measure_norms_(new, torch.split(data.train[0], 100))
    assert run(data, "threshold", "16", ANEW)["accuracy"] == accuracy(new, data)
    tuned = run(data, "threshold", "16", TUNED)
    assert 0.2 < tuned["error"] < 0.6 and tuned["error"] != run(data, "threshold", "16", ANEW)["error"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_the_figures_are_shares_of_the_dense_network(data):
    assert run(data, "dense", "-", KEPT) == {
        "accuracy": accuracy(ternary._dense(0, SIZE, data), data),
        "error": 0.0,
        "zeros": 0.0,
        "multiplications": 1.0,
        "bytes": 1.0,
    }
    found, half = run(data, "exact", "4", KEPT), run(data, "exact, half scales", "4", KEPT)
    layers = {layer.name: layer.macs for layer in cost(ternary._dense(0, SIZE, data), data.train[0][:1]).layers}
    ends, whole = layers["0"] + layers["8"], sum(layers.values())
    assert found["multiplications"] == pytest.approx((ends + (whole - ends) / 4) / whole)
    assert 0.3 < found["bytes"] < 0.4 and 0.18 < half["bytes"] < 0.28
    assert half["error"] == pytest.approx(found["error"], rel=1e-3)
    assert run(data, "threshold", "tensor", KEPT)["bytes"] < 0.1
