"""What a study runs, and in which words it is refused."""

from __future__ import annotations

import pytest

from fasterai.study.description import Run, Study, key_of
from fasterai.study.sizes import Size


def made(**changes) -> Study:
    given = {"name": "own", "about": "Own", "trial": dict, "grids": {"small": {"a": [1, 2]}}, "x": "a", "lines": "a"}
    return Study(**{**given, **changes})


def test_settings_are_every_combination_in_the_order_of_the_axes():
    study = made(grids={"small": {"a": [1, 2], "b": ["x", "y"]}})
    assert [tuple(s.values()) for s in study.settings("small")] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


def test_several_grids_are_joined_and_what_is_in_both_is_run_once():
    study = made(grids={"small": [{"a": [0]}, {"a": [1, 0], "b": [None]}, {"a": [0]}]})
    assert study.settings("small") == [{"a": 0}, {"a": 1, "b": None}, {"a": 0, "b": None}]


def test_tiny_changes_one_axis_at_a_time_unless_it_has_a_grid():
    grid = {"a": [1, 2, 3], "b": ["x", "y"]}
    found = [tuple(s.values()) for s in made(grids={"small": grid}).settings("tiny")]
    assert found == [(1, "x"), (2, "x"), (3, "x"), (1, "y")]
    assert made(grids={"small": grid, "tiny": {"a": [7]}}).settings("tiny") == [{"a": 7}]


def test_seeds_are_three_unless_given_and_one_for_tiny():
    study = made(grids={"small": {"a": [1]}, "full": {"a": [1]}}, seeds={"full": range(5)})
    assert [study.default_seeds(size) for size in ("tiny", "small", "full")] == [(0,), (0, 1, 2), (0, 1, 2, 3, 4)]


def test_sizes_are_those_with_a_grid():
    assert made().size_names() == ["tiny", "small"]
    assert made(grids={"full": {"a": [1]}}).size_names() == ["full"]
    with pytest.raises(ValueError, match="size must be one of tiny, small, got 'ful'"):
        made().size("ful")


def test_the_key_of_a_run_does_not_depend_on_the_order_of_its_settings():
    assert Run({"a": 1, "b": "x"}, 3).key == key_of({"b": "x", "a": 1}, 3) != key_of({"a": 1, "b": "x"}, 4)
    assert str(Run({"a": 1, "b": "x"}, 3)) == "a 1, b x, seed 3"


def test_the_record_is_plain_and_leaves_out_the_device():
    study = made(version=4)
    record = study.record(Size("small", 5, 6, 7, epochs=1, device="cuda"), "abc")
    assert record == study.record(Size("small", 5, 6, 7, epochs=1), "abc")
    assert (record["version"], record["settings"], record["data"]) == (4, [{"a": 1}, {"a": 2}], "abc")
    assert record["size"] == {
        "name": "small",
        "images": 5,
        "test_images": 6,
        "side": 7,
        "epochs": 1,
        "batch_size": 64,
        "lr": 0.1,
    }


@pytest.mark.parametrize(
    ("grids", "error", "words"),
    [
        ({}, ValueError, "grids must name the grid of one size at least, got {}"),
        ({"big": {"a": [1]}}, ValueError, "grids must be one of tiny, small, full, got 'big'"),
        ({"small": {"a": []}}, ValueError, "a list of values, got 'a': []"),
        ({"small": {"a": "xy"}}, ValueError, "a list of values, got 'a': 'xy'"),
        ({"small": {"seed": [1]}}, ValueError, "none called seed"),
        ({"small": {"failure": [1]}}, ValueError, "none called seed or failure"),
        ({"small": {"a": [len]}}, TypeError, "got <built-in function len> for 'a'; name it in text"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(grids, error, words):
    with pytest.raises(error) as raised:
        made(grids=grids)
    assert words in str(raised.value)


def test_a_version_is_a_count():
    with pytest.raises(ValueError, match="version must be at least 1, got 0"):
        made(version=0)


def test_it_is_one_readable_line():
    assert repr(made()).startswith("Study(name='own', about='Own'")
    assert "\n" not in repr(made())
