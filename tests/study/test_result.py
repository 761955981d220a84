"""Result of a study, as text, HTML, CSV, Markdown and files."""

from __future__ import annotations

import csv
import io

import pytest

from fasterai.study.description import Run, Study
from fasterai.study.result import Result
from fasterai.study.sizes import SIZES

STUDY = Study(
    "own",
    "Own things compared",
    dict,
    {"small": {"a": [1, 2], "sparsity": [0.5, 0.9]}},
    x="sparsity",
    lines="a",
)
RUNS = tuple(Run(settings, seed) for seed in (0, 1) for settings in STUDY.settings("small"))


@pytest.fixture
def result() -> Result:
    done = {run.key: {"accuracy": run.settings["a"] / 10 + run.seed / 50, "macs": 5.0} for run in RUNS[:-1]}
    return Result(STUDY, SIZES["small"], "own data", RUNS, done, {RUNS[-1].key: (9, 'ValueError: "so", it said')})


def test_a_row_has_the_seeds_that_are_done(result):
    found = [
        (row.settings["a"], row.settings["sparsity"], [round(x, 9) for x in row.values["accuracy"]]) for row in result.rows
    ]
    assert found == [(1, 0.5, [0.1, 0.12]), (1, 0.9, [0.1, 0.12]), (2, 0.5, [0.2, 0.22]), (2, 0.9, [0.2])]


def test_it_is_one_line_a_text_and_html_with_the_same_cells(result):
    assert repr(result) == "<Result: own small, 7 of 8 runs, 1 failed>"
    lines = str(result).splitlines()
    assert lines[:2] == ["own: Own things compared", "own data; 4 epochs; seeds 0, 1"]
    assert lines[5].split("  ")[0] == "1" and "50 %" in lines[5] and "11.0 ± 1.4" in lines[5] and lines[5].endswith("5")
    assert lines[-1] == 'failed: a 2, sparsity 0.9, seed 1: ValueError: "so", it said'
    assert '<td style="text-align:right">11.0 ± 1.4</td>' in result._repr_html_()


def test_the_csv_has_a_line_for_each_run(result):
    lines = list(csv.reader(io.StringIO(result.csv())))
    assert lines[0] == ["a", "sparsity", "seed", "accuracy", "macs", "failure"]
    assert lines[1] == ["1", "0.5", "0", "0.1", "5.0", ""]
    assert lines[-1] == ["2", "0.9", "1", "", "", 'ValueError: "so", it said']
    assert len(lines) == 1 + len(RUNS)


def test_the_markdown_has_the_conditions_and_the_table(result):
    lines = result.markdown().splitlines()
    assert lines[0] == "own data; 4 epochs; seeds 0, 1"
    assert lines[2:5] == ["| a | sparsity | accuracy | macs |", "| --- | --- | ---: | ---: |", "| 1 | 50 % | 11.0 ± 1.4 | 5 |"]


def test_its_files_are_written(result, tmp_path):
    result.save(tmp_path)
    assert (tmp_path / "runs.csv").read_text() == result.csv()
    assert (tmp_path / "table.md").read_text() == result.markdown()
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_run_that_is_done_there_is_the_csv_alone(tmp_path):
    nothing = Result(STUDY, SIZES["small"], "", RUNS, {}, {})
    nothing.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert repr(nothing) == "<Result: own small, 0 of 8 runs>"
    assert str(nothing).splitlines()[1] == "4 epochs; seeds 0, 1"


def test_it_draws_itself(result):
    assert len(result.plot().containers) == 2


def test_a_course_is_in_the_csv_and_not_in_the_table():
    done = {run.key: {"accuracy": 0.5, "epoch_1_accuracy": 0.25} for run in RUNS}
    result = Result(STUDY, SIZES["small"], "own data", RUNS, done, {})
    assert result.table().header == ["a", "sparsity", "accuracy"]
    assert result.csv().splitlines()[0] == "a,sparsity,seed,accuracy,epoch_1_accuracy,failure"
