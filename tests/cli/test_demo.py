from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasterai.cli import demo, main
from fasterai.cli.data import digits
from fasterai.cli.networks import digits_network
from fasterai.prune.small_files import load_small


def arguments(folder: Path, seed: int = 0) -> argparse.Namespace:
    return argparse.Namespace(command="demo", output=folder, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        assert demo.run(arguments(folder), epochs=3) == 0
    assert errors.getvalue() == ""
    return folder, printed.getvalue()


def test_demo_compares_dense_sparse_and_small_and_writes_the_folder(made: tuple[Path, str]) -> None:
    folder, printed = made
    for text in (
        "conv1",
        "dense",
        "sparse",
        "small",
        "accuracy",
        "parameters",
        "MACs",
        "file",
        "time of 1 image",
        "time of 32",
    ):
        assert text in printed
    assert "a mask alone makes no network smaller or faster" in printed
    assert str(folder) in printed
    assert {path.name for path in folder.iterdir()} == {
        "dense.safetensors", "sparse.safetensors", "small.safetensors", "sparsifier.pt", "report.json", "training.png",
        "sparsity.png", "small.png",
    }  # fmt: skip


def test_the_demo_reports_what_it_made(made: tuple[Path, str]) -> None:
    folder, _ = made
    report = json.loads((folder / "report.json").read_text())
    # Three of four of 16, 32 and 64 channels go.
    assert [(layer["units"], layer["pruned"]) for layer in report["layers"]] == [(16, 12), (32, 24), (64, 48)]
    assert report["results"]["dense"]["accuracy"] > 0.9
    assert report["small"]["accuracy"] == report["results"]["sparse"]["accuracy"] > 0.3
    costs = report["small"]["costs"]
    # 1x4x9 + 4x8x9 + 8x16x9 + 64x10 weights, 10 biases, 2x(4 + 8 + 16) in norms
    assert costs["small"]["parameters"] == costs["small"]["nonzero"] == 36 + 288 + 1152 + 640 + 10 + 56
    assert (costs["dense"]["parameters"], costs["sparse"]["parameters"]) == (25978, 25978)
    # The outputs are 8x8 pixels, 4x4, 4x4 and 10 numbers.
    assert costs["dense"]["macs"] == costs["sparse"]["macs"] == 144 * 64 + 4608 * 16 + 18432 * 16 + 2560
    assert costs["small"]["macs"] == 36 * 64 + 288 * 16 + 1152 * 16 + 640
    assert costs["small"]["file_bytes"] == (folder / "small.safetensors").stat().st_size
    assert costs["sparse"]["file_bytes"] == (folder / "sparse.safetensors").stat().st_size


def test_the_demos_files_are_the_networks_that_it_speaks_of(made: tuple[Path, str]) -> None:
    folder, _ = made
    report = json.loads((folder / "report.json").read_text())
    sparse = digits_network()
    sparse.load_state_dict(load_file(folder / "sparse.safetensors"))
    assert sum(int((p == 0).sum()) for p in sparse.parameters()) == report["results"]["sparse"]["zeros"]
    small = load_small(folder / "small.safetensors", digits_network())
    data = digits(0)
    images, labels = next(data.batches(data.valid, [torch.arange(len(data.valid))], torch.device("cpu")))
    with torch.no_grad():
        wanted, found = sparse.eval()(images), small.eval()(images)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found.argmax(1) == labels).float().mean().item() == pytest.approx(report["small"]["accuracy"], abs=1e-6)
    assert torch.load(folder / "sparsifier.pt", weights_only=True)["granularity"].startswith("coupled")


def test_demo_replaces_a_demo_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text('{"command": "demo", "arguments": {"seed": 0}}')
    (tmp_path / "checkpoint.pt").write_text("of a demo that was broken off")
    assert demo.run(arguments(tmp_path, seed=1), epochs=1) == 0
    assert json.loads((tmp_path / "report.json").read_text())["arguments"]["seed"] == 1
    assert not (tmp_path / "checkpoint.pt").exists()

    (tmp_path / "report.json").write_text('{"command": "sparsify", "arguments": {}}')
    capsys.readouterr()
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "--output must not hold another run" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == '{"command": "sparsify", "arguments": {}}'


def test_demo_replaces_a_demo_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = "digits CNN"
    content = {"arguments": {"arch": arch, "seed": 7}, "done": {}, "stage": None, "state": {}}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert demo.run(arguments(tmp_path, seed=1), epochs=1) == 0
    assert not (tmp_path / "checkpoint.pt").exists()

    (tmp_path / "report.json").unlink()
    torch.save(content | {"arguments": {"arch": "resnet18"}}, tmp_path / "checkpoint.pt")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "--output must not hold another run" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists()


def test_demo_writes_into_no_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    wanted = f"--output must be a new folder, got {tmp_path}, which is not empty; pass another one"
    assert wanted in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
