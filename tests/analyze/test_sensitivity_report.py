"""Scores by target are data, with a ranking, an allocation, a table and pictures."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
from torch import nn

from fasterai.analyze import sensitivity as old_home
from fasterai.analyze.sensitivity_report import Sensitivity
from fasterai.sparse.sparsifier import Sparsifier

#: 10 and 20 units; each that goes costs three hundredths in the first target, and one in the second.
FOUND = Sensitivity(
    1.0,
    (0.2, 0.5),
    {"0.weight": (0.94, 0.85), "1.weight": (0.96, 0.9)},
    {"0.weight": (0.2, 0.5), "1.weight": (0.2, 0.5)},
    {"0.weight": 10, "1.weight": 20},
)


def test_limits_of_an_allocation():
    shares = FOUND.allocate(0.5, least=0.4, most=0.6)
    assert all(0.4 <= share <= 0.6 for share in shares.values())
    assert sum(shares[name] * n for name, n in (("0.weight", 10), ("1.weight", 20))) == pytest.approx(15)


def test_by_layer_under_the_familiar_name():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 2), "head": nn.Linear(2, 3)})
    scores = {"lstm.weight_ih_l0": (0.9,), "lstm.weight_hh_l0": (0.7,), "head.weight": (0.8,)}
    units = {"lstm.weight_ih_l0": 24, "lstm.weight_hh_l0": 16, "head.weight": 6}
    found = Sensitivity(1.0, (0.5,), scores, dict.fromkeys(scores, (0.5,)), units)
    # drops of 0.2, 0.6 and 0.4 per share, 12 of 46 units: 8.9, 2.0 and 1.1 of them
    assert found.allocate(0.25) == {"lstm.weight_ih_l0": 9 / 24, "lstm.weight_hh_l0": 2 / 16, "head.weight": 1 / 6}
    layers = found.to_layer_targets(model, 0.25)
    assert layers == {"lstm": 11 / 40, "head": 1 / 6}
    assert found.to_layer_targets(target_pct=0.25, min_pct=0.25, max_pct=0.25) == {"lstm": 0.25, "head": 2 / 6}
    sparsifier = Sparsifier(model, "weight", "local", targets="head")
    sparsifier.sparsify_layer(model["head"], layers["head"])
    assert sparsifier.sparsity["head.weight"] == pytest.approx(layers["head"])
    with pytest.raises(ValueError, match="model must be the one that was analysed, got one without lstm, head"):
        found.to_layer_targets(nn.Linear(1, 1), 0.25)
    with pytest.raises(ValueError, match=r"target_pct must be in .*got 50; pass 0\.5"):
        found.to_layer_targets(model, 50)


def test_the_most_and_the_least_sensitive():
    scores = {"a": (0.9, 0.7), "b": (0.5, 0.5), "c": (1.0, 1.2), "d": (1.0, math.nan)}
    found = Sensitivity(1.0, (0.3, 0.6), scores, dict.fromkeys(scores, (0.3, 0.6)), dict.fromkeys(scores, 10))
    assert [one.name for one in found.top(3)] == ["d", "b", "a"]
    assert [one.name for one in found.top(2, most_sensitive=False)] == ["c", "a"]
    assert found.top(4)[1].drop == 0.5


def test_it_is_plain_data():
    found = FOUND
    read = json.loads(json.dumps(found.to_dict()))
    assert read["scores"]["1.weight"] == list(found.scores["1.weight"])
    assert read["units"] == {"0.weight": 10, "1.weight": 20}
    again = pickle.loads(pickle.dumps(found))
    assert again == found == copy.deepcopy(found)


def test_the_table():
    # 0.125 of 20 weights is 2.5 of them, 0.125 of 10 is 1.25: 2 and 1 go
    scores = {"0.weight": (0.97, 0.85), "1.weight": (0.98, 0.9)}
    reached = {"0.weight": (0.1, 0.5), "1.weight": (0.1, 0.5)}
    lines = str(replace(FOUND, sparsities=(0.125, 0.5), scores=scores, reached=reached)).splitlines()
    assert lines[0].split() == ["target", "weights", "12.5%", "50%"]
    assert lines[2].split() == ["0.weight", "10", "0.97", "0.85"]
    assert lines[-2] == "baseline 1, higher is better; one target pruned at a time"
    assert lines[-1] == "the columns are what was asked; `reached` has what was pruned, 2.5% from it at most"
    assert "asked" not in str(FOUND)
    assert "lower is better" in str(replace(FOUND, higher_is_better=False))


def test_a_line_for_each_target():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    found = FOUND
    assert found.plot(ax) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["0.weight"].get_xdata()) == [0, 0.2, 0.5]
    assert list(lines["0.weight"].get_ydata()) == pytest.approx([1, 0.94, 0.85])
    plt.close("all")


def test_of_many_targets_a_map():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"layer{i}" for i in range(13)]
    scores = {name: (1.0, 1 - i / 100) for i, name in enumerate(names)} | {"layer12": (1.0, math.nan)}
    shares, units = dict.fromkeys(names, (0.2, 0.4)), dict.fromkeys(names, 10)
    ax = Sensitivity(1.0, (0.2, 0.4), scores, shares, units).plot()
    (image,) = ax.images
    # what is not finite is drawn like the worst
    assert image.get_array()[:, 1].tolist() == pytest.approx([i / 100 for i in range(12)] + [0.11])
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert "nan" in {text.get_text() for text in ax.texts}
    plt.close("all")


@pytest.mark.parametrize(("arguments", "message"), [((1.5,), "sparsity must be in"), ((0.5, 2), "least must be in")])
def test_bad_shares_of_an_allocation(arguments, message):
    with pytest.raises(ValueError, match=message):
        FOUND.allocate(arguments[0], **dict(zip(("least",), arguments[1:], strict=False)))


def test_the_values_are_found_where_they_were():
    assert old_home.Sensitivity is Sensitivity
