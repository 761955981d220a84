from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib as mpl
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.cost import Cost
from fasterai.analyze.latency import Latency, LatencyComparison, Timing
from fasterai.prune.measure import Measurement
from fasterai.prune.removal_report import Removal
from fasterai.prune.surgery.plan import Plan


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def figures(quartiles: tuple[float, float] = (2.4, 2.6)) -> Measurement:
    """Four times as small, and 2.5 times as fast."""
    costs = {
        name: Cost(n, n, macs, 0, 0, 4 * n, 0, 0, 4 * n, ())
        for name, n, macs in (("dense", 2_000_000, 50_000_000), ("small", 500_000, 20_000_000))
    }
    models = {name: Latency((Timing(None, t, 0.0, 7),), "cpu", 2, False) for name, t in (("dense", 0.010), ("small", 0.004))}
    latency = LatencyComparison(models, {"dense": (1.0,), "small": (2.5,)}, {"dense": ((1.0, 1.0),), "small": (quartiles,)})
    return Measurement(Comparison(costs, latency), "4x5 float32", "")


def removal(**changes: Any) -> Removal:
    fields: dict[str, Any] = {
        "plan": Plan({}, {}, (), {}),
        "removed": {"a.weight": (64, 16)},
        "refused": {"a.weight": "they move", "b.weight": "it fails"},
        "pinned": {},
        "difference": 2e-7,
        "parameters": (2_000_000, 500_000),
        "stayed": {"a.weight": (1, 2, 3), "b.weight": (0,)},
        "groups": {"a.weight": (64, 16), "b.weight": (8, 8)},
        "measurement": figures(),
    }
    return Removal(**(fields | changes))


def widths(axes: Any) -> list[float]:
    return [round(bar.get_width(), 6) for bar in axes.patches]


def texts(axes: Any) -> list[str]:
    return [t.get_text() for t in axes.texts]


def test_shares_stand_at_the_left_with_their_figures() -> None:
    left, _ = removal().plot().axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["parameters", "MACs", "file", "time"]
    assert widths(left)[1::2] == pytest.approx([0.25, 0.4, 0.25, 0.4], abs=1e-4)
    assert widths(left)[::2] == [1.0] * 4
    assert texts(left)[::2] == ["25%", "40%", "25%", "40%"]
    assert texts(left)[-1] == "10 ms → 4 ms"
    assert "4x5 float32, cpu, 2 threads" in left.get_xlabel()


def test_the_spread_of_the_time_is_a_line() -> None:
    left, _ = removal(measurement=figures((2.0, 2.5))).plot().axes
    (line,) = left.lines
    assert list(line.get_xdata()) == [0.4, 0.5]


def test_a_time_that_is_noise_has_no_bar_but_its_range() -> None:
    left, _ = removal(measurement=figures((2.0, 4.0))).plot().axes
    bar = left.patches[-1]
    assert (bar.get_x(), bar.get_width()) == (0.25, 0.25)
    assert not left.lines


def written(quartiles: tuple[float, float], ratio: float = 2.5) -> Any:
    """The words beside the bar of the time."""
    measurement = figures(quartiles)
    assert measurement.comparison is not None and measurement.comparison.latency is not None
    latency = replace(measurement.comparison.latency, ratios={"dense": (1.0,), "small": (ratio,)})
    measurement = replace(measurement, comparison=replace(measurement.comparison, latency=latency))
    left, _ = removal(measurement=measurement).plot().axes
    return left.texts[-2]


def test_the_picture_says_what_the_table_says() -> None:
    assert (written((2.4, 2.6)).get_text(), written((2.4, 2.6)).get_weight()) == ("40%", "bold")
    same = written((1.0, 1.08), ratio=1.04)
    assert (same.get_text(), same.get_weight()) == ("same", "normal")  # not 96 %
    noisy = written((1.39, 21.39), ratio=16.23)
    assert (noisy.get_text(), noisy.get_weight()) == ("5% to 72%", "normal")  # not 6 %


def test_groups_stand_at_the_right_with_what_stayed() -> None:
    _, right = removal().plot().axes
    assert [t.get_text() for t in right.get_yticklabels()] == ["a", "b"]
    assert widths(right) == [64, 16, 3, 8, 8, 1]
    assert texts(right) == ["64 → 16", "8"]
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["removed", "kept", "silent, but has to stay"]
    _, plain = removal(stayed={}, refused={}).plot().axes
    assert [t.get_text() for t in plain.get_legend().get_texts()] == ["removed", "kept"]


def test_without_figures_the_parameters_are_left() -> None:
    left, _ = removal(measurement=Measurement()).plot().axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["parameters"]
    assert widths(left) == [1.0, 0.25]


def test_of_many_groups_those_that_lose_most_are_drawn() -> None:
    groups = {f"layer{i}.weight": (100, 100 - i) for i in range(60)}
    _, right = removal(groups=groups, refused={"layer3.weight": "it fails"}, stayed={}).plot().axes
    names = [t.get_text() for t in right.get_yticklabels()]
    assert names == ["layer3", *(f"layer{i}" for i in range(21, 60))]
    assert right.get_title(loc="left") == "Channels of each group (20 more not shown)"


def test_nothing_that_could_go() -> None:
    left, right = removal(groups={}, removed={}, refused={}, stayed={}, measurement=Measurement()).plot().axes
    assert not right.patches
    assert left.patches
