from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fasterai.cli import main
from fasterai.cli.folders import read_folder
from fasterai.cli.output import save_weights
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small
from fasterai.sparse.sparsifier import Sparsifier

MakeImages = Callable[..., Path]
ARCH = "squeezenet1_1"


def network(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(ARCH, weights=None, num_classes=classes).eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(network().state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def command(weights: Path, folder: Path, *more: str) -> list[str]:
    return ["prune", str(weights), "--arch", ARCH, "--image-size", "32", "-o", str(folder), *more]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def small_of(folder: Path) -> nn.Module:
    return load_small(folder / "small.safetensors", network())


def test_from_weights_to_a_small_network(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    assert main(command(weights, folder, "--sparsity", "0.5", "--onnx")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in (
        "squeezenet1_1: 723,522 parameters, 2 classes, 32x32 images",
        "features.0.weight: 64 -> 32 channels",
        "masked",
        "accuracy: not measured",
        "--data",
        "get_model('squeezenet1_1', num_classes=2)",
        f"load_small('{folder}/small.safetensors', model)",
    ):
        assert text in printed.out
    assert {path.name for path in folder.iterdir()} == {"small.safetensors", "small.onnx", "small.png", "report.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth", "small"}

    small = small_of(folder)
    assert small.features[0].out_channels == 32
    report = read_report(folder)
    assert report["removal"]["parameters"] == [723522, sum(p.numel() for p in small.parameters())]
    assert report["removal"]["removed"]["features.0.weight"] == [64, 32]
    assert report["accuracy"] == {"before": None, "after": None}
    assert (report["classes"], report["image_size"], report["arguments"]["sparsity"]) == (2, 32, 0.5)
    x = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(folder / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, outputs(small, x).numpy(), rtol=0, atol=1e-4 * float(outputs(small, x).abs().max()))


@pytest.mark.parametrize(("criteria", "first"), [("large_final", 0), ("small_final", 1)])
def test_the_low_channels_go_and_the_small_network_computes_what_masks_do(
    weights: Path, tmp_path: Path, criteria: str, first: int
) -> None:
    model = network()
    with torch.no_grad():
        model.features[0].weight[::2] *= 1e-3  # every other channel is smaller
    torch.save(model.state_dict(), weights)
    options = ["--sparsity", "0.5", "--criteria", criteria, "--ignore", *ignored("features.0")]
    assert main(command(weights, tmp_path / "small", *options)) == 0
    with torch.no_grad():  # all that the channels run through is masked by hand
        model.features[0].weight[first::2], model.features[0].bias[first::2] = 0, 0
    x = torch.randn(3, 3, 32, 32)
    wanted = outputs(model, x)
    assert (outputs(small_of(tmp_path / "small"), x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("context", "left"), [("local", 32), ("global", 8)])
def test_channels_compete_in_their_group_or_all_together(weights: Path, tmp_path: Path, context: str, left: int) -> None:
    model = network()
    with torch.no_grad():  # eight outweigh the rest of their group
        model.features[0].weight[:8] *= 1e3
    torch.save(model.state_dict(), weights)
    assert main(command(weights, tmp_path / "small", "--sparsity", "0.5", "--context", context)) == 0
    assert read_report(tmp_path / "small")["removal"]["removed"]["features.0.weight"] == [64, left]


def test_the_trial_run_leaves_running_statistics(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None, num_classes=2).state_dict(), tmp_path / "w.pth")
    assert main(command(tmp_path / "w.pth", tmp_path / "small", "--sparsity", "0.5", "--arch", "resnet18")) == 0
    small = load_small(tmp_path / "small" / "small.safetensors", torchvision.models.resnet18(weights=None, num_classes=2))
    assert small.bn1.num_batches_tracked.item() == 0


def ignored(but: str) -> list[str]:
    """All convolutions but one."""
    return [name for name, module in network().named_modules() if isinstance(module, nn.Conv2d) and name != but]


def test_remove_only_takes_out_what_is_silent_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    with torch.no_grad():
        model.features[0].weight[5:], model.features[0].bias[5:] = 0, 0
    save_weights(model, tmp_path / "sparse.safetensors", ("cat", "dog"))
    assert main(command(tmp_path / "sparse.safetensors", tmp_path / "small", "--remove-only")) == 0
    printed = capsys.readouterr().out
    assert "features.0.weight: 64 -> 5 channels" in printed
    assert "train the small network on" not in printed
    assert read_report(tmp_path / "small")["removal"]["removed"] == {"features.0.weight": [64, 5]}
    x = torch.randn(3, 3, 32, 32)
    wanted = outputs(model, x)
    assert (outputs(small_of(tmp_path / "small"), x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_nothing_to_remove_is_an_error(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(weights, tmp_path / "small", "--remove-only")) == 2
    assert f"nothing was removed from {weights}, and nothing was written; pass --sparsity" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("kind", "share"), [("macs", 0.5), ("params", 0.3)])
def test_a_budget_is_kept_to(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, share: float
) -> None:
    assert main(command(weights, tmp_path / "small", "--budget", f"{kind}={share}", "--context", "global")) == 0
    assert capsys.readouterr().err == ""  # the search itself warns of nothing
    costs = read_report(tmp_path / "small")["removal"]["measured"]["costs"]
    field = {"macs": "macs", "params": "parameters"}[kind]
    assert share - 0.01 <= costs["small"][field] / costs["dense"][field] <= share


def test_counts_are_rounded_as_asked(weights: Path, tmp_path: Path) -> None:
    assert main(command(weights, tmp_path / "small", "--sparsity", "0.7", "--round-to", "1")) == 0
    # round(0.7 x 64) = 45 go
    assert read_report(tmp_path / "small")["removal"]["removed"]["features.0.weight"] == [64, 19]


def test_images_tell_the_accuracy_and_feed_criteria(
    make_images: MakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images("data", {"ant": 10, "bee": 10}, size=(32, 32))
    model = network()
    with torch.no_grad():  # it says bee whatever it sees
        model.classifier[1].weight.zero_()
        model.classifier[1].bias.copy_(torch.tensor([1.0, 2.0]))
    save_weights(model, tmp_path / "w.safetensors", ("ant", "bee"))
    options = ["--sparsity", "0.5", "--data", str(images), "--criteria", "taylor", "--batch", "3"]
    assert main(command(tmp_path / "w.safetensors", tmp_path / "small", *options)) == 0
    assert "accuracy: 50.00% -> 50.00% of 4 images" in capsys.readouterr().out
    report = read_report(tmp_path / "small")
    assert report["accuracy"] == {"before": 0.5, "after": 0.5}
    assert report["removal"]["inputs"].startswith("3x3x32x32")
    assert report["data"]["classes"] == ["ant", "bee"]


def test_a_run_brings_its_image_size_normalisation_split_and_classes(
    make_images: MakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images("data", {"ant": 10, "bee": 10}, size=(48, 48))
    run = ["sparsify", str(images), "--arch", ARCH, "--epochs", "1", "--batch-size", "8", "--seed", "5", "--image-size", "40"]
    axes = ["--granularity", "coupled", "--context", "local", "--sparsity", "0.5", "--no-dense"]
    assert main([*run, *axes, "-o", str(tmp_path / "run")]) == 0
    made = read_report(tmp_path / "run")
    for path in images.rglob("*.png"):  # another part of the images would have another mean now
        if path.name in ("0.png", "1.png"):
            Image.new("RGB", (48, 48)).save(path)
    capsys.readouterr()
    seen = {}

    def noted(network: nn.Module, inputs: Tensor) -> Any:
        seen["inputs"] = inputs
        return remove(network, inputs)

    monkeypatch.setattr("fasterai.cli.prune.remove", noted)
    more = ["--arch", ARCH, "--remove-only", "--data", str(images), "--batch", "4"]
    assert main(["prune", str(tmp_path / "run" / "sparse.safetensors"), *more, "-o", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert "squeezenet1_1: 723,522 parameters, 2 classes, 40x40 images" in printed
    assert f"image size, normalisation and seed of the run in {tmp_path / 'run'}" in printed

    report = read_report(tmp_path / "small")
    assert (report["image_size"], report["arguments"]["seed"], report["classes"]) == (40, 5, 2)
    for name in ("mean", "std", "classes", "training_images", "validation_images"):
        assert report["data"][name] == made["data"][name]
    pixels = read_folder(images, image_size=40, seed=5).train[[0, 1, 2, 3]][0].double()
    mean, std = (torch.tensor(made["data"][name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen["inputs"].double(), (pixels / 255 - mean) / std, rtol=0, atol=1e-5)
    assert small_of(tmp_path / "small").features[0].out_channels == 32  # half of 64, as the run has masked


def test_images_must_be_of_the_classes_of_the_run_also_where_its_weights_do_not_name_them(
    make_images: MakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images("data", {"ant": 10, "bee": 10}, size=(32, 32))
    run = ["sparsify", str(images), "--arch", ARCH, "--epochs", "1", "--batch-size", "8", "--no-dense"]
    assert main([*run, "-o", str(tmp_path / "run")]) == 0
    save_file(network().state_dict(), tmp_path / "run" / "w.safetensors")
    (images / "bee").rename(images / "cow")
    weights = tmp_path / "run" / "w.safetensors"
    assert (
        main(["prune", str(weights), "--arch", ARCH, "--sparsity", "0.5", "--data", str(images), "-o", str(tmp_path / "s")])
        == 2
    )
    assert "--data must hold the classes of WEIGHTS, got 'cow' in the place of 'bee'" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "message"), [
    ({"ant": 2, "bee": 2, "cow": 2}, "--data must hold the 2 classes of WEIGHTS, got 3"),
    ({"ant": 2, "cow": 2}, "--data must hold the classes of WEIGHTS, got 'cow' in the place of 'bee'"),
])  # fmt: skip
def test_images_of_other_classes_are_refused(
    make_images: MakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: dict[str, int], message: str
) -> None:
    save_weights(network(), tmp_path / "w.safetensors", ("ant", "bee"))
    images = make_images("data", classes, size=(32, 32))
    assert main(command(tmp_path / "w.safetensors", tmp_path / "small", "--sparsity", "0.5", "--data", str(images))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--sparsity", "0.5", "--ignore", "features.99"], "--ignore must be layers of squeezenet1_1, got 'features.99'; such as"),
    (["--sparsity", "0.5", "--image-size", "8"], "--arch squeezenet1_1 does not run on 8x8 images"),
    (["--budget", "params=0.0001"], "params must be at least 0."),
])  # fmt: skip
def test_what_goes_wrong_later_is_one_line_too(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(weights, tmp_path / "small", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fasterai: error: {message}")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth"}


def test_a_failure_while_writing_leaves_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "small.png")

    monkeypatch.setattr("fasterai.cli.prune.write_removal", full)
    assert main(command(weights, tmp_path / "small", "--sparsity", "0.5")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"w.pth"}


def test_an_existing_folder_is_refused_before_anything_is_done(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text("{}")
    assert main(command(weights, tmp_path / "small", "--sparsity", "0.5")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"--output must be a new folder, got {tmp_path / 'small'}, which is not empty" in captured.err
    assert (tmp_path / "small" / "report.json").read_text() == "{}"


def test_the_other_files_of_a_run_are_told_apart_from_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, masks = tmp_path / "checkpoint.pt", tmp_path / "sparsifier.pt"
    torch.save({"arguments": {}, "done": {}, "stage": None, "state": {}}, checkpoint)
    torch.save(Sparsifier(network(), sparsity=0.5).state_dict(), masks)
    assert main(command(checkpoint, tmp_path / "small", "--remove-only")) == 2
    wanted = f"got {checkpoint}, the checkpoint of fasterai sparsify; pass the sparse.safetensors of a run that is complete"
    assert wanted in capsys.readouterr().err
    (tmp_path / "sparse.safetensors").write_text("")
    assert main(command(masks, tmp_path / "small", "--remove-only")) == 2
    wanted = f"got {masks}, the masks' state of fasterai sparsify; pass {tmp_path}/sparse.safetensors"
    assert wanted in capsys.readouterr().err


def test_weights_may_have_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "checkpoint.pt")
    assert main(command(tmp_path / "checkpoint.pt", tmp_path / "small", "--sparsity", "0.5")) == 0
