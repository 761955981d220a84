from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fasterai.cli.errors import UsageError
from fasterai.cli.output import (
    epoch_line,
    holds_run,
    load_checkpoint,
    load_report,
    prepare_folder,
    remove_checkpoint,
    result_table,
    save_checkpoint,
    save_weights,
    write_atomically,
    write_report,
)

REPORT = {
    "results": {
        "dense": {"accuracy": 0.975, "zeros": 3, "weights": 1200, "seconds": 12.34},
        "sparse": {"accuracy": 0.9625, "zeros": 900, "weights": 1200, "seconds": 15.0},
    },
    "layers": [
        {"name": "conv.weight", "weights": 100, "zeros": {"dense": 0, "sparse": 25}},
        {"name": "fc.weight", "weights": 1000, "zeros": {"dense": 3, "sparse": 875}},
    ],
}
TABLE = """\
                weights   dense zeros   sparse zeros
----------------------------------------------------
conv.weight         100    0    0.00%    25   25.00%
fc.weight         1,000    3    0.30%   875   87.50%
----------------------------------------------------
all of these      1,100    3    0.27%   900   81.82%
whole network     1,200    3    0.25%   900   75.00%
----------------------------------------------------
                                dense         sparse
----------------------------------------------------
accuracy                       97.50%         96.25%
time                           12.3 s         15.0 s"""


def test_table_shows_dense_and_sparse_side_by_side() -> None:
    assert result_table(REPORT) == TABLE


def test_table_of_a_sparse_run_alone() -> None:
    lines = result_table({**REPORT, "results": {"sparse": REPORT["results"]["sparse"]}}).splitlines()
    assert lines[0].split() == ["weights", "sparse", "zeros"]
    assert lines[-2].split() == ["accuracy", "96.25%"]


def test_epoch_line() -> None:
    epoch = {"epoch": 2, "loss": 0.12345, "accuracy": 0.5, "sparsity": 0.25}
    assert epoch_line("dense", epoch, 10, 3.21).split() == [
        "dense", "epoch", "2/10", "loss", "0.1235", "accuracy", "50.00%", "sparsity", "25.0%", "3.2", "s",
    ]  # fmt: skip


def test_a_broken_off_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old"
    write_atomically(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_checkpoints_and_reports_come_back(tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    assert load_checkpoint(tmp_path) is None
    assert load_report(tmp_path) is None
    save_checkpoint({"step": 3, "weights": torch.ones(2)}, tmp_path)
    assert holds_run(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 3
    remove_checkpoint(tmp_path)
    assert not holds_run(tmp_path)
    write_report({"a": "ä"}, tmp_path)
    assert holds_run(tmp_path)
    assert load_report(tmp_path) == {"a": "ä"}


@pytest.mark.parametrize(("name", "load"), [("checkpoint.pt", load_checkpoint), ("report.json", load_report)])
def test_broken_files_are_named(tmp_path: Path, name: str, load) -> None:
    (tmp_path / name).write_text("{broken")
    with pytest.raises(UsageError, match=rf"cannot read .*{name} .*take it away to begin anew"):
        load(tmp_path)


def test_weights_are_written_with_the_classes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "w.safetensors", ("cat", "dog"))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["cat", "dog"]
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"--output must be a folder, got .*taken"):
        prepare_folder(tmp_path / "taken")
    prepare_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
