from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fasterai.analyze.comparison import Comparison, compare
from fasterai.analyze.cost import cost
from fasterai.analyze.latency import Latency, LatencyComparison, Timing
from fasterai.sparse.sparsifier import Sparsifier

X = torch.zeros(1, 4)


def net(width=8):
    return nn.Sequential(nn.Linear(4, width, bias=False), nn.ReLU(), nn.Linear(width, 2, bias=False))


def full(model):
    """No weight of it is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).view_as(parameter))
    return model


def masked():
    model = full(net())
    Sparsifier(model, "weight").sparsify_model(0.5)
    return model


def measured(**ratios):
    def one(ratio):
        return Latency((Timing(1, 0.010 / ratio, 0.001, 9), Timing(16, 0.100 / ratio, 0.001, 9)), "cpu", 1, False)

    models = {"dense": one(1.0), **{name: one(ratio) for name, ratio in ratios.items()}}
    pairs = {name: (ratio, ratio) for name, ratio in {"dense": 1.0, **ratios}.items()}
    return LatencyComparison(models, pairs, {name: (pair, pair) for name, pair in pairs.items()})


def costs():
    return {"dense": cost(full(net()), X), "masked": cost(masked(), X), "small": cost(full(net(2)), X)}


def test_a_masked_model_is_said_to_be_neither_smaller_nor_faster():
    masked_says, small_says = Comparison(costs(), measured(masked=1.01, small=3.0)).verdicts()
    assert masked_says == (
        "masked: 50.0% of its parameters are zero, but it is not smaller than dense, and computes as many MACs; "
        "it is not faster either (measured: the same time at batch 1, the same time at batch 16)"
    )
    assert small_says.startswith("small: 25.0% of the parameters, 25.0% of the MACs, ")
    assert small_says.endswith("of the file of dense; measured: 3.00x as fast at batch 1, 3.00x as fast at batch 16")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "it is not faster either"),
        (0.5, "as many MACs; measured: 0.50x as fast at batch 1"),
        (1.5, "as many MACs; measured: 1.50x as fast at batch 1"),
    ],
)
def test_verdicts_say_what_was_measured(ratio, words):
    assert words in Comparison(costs(), measured(masked=ratio, small=1.0)).verdicts()[0]
    assert ("not faster" in Comparison(costs(), measured(masked=ratio, small=1.0)).verdicts()[0]) is (ratio == 1.0)


def test_a_small_model_that_is_no_faster_is_told():
    assert ", and not faster (measured: the same time at" in Comparison(costs(), measured(masked=1.0, small=1.0)).verdicts()[1]


def test_without_measurement_no_word_on_speed():
    comparison = Comparison(costs())
    assert all(verdict.endswith("; its time was not measured") for verdict in comparison.verdicts())
    assert "x as fast" not in str(comparison)


def test_an_equal_model_is_called_the_same():
    (verdict,) = Comparison({"dense": costs()["dense"], "again": costs()["dense"]}).verdicts()
    assert verdict == "again: the same size and MACs as dense; its time was not measured"


def test_shares_are_of_the_first_model():
    comparison = Comparison(costs())
    assert comparison.first == "dense"
    assert comparison.share("masked", "nonzero") == 0.5
    assert comparison.share("masked", "macs") == 1
    assert comparison.share("small", "parameters") == 0.25
    identity = cost(nn.Identity(), X)
    assert Comparison({"a": identity, "b": identity}).share("b", "macs") == 1
    assert Comparison({"a": identity, "b": costs()["dense"]}).share("b", "macs") == float("inf")


def test_layer_by_layer():
    layers = Comparison(costs()).layers()
    assert layers.names == ("dense", "masked", "small")
    assert [row.name for row in layers.rows] == ["0", "2"]
    first = layers.rows[0].costs
    assert [(c.parameters, c.nonzero, c.macs, c.output_shape) for c in first.values()] == [
        (32, 32, 32, (1, 8)), (32, 16, 32, (1, 8)), (8, 8, 8, (1, 2))
    ]  # fmt: skip
    assert [(c.file_bytes, c.activation_bytes) for c in first.values()] == [(128, 32), (128, 32), (32, 8)]
    assert " ".join(str(layers).splitlines()[3].split()) == "masked 1x8 32 16 32 128 B 32 B"
    assert json.loads(json.dumps(layers.to_dict()))["layers"]["2"]["small"]["macs"] == 4


def test_a_layer_that_a_model_has_not_got():
    folded = nn.Sequential(nn.Linear(4, 8, bias=False))
    layers = compare({"dense": net(), "folded": folded}, X, latency=False).layers()
    assert layers.rows[1].costs["folded"] is None
    assert "2" in str(layers)
    assert layers.to_dict()["layers"]["2"]["folded"] is None


def test_the_table_has_every_figure():
    lines = str(Comparison(costs(), measured(masked=1.0, small=2.0))).splitlines()
    macs = "MACs of 1 sample"
    labels = ["parameters", "non-zero", macs, "file", "activations", "held at once", "time, batch 1", "time, batch 16"]
    assert [line[:16].strip() for line in lines[2:10]] == labels
    cells = {label: line[16:].split() for label, line in zip(labels, lines[2:10], strict=True)}
    assert cells["parameters"] == ["48", "48", "(100.0%)", "12", "(25.0%)"]
    assert cells["non-zero"] == ["48", "24", "(50.0%)", "12", "(25.0%)"]
    assert "5 ms (2.00x as fast)" in lines[8]
    assert lines[10:] == list(Comparison(costs(), measured(masked=1.0, small=2.0)).verdicts())


def test_compare_counts_and_measures():
    dense, small = net(), net(2)
    before = copy.deepcopy(dense.state_dict())
    found = compare({"dense": dense, "small": small}, X, batch_sizes=(1, 2), min_run_time=0.01)
    assert found.costs["small"].macs == 12
    assert found.latency.batch_sizes == (1, 2)
    assert set(found.latency.models) == {"dense", "small"}
    layers = found.layers()
    assert (layers.names, layers.batch_sizes) == (("dense", "small"), (1, 2))
    assert all(0 < t.median < 1 and t.passes >= 5 for row in layers.rows for ts in row.timings.values() for t in ts)
    assert [len(row.timings["small"]) for row in layers.rows] == [2, 2]
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    untimed = compare({"dense": dense}, X, latency=False)
    assert (untimed.latency, untimed.layers().batch_sizes, untimed.layers().rows[0].timings) == (None, (), {})


def test_a_model_that_does_not_run_layer_by_layer_has_no_times_beside_one_that_does():
    compiled = torch.compile(net(), backend="eager")
    layers = compare({"plain": net(), "compiled": compiled}, X, min_run_time=0.01).layers()
    assert layers.rows[0].timings["compiled"] == (None,)
    assert layers.rows[0].timings["plain"][0].passes >= 5
    assert compare({"compiled": compiled}, X, min_run_time=0.01).layers().batch_sizes == ()


def test_it_is_plain_data():
    read = json.loads(json.dumps(Comparison(costs(), measured(masked=1.0, small=2.0)).to_dict()))
    assert read["costs"]["masked"]["nonzero"] == 24
    assert read["latency"]["ratios"]["small"] == [2.0, 2.0]
    assert len(read["verdicts"]) == 2
    assert Comparison(costs()).to_dict()["latency"] is None


def test_the_picture_shows_shares_of_the_first():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    assert Comparison(costs(), measured(masked=1.0, small=2.0)).plot(ax) is ax
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:8] == [1.0] * 8
    assert heights[8 + 1] == 0.5  # the masked model's non-zeros
    assert heights[16:19] == [0.25] * 3
    assert heights[22:] == [0.5, 0.5]  # its time
    Comparison(costs()).plot()
    plt.close("all")


def test_bad_arguments():
    with pytest.raises(ValueError, match="models must be a dict of at least one name and model, got"):
        compare({}, X)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3 .*for models\['small'\]"):
        compare({"dense": net(), "small": 3}, X)
    with pytest.raises(ValueError, match=r"example_inputs must be .*for models\['other'\]"):
        compare({"dense": net(), "other": nn.Linear(5, 2)}, X)


def test_scores_stand_above_the_costs_and_find_each_model_in_eval_mode():
    modes = []

    def width(model):
        modes.append(model.training)
        return torch.tensor(float(model[0].out_features))

    models = {"dense": net(8).train(), "small": net(2).train()}
    report = compare(models, X, scores={"width": width}, latency=False)
    assert report.scores == {"width": {"dense": 8.0, "small": 2.0}}
    assert str(report).splitlines()[2].split() == ["width", "8", "2"]
    assert json.loads(json.dumps(report.to_dict()))["scores"] == {"width": {"dense": 8.0, "small": 2.0}}
    assert modes == [False, False] and all(model.training for model in models.values())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"accuracy": 0.9}, r"scores must be functions of a model, got 0\.9 for 'accuracy'"),
        ({"accuracy": lambda model: "high"}, r"scores must return a number, got 'high' \(str\) of 'accuracy'"),
    ],
)
def test_a_score_that_is_none_is_an_error(scores, message):
    with pytest.raises(TypeError, match=message):
        compare({"dense": net()}, X, scores=scores, latency=False)
