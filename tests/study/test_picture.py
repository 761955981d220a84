"""Picture of a study."""

from __future__ import annotations

import pytest

from fasterai.study.description import Study
from fasterai.study.picture import draw
from fasterai.study.rows import Row


def made(x: str = "sparsity", lines=("a",), **changes) -> Study:
    return Study("own", "Own", dict, {"small": {"a": [1], "sparsity": [0.5]}}, x=x, lines=lines, **changes)


def row(a, sparsity, *accuracies, **metrics) -> Row:
    return Row({"a": a, "sparsity": sparsity}, {"accuracy": accuracies, **metrics})


ROWS = [row("dense", 0.0, 0.9), row(1, 0.8, 0.5, 0.7), row(1, 0.5, 0.8), row(2, 0.5, 0.6)]


def drawn(axes) -> dict[str, list[tuple[float, float]]]:
    return {c.get_label(): [(round(float(x), 9), round(float(y), 9)) for x, y in c[0].get_xydata()] for c in axes.containers}


def test_a_line_joins_the_means_in_the_order_of_x_and_the_reference_is_a_level():
    axes = draw(made(reference={"a": "dense"}), ROWS, "of this and that", shown=False)
    lines = drawn(axes)
    assert list(lines) == ["1", "2"]
    assert lines["1"] == [(0.5, 0.8), (0.8, 0.6)] and lines["2"] == [(0.5, 0.6)]
    assert [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]] == [0.9]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("sparsity", "accuracy", "Own")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1", "2"]
    assert {"of this and that", "dense"} <= {text.get_text() for text in axes.texts}


def test_the_spread_is_a_bar_at_each_point():
    axes = draw(made(reference={"a": "dense"}), ROWS, "", shown=False)
    ends = [segment[:, 1] for segment in axes.containers[0][2][0].get_segments()]
    assert [end.tolist() for end in ends] == [pytest.approx([0.8, 0.8]), pytest.approx([0.6 - 0.02**0.5, 0.6 + 0.02**0.5])]


def test_words_along_x_are_points_that_no_line_joins():
    axes = draw(made(x="a", lines="sparsity"), [row("p", 0.5, 0.7), row("q", 0.5, 0.8)], "", shown=False)
    assert axes.containers[0][0].get_linewidth() == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["p", "q"]


def test_shares_are_explained_in_percent_and_many_words_lean():
    axes = draw(made(x="a", lines="sparsity"), [row(c * 20, 0.5, 0.7) for c in "pqrs"], "", shown=False)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["50 %"]
    assert {(label.get_rotation(), label.get_ha()) for label in axes.get_xticklabels()} == {(25, "right")}


def test_points_at_one_word_stand_side_by_side_and_inside_the_axes():
    rows = [row("p", 0.5, 0.6), row("q", 0.5, 0.8), row("p", 0.8, 0.7), row("q", 0.8, 0.9)]
    axes = draw(made(x="a", lines="sparsity"), rows, "", shown=False)
    moved = [line[0].get_transform().transform((0, 0.7)) - axes.transData.transform((0, 0.7)) for line in axes.containers]
    assert [round(float(x) * 72 / axes.figure.dpi, 6) for x, _ in moved] == [-3.5, 3.5]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 and right > 1 and low < 0.6 and high > 0.9


def test_values_along_x_are_marked_where_they_are_few():
    assert draw(made(), [row(1, 0.9, 0.7), row(1, 0.97, 0.6)], "", shown=False).get_xticks().tolist() == [0.9, 0.97]


def test_x_may_be_a_metric():
    rows = [row(1, 0.5, 0.7, macs=[30.0, 50.0]), row(1, 0.8, 0.6, macs=[10.0])]
    assert drawn(draw(made(x="macs"), rows, "", shown=False))["1"] == [(10, 0.6), (40, 0.7)]


def test_one_line_without_a_name_needs_no_legend():
    assert draw(made(lines=()), [row(1, 0.5, 0.7)], "", shown=False).get_legend() is None


def test_many_lines_have_each_a_colour():
    axes = draw(made(), [row(i, 0.5, i / 20) for i in range(12)], "", shown=False)
    assert len({container[0].get_color() for container in axes.containers}) == 12


def test_each_value_of_an_axis_of_panels_has_lines_and_a_level_of_its_own():
    rows = [Row({"a": a, "data": data, "sparsity": 0.5}, {"accuracy": [y]}) for a, data, y in PANELS]
    first = draw(made(panels="data", reference={"a": "dense"}), rows, "of this and that", shown=False)
    axes = first.figure.axes
    assert [one.get_title(loc="left") for one in axes] == ["p", "q", "r"]
    assert [drawn(one) for one in axes] == [{"1": [(0.5, 0.7)]}, {"1": [(0.5, 0.6)]}, {"1": [(0.5, 0.5)]}]
    levels = [[line.get_ydata()[0] for line in one.lines if list(line.get_xdata()) == [0, 1]] for one in axes]
    assert levels == [[0.9], [0.8], []]
    assert "of this and that" in first.figure.get_suptitle()
    assert len(draw(made(panels="data"), rows[:1], "", shown=False).figure.axes) == 1


PANELS = [("dense", "p", 0.9), (1, "p", 0.7), ("dense", "q", 0.8), (1, "q", 0.6), (1, "r", 0.5)]


def test_a_course_is_a_line_without_bars_and_a_row_without_one_the_level():
    course = {"epoch_1_accuracy": (0.2, 0.4), "epoch_2_accuracy": (0.5, 0.7)}
    rows = [row("dense", 0.0, 0.9), row(1, 0.0, 0.5, 0.7, **course)]
    axes = draw(made(x="epoch", reference={"a": "dense"}), rows, "", shown=False)
    assert axes.containers == [] and axes.get_xlabel() == "epoch"
    (line,) = (one for one in axes.lines if one.get_label() == "1")
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == pytest.approx([0.3, 0.6])
    assert [one.get_ydata()[0] for one in axes.lines if list(one.get_xdata()) == [0, 1]] == [0.9]


def test_a_line_has_one_colour_in_all_panels():
    rows = [Row({"a": a, "p": p, "sparsity": 0.5}, {"accuracy": (0.5,)}) for a, p in ((1, "u"), (2, "u"), (2, "v"))]
    figure = draw(made(panels="p"), rows, "", shown=False).figure
    first, second = ({c.get_label(): c[0].get_color() for c in axes.containers} for axes in figure.axes)
    assert first["2"] == second["2"] != first["1"]
