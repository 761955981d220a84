from __future__ import annotations

import json

import matplotlib as mpl
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from fasterai.analyze.cost import LayerCost
from fasterai.analyze.layer_times import LayerTiming
from fasterai.analyze.layers import LayerComparison, LayerRow


def layer(name, share):
    n = round(1024 * share)
    return LayerCost(name, "Linear", n, n // 2, 10 * n, 2 * n, (2, n), 1, 4 * n)


def timed(seconds):
    return (LayerTiming(seconds, 0.0, 5), LayerTiming(10 * seconds, 0.0, 5))


def comparison(batch_sizes=(1, 8)):
    in_both, in_one = {"dense": timed(0.002), "small": timed(0.001)}, {"dense": timed(0.004), "small": (None, None)}
    rows = (
        LayerRow("a", {"dense": layer("a", 1), "small": layer("a", 0.5)}, in_both if batch_sizes else {}),
        LayerRow("b", {"dense": layer("b", 1), "small": None}, in_one if batch_sizes else {}),
    )
    return LayerComparison(("dense", "small"), rows, batch_sizes)


def test_a_line_for_each_layer_and_model():
    lines = [line.split() for line in str(comparison()).splitlines()]
    assert " ".join(lines[0]) == ("layer model output parameters non-zero MACs file activations time, batch 1 time, batch 8")
    assert " ".join(lines[2]) == "a dense 2x1024 1,024 512 10,240 4 KiB 2 KiB 2 ms 20 ms"
    assert " ".join(lines[3]) == "small 2x512 512 256 5,120 2 KiB 1 KiB 1 ms 10 ms"
    assert lines[5] == ["small"]
    assert "time" not in str(comparison(()))
    bare = LayerComparison(("net",), (LayerRow("", {"net": layer("", 1)}, {"net": (LayerTiming(1.0, 0.0, 5),)}),), (None,))
    assert [line.split()[-1] for line in str(bare).splitlines()[::2]] == ["time", "s"]
    assert str(bare).splitlines()[2].startswith("(model)")


def test_it_is_plain_data():
    read = json.loads(json.dumps(comparison().to_dict()))
    assert read["layers"]["a"]["small"]["file_bytes"] == 2048
    assert read["layers"]["b"]["small"] is None
    assert read["batch_sizes"] == [1, 8]
    assert read["timings"]["a"]["small"][1] == {"median": 0.01, "iqr": 0.0, "passes": 5}
    assert read["timings"]["b"]["small"] == [None, None]


@pytest.fixture
def closed():
    yield
    plt.close("all")


@pytest.mark.usefixtures("closed")
def test_a_panel_for_each_figure():
    panels = comparison().plot().axes
    assert [ax.get_title(loc="left") for ax in panels] == ["MACs", "file", "activations", "time, batch 1"]
    assert [bar.get_width() for bar in panels[0].patches] == [10_240, 10_240, 5_120, 0]  # dense, then small
    assert [bar.get_width() for bar in panels[3].patches] == [0.002, 0.004, 0.001, 0]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in panels[1].get_xticklabels()] == ["0 B", "2 KiB"]
    assert len(comparison(()).plot().axes) == 3


@pytest.mark.usefixtures("closed")
def test_of_many_layers_the_costliest_are_drawn_in_their_order():
    rows = tuple(LayerRow(f"l{i}", {"net": layer(f"l{i}", i)}) for i in range(50))
    panels = LayerComparison(("net",), rows).plot().axes
    assert [t.get_text() for t in panels[0].get_yticklabels()] == [f"l{i}" for i in range(10, 50)]


@pytest.mark.usefixtures("closed")
def test_without_layers_the_picture_is_empty():
    assert not LayerComparison(("net",), ()).plot().axes[0].patches
