"""Reports are data, with a table and a picture."""

import json
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
from torch import nn

from fasterai.sparse.report import Reached, Row, SparsityReport
from fasterai.sparse.sparsifier import Sparsifier

mpl.use("agg")

REPORT = SparsityReport(
    "filter",
    (Row("a.weight", (4, 3, 1, 1), 4, 1, 12, 5), Row("b.weight", (8, 4, 1, 1), 8, 5, 32, 20)),
    {"c.weight": "frozen"},
    100,
    25,
    Row("all targets", (), 12, 6, 44, 25),
)


def test_a_row_counts_its_units():
    assert [r.sparsity for r in REPORT.rows] == [0.25, 0.625]
    assert Row("empty", (0,), 0, 0, 0, 0).sparsity == 0.0


def test_the_table_shows_every_target_the_whole_and_what_was_left_out():
    lines = [line.split() for line in str(REPORT).splitlines()]
    assert lines[0] == ["target", "shape", "filters", "pruned", "sparsity", "zeros"]
    assert ["a.weight", "4x3x1x1", "4", "1", "25.00%", "5"] in lines
    assert ["b.weight", "8x4x1x1", "8", "5", "62.50%", "20"] in lines
    assert ["all", "targets", "12", "6", "50.00%", "25"] in lines
    assert ["whole", "model", "100", "weights", "25.00%", "25"] in lines
    assert "left out: c.weight (frozen)" in str(REPORT)
    assert "neither smaller nor faster" in str(REPORT)
    assert not any(line != line.rstrip() for line in str(REPORT).splitlines())


def test_names_and_shapes_stand_at_the_left_and_the_sums_below_a_rule():
    assert str(REPORT).splitlines()[:7] == [
        "target       shape        filters  pruned  sparsity  zeros",
        "----------------------------------------------------------",
        "a.weight     4x3x1x1            4       1    25.00%      5",
        "b.weight     8x4x1x1            8       5    62.50%     20",
        "----------------------------------------------------------",
        "all targets                    12       6    50.00%     25",
        "whole model           100 weights            25.00%     25",
    ]


def test_the_report_is_plain_data():
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["rows"][1] == {
        "name": "b.weight",
        "shape": [8, 4, 1, 1],
        "units": 8,
        "pruned": 5,
        "weights": 32,
        "zeros": 20,
        "masked": 0,
        "disobeying": 0,
    }
    assert (found["granularity"], found["left_out"], found["parameters"], found["zeros"]) == (
        "filter",
        {"c.weight": "frozen"},
        100,
        25,
    )


@pytest.mark.parametrize("filled", [0, 3])
def test_masked_weights_are_called_zero_only_where_they_are(filled):
    text = str(replace(REPORT, together=replace(REPORT.together, masked=20, disobeying=filled)))
    assert ("3 of 20 masked weights are not zero" in text) is bool(filled)
    assert ("Masked weights are zero" in text) is not bool(filled)
    assert "mask alone makes a network neither smaller nor faster." in text


def test_the_plot_draws_a_bar_for_each_target_and_a_line_for_the_whole():
    axes = REPORT.plot()
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.625]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a.weight", "b.weight"]
    assert list(axes.lines[0].get_xdata()) == [0.5, 0.5]
    assert axes.get_xlim() == (0, 1)
    figure = mpl.figure.Figure()
    own = figure.subplots()
    assert REPORT.plot(own) is own


def test_what_was_reached_is_a_mapping_and_a_number():
    reached = Reached(0.5, 0.4, {"a": 0.25, "b": 0.75})
    assert dict(reached) == {"a": 0.25, "b": 0.75}
    assert reached["b"] == 0.75
    assert len(reached) == 2
    assert float(reached) == reached.overall == 0.5
    assert f"{reached:.1%}" == "50.0%"
    assert reached.weights == 0.4
    with pytest.raises(KeyError):
        reached["c"]


def test_zeros_are_counted_in_the_weights_and_units_in_the_masks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        model[0].weight[0] = 0.0
    sparsifier = Sparsifier(model, "weight", targets="0")
    (row,) = sparsifier.report().rows
    assert (row.units, row.pruned, row.weights, row.zeros) == (16, 0, 16, 4)
    sparsifier.sparsify_model(0.5)
    report = sparsifier.report()
    assert (report.rows[0].pruned, report.rows[0].zeros) == (8, 8)
    assert (report.parameters, report.zeros) == (28, 8)
    assert report.left_out == {"1.weight": "not named in targets"}
    assert str(sparsifier.report()) == str(report)


def test_a_tied_weight_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    report = Sparsifier(model, "weight").report()
    assert [r.name for r in report.rows] == ["0.weight"]
    assert report.parameters == 16
