"""The report adds up, and is shown as a table and a picture."""

from __future__ import annotations

import json

import matplotlib as mpl

from fasterai.misc.ternary.report import TernaryLayer, TernaryReport

mpl.use("agg")
LAYERS = {
    "a.weight": TernaryLayer(0.25, 0.5, 64, 16, 256, 80, 640),
    "b.weight": TernaryLayer(0.3, 0.25, 32, 8, 128, 40, 320),
    "attention": TernaryLayer(0.1, 0.0, 32, 8, 128, 40, None),
}
REPORT = TernaryReport(4, "exact", LAYERS, {"c.weight": "it reads the model's input"}, 2000, 1)


def test_multiplications_are_one_for_each_group_and_the_rest_of_the_model():
    assert [one.multiplications for one in LAYERS.values()] == [160, 80, None]
    assert REPORT.multiplications == 2000 - 480 - 240
    assert TernaryReport(4, "exact", LAYERS).multiplications is None
    assert (REPORT.dense_bytes, REPORT.packed_bytes) == (512, 160)


def test_the_table():
    lines = str(REPORT).splitlines()
    head = "3 of 4 weights in ternary groups (4, exact), 512 B -> 160 B, 1.28 k of 2 k multiplications left of 1 sample"
    assert lines[0] == head
    assert lines[3].split() == ["a.weight", "25.0%", "50.0%", "64", "16", "640", "160", "256", "B", "80", "B"]
    assert lines[5].split() == ["attention", "10.0%", "0.0%", "32", "8", "-", "-", "128", "B", "40", "B"]
    assert lines[7].split() == ["all", "of", "these", "31.2%", "128", "32", "960", "240", "512", "B", "160", "B"]
    assert lines[-1].split(maxsplit=1) == ["c.weight", "it reads the model's input"]


def test_without_layers_and_without_counts():
    assert str(TernaryReport(4, "exact")) == "0 of 0 weights in ternary groups (4, exact), 0 B -> 0 B"
    only = TernaryReport(4, "exact", {"attention": LAYERS["attention"]})
    assert str(only).splitlines()[-1].split()[:7] == ["all", "of", "these", "0.0%", "32", "8", "-"]


def test_it_is_plain_data():
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["layers"]["b.weight"]["groups"] == 8 and found["left"] == REPORT.left


def test_the_picture_has_a_bar_for_each_layer():
    axes = REPORT.plot()
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [0.25, 0.3, 0.1]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LAYERS)
    many = TernaryReport(4, "exact", {f"l{i}": TernaryLayer(i / 100, 0, 4, 1, 16, 5) for i in range(50)})
    assert [label.get_text() for label in many.plot().get_yticklabels()] == [f"l{i}" for i in range(10, 50)]
