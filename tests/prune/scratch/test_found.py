import json

import pytest
import torch
from torch import nn

from fasterai.analyze.cost import cost
from fasterai.prune.choice.budget import Budget
from fasterai.prune.scratch.found import FromScratch, Width
from fasterai.prune.scratch.learning import Learned
from fasterai.prune.surgery.plan import Plan
from tests.networks import perceptron


def made(hidden: int = 5, searched: int = 10) -> FromScratch:
    x = torch.randn(1, 8)
    gates = {"0.weight": torch.linspace(0, 1, searched).double()}
    learned = Learned(gates["0.weight"], gates["0.weight"], (2.0, 1.5), (0.9, 0.5), 8)
    costs = cost(perceptron(8, 10, 2), x), cost(perceptron(8, hidden, 2), x)
    widths = {"0.weight": Width(10, searched, hidden)}
    model: nn.Module = perceptron(8, hidden, 2)
    return FromScratch(model, widths, gates, Budget(macs=0.5), *costs, learned, Plan({}, {}, (), {}), {}, 0)


@pytest.mark.parametrize(("hidden", "epochs", "wanted"), [(5, 160, 320), (10, 7, 7), (3, 8, 26), (4, 10, 25)])
def test_the_extended_training_costs_as_many_macs_as_the_dense_one(hidden: int, epochs: int, wanted: int) -> None:
    assert made(hidden).train_epochs(epochs) == wanted  # int(epochs / share): 160 / 0.5, 7 / 1, 8 / 0.3, 10 / 0.4


def test_a_result_is_shown_and_is_plain_data() -> None:
    found = made(searched=12)
    assert repr(found) == "<FromScratch: 5 of 10 channels, MACs 100 -> 50, 50.0% of macs>"
    text = str(found)
    assert "0.weight     10        12      5  50.0%" in text
    assert "8 steps on the gates; loss of the last epoch 1.500, mean gate 0.500" in text
    assert json.loads(json.dumps(found.to_dict()))["widths"] == {"0.weight": [10, 12, 5]}
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        found.train_epochs(0)
