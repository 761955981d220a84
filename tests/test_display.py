from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from fasterai.display import (
    SERIES,
    STYLE,
    counted,
    line_colors,
    model_colors,
    new_axes,
    new_figure,
    short,
    short_bytes,
    short_time,
    styled,
    table,
    units_word,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (1_814_073_344, "1.81 G"), (2.5e15, "2.5e+03 T")],
)
def test_counts_have_three_figures(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (12, "12 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB")]
)
def test_bytes_are_in_powers_of_1024(number, text):
    assert short_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (0.001, "1 ms"), (4e-6, "4 us"), (0.0, "0 us")]
)
def test_times_have_a_unit(seconds, text):
    assert short_time(seconds) == text


def test_a_table_is_aligned():
    lines = table(("name", "n"), [("a", "1"), ("longer", "23"), ("all", "24")], foot=1)
    assert lines == ["name     n", "----------", "a        1", "longer  23", "----------", "all     24"]


def test_left_columns_and_empty_ends():
    lines = table(("a", "shape", "n"), [("x", "1x1", "12"), ("whole", "", "")], left=2)
    assert lines == ["a      shape   n", "----------------", "x      1x1    12", "whole"]


@pytest.mark.parametrize(
    ("granularity", "word"),
    [("filter", "filters"), ("weight", "weights"), ("coupled", "channels"), ("Coupled(relative=False)", "channels")],
)
def test_units_have_a_plural(granularity, word):
    assert units_word(granularity) == word


def test_counted_nouns():
    assert [counted(n, "thread") for n in (0, 1, 2, 1000)] == ["0 threads", "1 thread", "2 threads", "1,000 threads"]


def test_pictures_have_one_ground_and_lines_colours_of_their_own():
    plt.switch_backend("Agg")
    assert new_figure(3, 2).get_facecolor() == new_axes(3, 2).figure.get_facecolor() == (1, 1, 1, 1)
    assert new_axes(3, 2, 4).shape == (4,)
    plt.close("all")
    assert line_colors(0) == []
    assert len(line_colors(1)) == 1
    assert len(set(line_colors(12))) == 12
    assert len(set(SERIES)) == len(SERIES)


def test_models_have_one_colour_in_every_picture():
    assert model_colors(["dense", "small"]) == {"dense": SERIES[0], "small": SERIES[3]}
    assert model_colors(["a", "small", "b"]) == {"a": SERIES[0], "small": SERIES[3], "b": SERIES[1]}
    assert len(set(model_colors(["a", "b", "dense", "c", "sparse", "small"]).values())) == 6
    assert len(model_colors(map(str, range(20)))) == 20


def test_a_style_puts_back_its_own_settings_and_no_others():
    import matplotlib as mpl

    was, interactive = {name: mpl.rcParams[name] for name in STYLE}, mpl.is_interactive()
    try:
        with styled():
            assert mpl.rcParams["axes.spines.top"] == STYLE["axes.spines.top"]
            mpl.interactive(not interactive)  # as the backend of a notebook does with its first figure
        assert mpl.is_interactive() is not interactive
        assert {name: mpl.rcParams[name] for name in STYLE} == was
    finally:
        mpl.interactive(interactive)
