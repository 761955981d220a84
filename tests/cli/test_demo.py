from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasterai.cli import demo, main
from fasterai.cli.networks import digits_network


def arguments(folder: Path, seed: int = 0) -> argparse.Namespace:
    return argparse.Namespace(command="demo", output=folder, seed=seed)


def test_demo_compares_dense_and_sparse_and_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(arguments(tmp_path / "demo"), epochs=3) == 0

    printed = capsys.readouterr()
    assert printed.err == ""
    for text in (
        "conv1.weight",
        "classifier.weight",
        "whole network",
        "dense",
        "sparse",
        "accuracy",
        "time",
        str(tmp_path / "demo"),
    ):
        assert text in printed.out
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "dense.safetensors", "sparse.safetensors", "sparsifier.pt", "report.json", "training.png", "sparsity.png",
    }  # fmt: skip
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    # 144 + 4608 + 18432 + 2560 = 25744 weights, of which round(0.9 x 25744 = 23169.6) go.
    assert sum(layer["pruned"] for layer in report["layers"]) == 23170
    assert report["results"]["dense"]["accuracy"] > 0.9
    assert report["results"]["sparse"]["accuracy"] > 0.5

    network = digits_network()
    network.load_state_dict(load_file(tmp_path / "demo" / "sparse.safetensors"))
    assert sum(int((p == 0).sum()) for p in network.parameters()) == report["results"]["sparse"]["zeros"]
    assert torch.load(tmp_path / "demo" / "sparsifier.pt", weights_only=True)["granularity"] == "weight"


def test_demo_replaces_a_demo_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(arguments(tmp_path), epochs=1) == 0
    assert demo.run(arguments(tmp_path, seed=1), epochs=1) == 0
    assert json.loads((tmp_path / "report.json").read_text())["arguments"]["seed"] == 1

    (tmp_path / "report.json").write_text('{"command": "sparsify"}')
    capsys.readouterr()
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "--output must not hold another run" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == '{"command": "sparsify"}'
