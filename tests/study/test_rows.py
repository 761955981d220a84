"""Rows of a table: mean and spread over the seeds."""

from __future__ import annotations

import numpy as np
import pytest

from fasterai.study.rows import Row, by_metric, is_course, is_share, write_cell, write_setting


def test_mean_and_spread_are_those_of_the_seeds():
    values = [0.5, 0.6, 0.9]
    row = Row({"a": 1}, {"accuracy": values, "one": [3.0]})
    assert row.mean("accuracy") == pytest.approx(np.mean(values))
    assert row.spread("accuracy") == pytest.approx(np.std(values, ddof=1))
    assert (row.mean("one"), row.spread("one")) == (3.0, 0.0)


def test_metrics_are_gathered_by_name_and_some_runs_may_lack_one():
    assert by_metric([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": [1.0, 3.0], "b": [2.0]}


@pytest.mark.parametrize(("name", "share"), [("accuracy", True), ("weight_sparsity", True), ("recall", True), ("macs", False)])
def test_shares_are_known_by_their_names(name, share):
    assert is_share(name) is share


@pytest.mark.parametrize(
    ("metric", "values", "written"),
    [
        ("accuracy", [0.5, 0.6], "55.0 ± 7.1"),
        ("accuracy", [0.5], "50.0 ± 0.0"),
        ("parameters", [77_000.0, 77_000.0], "77,000"),
        ("macs", [1000.0, 3000.0], "2 k ± 1.41 k"),
        ("loss", [0.25, 0.75], "0.5 ± 0.35"),
        ("loss", [0.123456], "0.1235"),
        ("nothing", [], ""),
    ],
)
def test_a_cell_is_short(metric, values, written):
    assert write_cell(Row({}, {metric: values} if values else {}), metric) == written


@pytest.mark.parametrize(
    ("axis", "value", "written"),
    [("sparsity", 0.975, "97.5 %"), ("sparsity", 0.0, "0 %"), ("lr", 0.1, "0.1"), ("a", None, "None"), ("a", "x", "x")],
)
def test_a_setting_is_short(axis, value, written):
    assert write_setting(axis, value) == written


def test_a_course_is_the_means_after_each_part_in_their_order():
    names = {
        "accuracy": [0.9],
        "epoch_10_accuracy": [0.8, 0.6],
        "epoch_2_accuracy": [0.5],
        "epoch_2_loss": [3.0],
        "top_5": [1.0],
    }
    row = Row({"a": 1}, names)
    assert row.course("epoch", "accuracy") == [(2, 0.5), (10, pytest.approx(0.7))]
    assert row.course("epoch", "loss") == [(2, 3.0)] and row.course("a", "accuracy") == []
    assert [name for name in names if is_course(name)] == ["epoch_10_accuracy", "epoch_2_accuracy", "epoch_2_loss"]
