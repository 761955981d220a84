from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import fasterai
from fasterai.cli import main

MakeImages = Callable[..., Path]


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, fasterai.cli; heavy = {'torchvision', 'matplotlib', 'sklearn', 'safetensors', 'PIL', 'fasterai.sparse'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fasterai.cli", "--version"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fasterai {fasterai.__version__}\n")


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["sparsify", "--help"], ["prune", "--help"]])
def test_help(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: fasterai")


PRUNE = ("prune", "--arch", "resnet18")
HALF = (*PRUNE, "--sparsity", "0.5")
# Arguments -> parts of the message, in their order.
WRONG = {
    (): ["required"],
    ("shrink",): ["invalid choice", "shrink"],
    ("prune",): ["required", "WEIGHTS"],
    ("prune", "W.pth", "--sparsity", "0.5"): ["required", "--arch"],
    (*PRUNE, "W.pth"): ["one of", "--sparsity", "--budget", "--remove-only", "required"],
    (*PRUNE, "W.pth", "--sparsity", "0.5", "--remove-only"): ["--remove-only", "not allowed with", "--sparsity"],
    (*HALF, "nowhere.pth"): ["WEIGHTS must be a file, got nowhere.pth", "does not exist"],
    (*HALF, "DATA"): ["WEIGHTS must be a file, got the folder DATA"],
    (*PRUNE, "W.pth", "--sparsity", "50"): ["--sparsity must be in [0, 1], got 50", "pass 0.5"],
    (*PRUNE, "W.pth", "--sparsity", "1.0"): ["--sparsity must be below 1, got 1.0", "without a channel"],
    (*PRUNE, "W.pth", "--budget", "speed=0.5"): ["--budget must be macs=SHARE", "got 'speed=0.5'"],
    (*PRUNE, "W.pth", "--budget", "macs"): ["--budget must be macs=SHARE", "got 'macs'"],
    (*PRUNE, "W.pth", "--budget", "macs=50"): ["--budget macs must be in (0, 1], got 50", "pass 0.5"],
    (*HALF, "W.pth", "--context", "two_four"): ["--context must be one of local, global, erk, lamp, got 'two_four'"],
    (*HALF, "W.pth", "--criteria", "largest"): ["--criteria", "large_final", "got 'largest'"],
    (*HALF, "W.pth", "--criteria", "taylor"): ["--data must be given for --criteria taylor"],
    (*HALF, "W.pth", "--criteria", "movement"): ["--criteria", "got 'movement'", "initial"],
    (*HALF, "W.pth", "--round-to", "0"): ["--round-to must be at least 1, got 0"],
    (*HALF, "W.pth", "--batch", "0"): ["--batch must be at least 1, got 0"],
    (*HALF, "W.pth", "--image-size", "4"): ["--image-size must be at least 8, got 4"],
    (*HALF, "W.pth", "--seed", "-1"): ["--seed must be in [0, 2^63), got -1"],
    (*HALF, "W.pth", "-o", "DATA"): ["--output must be a new folder, got DATA", "not empty"],
    (*HALF, "W.pth", "--device", "gpu0"): ["--device", "got 'gpu0'"],
    ("prune", "W.pth", "--arch", "resnet81", "--sparsity", "0.5"): ["--arch", "got 'resnet81'", "resnet18"],
    ("sparsify",): ["required", "DATA"],
    ("sparsify", "DATA", "--sparsity", "half"): ["--sparsity", "half"],
    ("sparsify", "DATA", "--sparsity", "50"): ["--sparsity must be in [0, 1], got 50", "pass 0.5"],
    ("sparsify", "DATA", "--sparsity", "-0.1"): ["--sparsity must be in [0, 1], got -0.1"],
    ("sparsify", "DATA", "--sparsity", "nan"): ["--sparsity must be in [0, 1], got nan"],
    ("sparsify", "DATA", "--granularity", "filtre"): ["--granularity", "column", "kernel", "got 'filtre'", "'filter'"],
    ("sparsify", "DATA", "--context", "everywhere"): ["--context", "global", "lamp", "local", "got 'everywhere'"],
    ("sparsify", "DATA", "--criteria", "largest"): ["--criteria", "large_final", "wanda", "got 'largest'"],
    ("sparsify", "DATA", "--schedule", "onecycles"): ["--schedule", "agp", "got 'onecycles'", "'one_cycle'"],
    ("sparsify", "DATA", "--arch", "resnet81"): ["--arch", "got 'resnet81'", "resnet18"],
    ("sparsify", "DATA", "--arch", "qqq"): ["--arch", "got 'qqq'", "such as alexnet"],
    ("sparsify", "DATA", "--epochs", "0"): ["--epochs must be at least 1, got 0"],
    ("sparsify", "DATA", "--batch-size", "1"): ["--batch-size must be at least 2, got 1"],
    ("sparsify", "DATA", "--lr", "0"): ["--lr must be above 0, got 0"],
    ("sparsify", "DATA", "--lr", "inf"): ["--lr must be above 0, got inf"],
    ("sparsify", "DATA", "--seed", "-1"): ["--seed must be in [0, 2^63), got -1"],
    ("demo", "--seed", "-1"): ["--seed must be in [0, 2^63), got -1"],
    ("sparsify", "DATA", "--workers", "-1"): ["--workers must be at least 0, got -1"],
    ("sparsify", "DATA", "--image-size", "4"): ["--image-size must be at least 8, got 4"],
    ("sparsify", "DATA", "--device", "gpu0"): ["--device", "got 'gpu0'"],
    ("sparsify", "nowhere"): ["DATA", "nowhere", "does not exist"],
    ("sparsify", "DATA", "--arch", "alexnet"): ["--arch alexnet does not run on 8x8 images", "--image-size"],
    ("sparsify", "DATA", "--arch", "vit_b_16", "--image-size", "24"): ["--arch vit_b_16 cannot be built for 24x24 images"],
    ("sparsify", "DATA", "--arch", "shufflenet_v2_x0_5", "--image-size", "32", "--context", "two_four"): [
        "sparsity must be at most 0.5", "got 0.9",
    ],
}  # fmt: skip


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_errors_are_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_images("DATA", {"a": 2, "b": 2})
    assert main(argv) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fasterai: error: ")
    assert captured.err.count("\n") == 1
    assert "^" not in captured.err.replace("2^63", "")
    at = 0
    for part in WRONG[argv]:
        at = captured.err.find(part, at)
        assert at >= 0, f"{part!r} is not in {captured.err!r}, or not in this place"
    assert [path.name for path in tmp_path.iterdir()] == ["DATA"]


def test_an_unreadable_image_is_named_before_the_training(
    capsys: pytest.CaptureFixture[str], make_images: MakeImages, tmp_path: Path
) -> None:
    root = make_images("data", {"a": 2, "b": 2})
    (root / "a" / "1.png").write_text("text")
    assert main(["sparsify", str(root), "-o", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fasterai: error: unreadable image {root / 'a' / '1.png'} (")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["demo", "-o", str(tmp_path / "taken")]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "text"), [
    (["demo"], "start again"),
    (["sparsify", "DATA"], "--resume goes on from the last full epoch"),
    ([*HALF, "W.pth"], "nothing was written"),
])  # fmt: skip
def test_an_interruption_tells_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], text: str
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"fasterai.cli.{argv[0]}"), "run", interrupted)
    assert main(argv) == 130
    assert text in capsys.readouterr().err


def test_a_warning_is_one_line_without_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def doubtful(_: object) -> int:
        warnings.warn("this is legal,\n but doubtful", stacklevel=1)
        return 0

    monkeypatch.setattr("fasterai.cli.demo.run", doubtful)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["demo"]) == 0
    assert capsys.readouterr().err == "fasterai: warning: this is legal, but doubtful\n"


def test_hints_can_be_typed_or_say_that_they_are_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", "images", "--schedule", "exponential"]) == 2
    assert "position ** 2, say (in Python: the command line takes names alone)" in capsys.readouterr().err
    assert main(["sparsify", "images", "--criteria", "structured"]) == 2
    error = capsys.readouterr().err
    assert "--granularity filter" in error and "granularity='" not in error and "in Python" not in error
