"""Latencies are data, with tables and pictures; models are held against the first turn by turn."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from fasterai.analyze import latency as old_home
from fasterai.analyze.latency_report import Latency, LatencyComparison, Speed, Timing, against_first, timing_of
from fasterai.analyze.layer_times import LayerTiming


def made(ratio=2.0, quartiles=(1.9, 2.1)):
    def one(factor):
        return Latency((Timing(1, 0.010 / factor, 0.001, 9), Timing(8, 0.080 / factor, 0.002, 9)), "cpu", 1, False)

    models = {"dense": one(1), "small": one(ratio)}
    spread = {"dense": ((1.0, 1.0),) * 2, "small": (quartiles,) * 2}
    return LatencyComparison(models, {"dense": (1.0, 1.0), "small": (ratio, ratio)}, spread)


@pytest.mark.parametrize(
    ("ratio", "quartiles", "same"),
    [
        (2.0, (1.9, 2.1), False),
        (1.04, (1.03, 1.05), True),
        (0.96, (0.95, 0.97), True),
        (1.3, (0.9, 1.6), True),
        (0.9, (0.88, 0.92), False),
    ],
)
def test_the_same_is_within_the_noise(ratio, quartiles, same):
    assert made(ratio, quartiles).is_same("small") is same


@pytest.mark.parametrize(
    ("speed", "words", "cell", "share"),
    [
        (Speed(2.0, 1.9, 2.1), "2.00x as fast", "2.00", "50%"),
        (Speed(1.04, 1.03, 1.05), "the same time", "same", "same"),
        (Speed(0.96, 0.95, 0.97), "the same time", "same", "same"),  # no picture says 104 %
        (Speed(0.9, 0.88, 0.92), "0.90x as fast", "0.90", "111%"),
        (Speed(1.1, 0.95, 1.15), "the same time", "same", "same"),
        (Speed(1.6, 1.2, 1.5), "1.60x as fast", "1.60", "62%"),  # the third quartile is 1.25 times the first
        (Speed(16.23, 1.39, 21.39), "between 1.4x and 21x as fast: too noisy to name one", "1.4 to 21", "5% to 72%"),
        (Speed(1.3, 0.9, 1.6), "between 0.9x and 1.6x as fast: too noisy to name one", "0.9 to 1.6", "62% to 111%"),
        (Speed(1.0, 0.5, 2.0), "between 0.5x and 2x as fast: too noisy to name one", "0.5 to 2", "50% to 200%"),
    ],
)
def test_no_speed_is_named_that_is_noise(speed, words, cell, share):
    assert (speed.words(), speed.cell, speed.share) == (words, cell, share)
    assert words.replace("as fast", "as fast at batch 8") == speed.words(8) or speed.words(8) == f"{words} at batch 8"


def test_a_comparison_that_is_noise_names_no_figure():
    noisy = made(16.23, (1.39, 21.39))
    for text in (str(noisy), repr(noisy)):
        assert "between 1.4x and 21x as fast" in text and "16.2" not in text


def test_tables_and_data():
    comparison = made()
    text = str(comparison)
    assert "10 ms" in text and "40 ms" in text and "2.00x as fast" in text and "against dense" in text
    assert str(comparison.models["dense"]).splitlines()[2].split() == ["1", "10", "ms", "1", "ms", "10", "ms", "9"]
    assert str(comparison.models["dense"]).endswith("cpu, 1 thread")
    read = json.loads(json.dumps(comparison.to_dict()))
    assert read["models"]["small"]["timings"][1]["median"] == 0.040
    assert read["ratios"]["small"] == [2.0, 2.0]
    assert read["quartiles"]["small"] == [[1.9, 2.1], [1.9, 2.1]]
    with pytest.raises(KeyError, match="batch_size must be one of 1, 8, got 4"):
        comparison.models["dense"][4]


def test_pictures_show_the_medians():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    assert made().plot(ax) is ax
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([10, 80, 5, 40])
    assert {text.get_text() for text in ax.texts} == {"10 ms", "80 ms", "5 ms\n2.00x", "40 ms\n2.00x", "cpu, 1 thread"}
    assert [bar.get_height() for bar in made().models["dense"].plot().patches] == pytest.approx([10, 80])
    plt.close("all")


def test_ratios_are_those_of_the_times_with_the_spread_turn_by_turn():
    found = against_first({"dense": [4.0, 8.0, 4.0, 4.0, 4.0], "small": [2.0, 4.0, 1.0, 4.0, 2.0]})
    # medians 4 and 2; by turn 2, 2, 4, 1, 2
    assert found == {"dense": (1.0, (1.0, 1.0)), "small": (2.0, (2.0, 2.0))}
    assert against_first({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]})["b"] == (2.0, (1.5, 2.5))


def test_turns_of_several_blocks_tell_their_number():
    assert timing_of(8, [3.0, 1.0, 2.0], [], 7) == Timing(8, 2.0, 1.0, 7, {})


def test_blocks_and_passes_become_a_timing():
    found = timing_of(8, [3.0, 1.0, 2.0], [{"a": 1.0}, {"a": 3.0}])
    assert found == Timing(8, 2.0, 1.0, 3, {"a": LayerTiming(2.0, 1.0, 2)})


def test_the_values_are_found_where_they_were():
    assert (old_home.Latency, old_home.LatencyComparison, old_home.Timing) == (Latency, LatencyComparison, Timing)


def test_the_only_batch_size_need_not_be_named():
    models = {name: Latency((Timing(8, 0.01, 0.001, 9),), "cpu", 1, False) for name in ("dense", "small")}
    one = LatencyComparison(models, {"dense": (1.0,), "small": (2.0,)}, {"dense": ((1.0, 1.0),), "small": ((1.9, 2.1),)})
    assert one.ratio("small") == one.ratio("small", 8) == one.speed("small").ratio == 2.0
    with pytest.raises(ValueError, match="batch_size must be one of 8, got 4"):
        one.ratio("small", 4)
    with pytest.raises(ValueError, match="batch_size must be one of 1, 8, got None"):
        made().ratio("small")


def test_the_legend_does_not_stand_on_the_title():
    models = {name: Latency((Timing(1, 0.01, 0.001, 9),), "cpu", 1, False) for name in ("dense", "small")}
    axes = LatencyComparison(models, {"dense": (1.0,), "small": (2.0,)}, dict.fromkeys(models, ((1.9, 2.1),))).plot()
    axes.figure.canvas.draw()
    title = next(text for text in axes.get_children() if getattr(text, "get_text", str)() == "Time of a forward pass")
    assert not title.get_window_extent().overlaps(axes.get_legend().get_window_extent())
    plt.close(axes.figure)
