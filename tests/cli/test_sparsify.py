from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from fasterai.cli import experiment, main, training
from fasterai.prune.small_files import load_small
from fasterai.sparse.sparsifier import Sparsifier

MakeImages = Callable[..., Path]
ARCH = "shufflenet_v2_x0_5"
#: Without depthwise convolutions, shuffles and norms, quickly followed.
PLAIN = "squeezenet1_1"


def command(images: Path, folder: Path, *more: str) -> list[str]:
    return ["sparsify", str(images), "--arch", PLAIN, "--epochs", "1", "--batch-size", "8", "-o", str(folder), *more]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_run_from_the_folder_of_images_to_the_folder_of_results(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(command(images, folder, "--arch", ARCH)) == 0

    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if not line.startswith("fasterai: warning: only min_keep")] == []
    assert "16 images to train on, 4 to validate on (a fifth of each class), 2 classes, 32x32" in printed.out
    for text in ("stage2.0.branch1.0.weight", "fc.weight", "whole network", "dense", "sparse", "accuracy", "time"):
        assert text in printed.out
    assert {path.name for path in folder.iterdir()} == {
        "dense.safetensors", "sparse.safetensors", "sparsifier.pt", "report.json", "training.png", "sparsity.png",
    }  # fmt: skip

    network = torchvision.models.get_model(ARCH, weights=None, num_classes=2)
    network.load_state_dict(load_file(folder / "sparse.safetensors"))
    sparsifier = Sparsifier(network, "weight", "global", "large_final")
    sparsifier.load_state_dict(torch.load(folder / "sparsifier.pt", weights_only=True))
    count = sum(target.parameter.numel() for target in sparsifier.targets)
    pruned = sum(int((~mask).sum()) for mask in sparsifier.masks.values())
    assert pruned == round(0.9 * count)
    assert all(bool((t.parameter[~sparsifier.masks[t.name]] == 0).all()) for t in sparsifier.targets)

    report = read_report(folder)
    assert report["data"]["classes"] == ["ant", "bee"]
    assert sum(layer["pruned"] for layer in report["layers"]) == pruned
    assert report["arguments"]["sparsity"] == 0.9
    assert report["versions"]["torch"] == torch.__version__
    assert [len(report["history"][stage]) for stage in ("dense", "sparse")] == [1, 1]
    assert 0 <= report["results"]["sparse"]["accuracy"] <= 1


def test_a_resumed_command_equals_an_uninterrupted_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(images, tmp_path / "whole", "--epochs", "2")) == 0
    whole, steps = training.augment, 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:  # 2 steps an epoch: the last of the sparse training
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(training, "augment", interrupted)
    assert main(command(images, tmp_path / "broken", "--epochs", "2")) == 130
    capsys.readouterr()

    assert main(command(images, tmp_path / "broken", "--epochs", "2")) == 2
    assert "--output must not hold a run" in capsys.readouterr().err
    assert main(command(images, tmp_path / "broken", "--epochs", "3", "--resume")) == 2
    assert "--epochs was 2 and is 3" in capsys.readouterr().err

    assert main(command(images, tmp_path / "broken", "--epochs", "2", "--resume")) == 0
    assert "sparse: going on after epoch 1 of 2" in capsys.readouterr().out
    for name in ("dense", "sparse"):
        found, expected = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("broken", "whole"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_report(tmp_path / "broken")["history"] == read_report(tmp_path / "whole")["history"]


def test_resuming_a_complete_run_shows_it_again(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(command(images, folder, "--no-dense", "--resume")) == 0  # nothing to go on with: from the beginning
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder} holds no run to go on with: this one begins at the beginning\n")
    table = printed.split("\n\n")[-2]
    assert "dense" not in table

    assert main(command(images, folder, "--no-dense", "--resume")) == 0
    assert table in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert main(command(images, folder, "--resume")) == 2
    assert "--no-dense was True and is False" in capsys.readouterr().err
    (images / "ant" / "0.png").unlink()
    assert main(command(images, folder, "--no-dense", "--resume")) == 2
    assert "the files in DATA are others now" in capsys.readouterr().err


def test_unreadable_images_are_left_out_and_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = images / "bee" / "3.png"
    broken.write_text("text")
    assert main(command(images, tmp_path / "run", "--no-dense", "--skip-unreadable")) == 0
    assert f"left out: {broken} (" in capsys.readouterr().out
    assert [entry["path"] for entry in read_report(tmp_path / "run")["data"]["skipped"]] == [str(broken)]


def test_filters_leave_the_output_dense_and_say_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = [
        "--arch",
        ARCH,
        "--granularity",
        "filter",
        "--context",
        "local",
        "--criteria",
        "taylor",
        "--schedule",
        "agp",
        "--sparsity",
        "0.5",
    ]
    assert main(command(images, tmp_path / "run", "--no-dense", "--arch", ARCH, *axes)) == 0
    report = read_report(tmp_path / "run")
    assert report["granularity"] == "filter"
    first = report["layers"][0]
    assert (first["name"], first["units"], first["pruned"]) == ("conv1.0.weight", 24, 12)
    assert "left dense: fc.weight" in capsys.readouterr().out
    assert report["small"]["why_not"] == ""


def test_coupled_channels_end_in_a_small_network(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    axes = ["--granularity", "coupled", "--context", "local", "--sparsity", "0.5"]
    assert main(command(images, folder, *axes)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    table = printed.out.split("\n\n")[-3]
    assert table.splitlines()[0].split() == ["channels", "dense", "sparse", "small"]
    assert ["features.0", "64", "32", "of", "64", "32"] in [line.split() for line in table.splitlines()]
    assert {path.name for path in folder.iterdir()} == {
        "dense.safetensors", "sparse.safetensors", "small.safetensors", "sparsifier.pt", "report.json", "training.png",
        "sparsity.png", "small.png",
    }  # fmt: skip

    sparse = torchvision.models.get_model(PLAIN, weights=None, num_classes=2)
    sparse.load_state_dict(load_file(folder / "sparse.safetensors"))
    small = load_small(folder / "small.safetensors", torchvision.models.get_model(PLAIN, weights=None, num_classes=2))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, found = sparse.eval()(x), small.eval()(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert small.features[0].out_channels == 32

    report = read_report(folder)
    assert report["small"]["accuracy"] == report["results"]["sparse"]["accuracy"]
    assert report["small"]["costs"]["small"]["parameters"] == sum(p.numel() for p in small.parameters())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(command(images, folder, *axes, "--resume")) == 0
    assert table in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_interruption_of_the_removal_loses_no_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["--granularity", "coupled", "--context", "local", "--sparsity", "0.5", "--no-dense"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "make_small", interrupted)
        assert main(command(images, tmp_path / "run", *axes)) == 130
    assert "--resume goes on" in capsys.readouterr().err
    weights = (tmp_path / "run" / "sparse.safetensors").read_bytes()

    assert main(command(images, tmp_path / "run", *axes, "--resume")) == 0
    printed = capsys.readouterr().out
    assert "epoch" not in printed
    assert ["channels", "sparse", "small"] in [line.split() for line in printed.splitlines()]
    assert (tmp_path / "run" / "sparse.safetensors").read_bytes() == weights
