"""The study of blended experts: each way leaves as many parameters, and what is counted agrees with the library's counts."""

from __future__ import annotations

import pytest
import torch

from fasterai.analyze.cost import cost
from fasterai.study.experts import STUDY, macs_of, trial
from fasterai.study.mixtures import BlendedMixture

SIZE = STUDY.size("tiny")
#: 2 of 8 experts: gate of 3 x 16 + 16 + 16 x 2 + 2, and of each expert 11 x 32 + 32, 32 x 32 + 32, 32 x 8 + 8.
TWO = 48 + 16 + 32 + 2 + 2 * (384 + 1056 + 264)


@pytest.mark.parametrize("way", ["fewer experts", "weights", "shared weights", "hidden units", "experts"])
def test_each_way_leaves_as_many_parameters_as_two_experts_have(way):
    result = trial({"way": way, "sparsity": 0.75}, 0, SIZE, None)
    # Stacks' biases begin at zero, and shared weights go eight at a time. Hidden units go as a whole.
    assert result["parameters"] == pytest.approx(TWO, abs={"hidden units": 200, "shared weights": 8}.get(way, 0))
    assert result["error"] > 0 and result["explained"] < 1


def test_macs_are_those_of_the_counter_and_less_those_by_zeros():
    torch.manual_seed(0)
    model, x = BlendedMixture(11, 8, experts=4, hidden=6), torch.randn(1, 11)
    for layer in model.layers:
        torch.nn.init.normal_(layer.bias)
    assert macs_of(model) == cost(model, x).macs
    before = macs_of(model)
    with torch.no_grad():
        model.layers[1].weight[0, 2] = 0  # six weights of one expert: the blending
        assert macs_of(model) == before - 6
        model.layers[1].weight[:, 3] = 0  # six of all four: the blending, and six of the blended layer
        assert macs_of(model) == before - 6 - 24 - 6
