from __future__ import annotations

import copy
from typing import Any

import pytest

from fasterai.cli.tables import epoch_line, result_table, small_line

REPORT: dict[str, Any] = {
    "granularity": "weight",
    "results": {
        "dense": {"accuracy": 0.975, "zeros": 3, "weights": 1200, "seconds": 12.34},
        "sparse": {"accuracy": 0.9625, "zeros": 900, "weights": 1200, "seconds": 15.0},
    },
    "layers": [
        {"name": "conv.weight", "weights": 100, "units": 20, "pruned": 5, "zeros": {"dense": 0, "sparse": 25}},
        {"name": "fc.weight", "weights": 1000, "units": 1000, "pruned": 875, "zeros": {"dense": 3, "sparse": 875}},
    ],
}
ZEROS = """\
                weights   dense zeros   sparse zeros
----------------------------------------------------
conv.weight         100    0    0.00%    25   25.00%
fc.weight         1,000    3    0.30%   875   87.50%
----------------------------------------------------
all of these      1,100    3    0.27%   900   81.82%
whole network     1,200    3    0.25%   900   75.00%"""
TABLE = f"""\
{ZEROS}
----------------------------------------------------
                                dense         sparse
----------------------------------------------------
accuracy                       97.50%         96.25%
time                           12.3 s         15.0 s"""

SMALL: dict[str, Any] = {
    "why_not": "",
    "accuracy": 0.9625,
    "costs": {
        "dense": {"parameters": 1200, "nonzero": 1197, "macs": 2_500_000, "file_bytes": 2048},
        "sparse": {"parameters": 1200, "nonzero": 300, "macs": 2_500_000, "file_bytes": 2048},
        "small": {"parameters": 300, "nonzero": 300, "macs": 500, "file_bytes": 512},
    },
    "times": {
        "device": "cpu",
        "threads": 2,
        "batches": [
            {
                "images": 1,
                "seconds": {"dense": 0.002, "sparse": 0.00203, "small": 0.0005},
                "as_fast": {"dense": 1.0, "sparse": 0.96, "small": 3.987},
                "quartiles": {"dense": [1.0, 1.0], "sparse": [0.955, 0.965], "small": [3.9, 4.1]},
            },
            {
                "images": 32,
                "seconds": {"dense": 0.04, "sparse": 0.04, "small": 0.01},
                "as_fast": {"dense": 1.0, "sparse": 0.8, "small": 0.94},
                "quartiles": {"dense": [1.0, 1.0], "sparse": [0.7, 1.1], "small": [0.93, 0.95]},
            },
        ],
    },
    "removal": {
        "groups": {"conv.weight": [20, 16], "fc.weight": [1000, 125]},
        "parameters": [1200, 300],
        "difference": 2.4e-7,
        "refused": {"conv.weight": "its size is written into the code"},
    },
}
FIGURES = """\
accuracy             97.50%        96.25%     96.25%
parameters            1,200         1,200        300
  not zero            1,197           300        300
MACs of 1 image       2.5 M         2.5 M        500
file                  2 KiB         2 KiB      512 B
time of 1 image        2 ms       2.03 ms     500 us
  times as fast           1          same       3.99
time of 32 images     40 ms         40 ms      10 ms
  times as fast           1    0.7 to 1.1       0.94
training             12.3 s        15.0 s"""
NOTES = """\
sparse: 75.0% of its parameters are masked to zero, in tensors of full size; a mask alone makes no network smaller or faster
small: the sparse network without its silent channels; its outputs are the same to 2e-07 of their scale
times: the fastest forward passes on cpu, 2 threads, measured in turns; same: within 5 %, or within the spread; a range: \
half of them lie there, too far apart to name one
silent and still there: conv.weight (its size is written into the code)"""
RULE = "-" * 52
CHANNELS = f"""\
channels              dense        sparse      small
{RULE}
conv                     20      15 of 20         16
fc                    1,000  125 of 1,000        125
{RULE}
{FIGURES}"""


def words(text: str) -> list[list[str]]:
    """Cells, whatever the columns' widths."""
    return [line.split() for line in text.splitlines() if set(line) != {"-"}]


def with_small(granularity: str, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), "granularity": granularity, "small": {**SMALL, **changes}}


def test_table_shows_dense_and_sparse_side_by_side() -> None:
    assert result_table(REPORT) == TABLE
    assert result_table({**REPORT, "small": None}) == TABLE


def test_table_of_a_sparse_run_alone() -> None:
    lines = result_table({**REPORT, "results": {"sparse": REPORT["results"]["sparse"]}}).splitlines()
    assert lines[0].split() == ["weights", "sparse", "zeros"]
    assert lines[-2].split() == ["accuracy", "96.25%"]


def test_table_of_coupled_channels_ends_with_the_small_network() -> None:
    table, notes = result_table(with_small("coupled")).split("\n\n")
    assert words(table) == words(CHANNELS)
    assert len({len(line) for line in table.splitlines()[:3]}) == 1  # aligned, down to the rule
    assert notes == NOTES


def test_table_of_filters_shows_zeros_and_then_the_small_network() -> None:
    zeros, figures, notes = result_table(with_small("filter")).split("\n\n")
    assert zeros == ZEROS
    assert words(figures) == [["dense", "sparse", "small"], *words(FIGURES)]
    assert notes == NOTES


def test_table_without_the_dense_network() -> None:
    report = with_small("coupled")
    del report["results"]["dense"]
    lines = words(result_table(report).split("\n\n")[0])
    assert lines[:3] == [["channels", "sparse", "small"], ["conv", "15", "of", "20", "16"], ["fc", "125", "of", "1,000", "125"]]
    assert ["parameters", "1,200", "300"] in lines


@pytest.mark.parametrize("granularity", ["coupled", "filter"])
def test_why_there_is_no_small_network(granularity: str) -> None:
    tables, note = result_table(with_small(granularity, why_not="no removable channel is silent")).split("\n\n")
    assert note == "no small network: no removable channel is silent"
    assert "small" not in tables
    assert words(tables)[-2:] == [["accuracy", "97.50%", "96.25%"], ["time", "12.3", "s", "15.0", "s"]]


def test_epoch_line() -> None:
    epoch = {"epoch": 2, "loss": 0.12345, "accuracy": 0.5, "sparsity": 0.25}
    assert epoch_line("dense", epoch, 10, 3.21).split() == [
        "dense", "epoch", "2/10", "loss", "0.1235", "accuracy", "50.00%", "sparsity", "25.0%", "3.2", "s",
    ]  # fmt: skip


def test_small_line() -> None:
    assert small_line(SMALL) == "small   1,200 -> 300 parameters; the outputs moved by at most 2e-07 of their scale"
