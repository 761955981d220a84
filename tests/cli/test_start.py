from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasterai.cli import experiment, main, training
from fasterai.cli.output import save_weights
from fasterai.cli.start import read_start

MakeImages = Callable[..., Path]
ARCH = "squeezenet1_1"
#: The name of torchvision's file for it.
CACHED = "squeezenet1_1-b8a52dc0.pth"
HEAD = ["classifier.1.weight", "classifier.1.bias"]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Name of a training -> the weights that it starts from."""
    found: dict[str, dict[str, Tensor]] = {}

    class Noted(training.Training):
        def __init__(self, network: nn.Module, data: Any, recipe: Any, sparsifier: Any, name: str) -> None:
            found[name] = {key: x.clone() for key, x in network.state_dict().items()}
            super().__init__(network, data, recipe, sparsifier, name)

    monkeypatch.setattr(experiment, "Training", Noted)
    return found


def state(classes: int, arch: str = ARCH) -> dict[str, Tensor]:
    torch.manual_seed(classes)
    return torchvision.models.get_model(arch, weights=None, num_classes=classes).state_dict()


def cache(tmp_path: Path) -> Path:
    """Where torchvision keeps what it has downloaded."""
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / CACHED


def command(images: Path, folder: Path, *more: str) -> list[str]:
    return ["sparsify", str(images), "--arch", ARCH, "--epochs", "1", "--batch-size", "8", "-o", str(folder), *more]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], x) for name, x in wanted.items())


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
def test_both_trainings_start_from_a_file(images: Path, tmp_path: Path, starts, capsys, name: str) -> None:
    weights = state(2)
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    assert main(command(images, tmp_path / "run", "--weights", str(tmp_path / name))) == 0
    assert list(starts) == ["dense", "sparse"]
    assert equal(starts["dense"], weights)
    assert equal(starts["sparse"], weights)
    printed = capsys.readouterr().out
    assert f"starts from {tmp_path / name}" in printed
    assert "as initialised" not in printed
    report = read_report(tmp_path / "run")
    assert report["arguments"]["weights"] == report["start"]["weights"] == str(tmp_path / name)
    assert report["start"]["left_as_initialised"] == []


def test_without_weights_the_start_is_random_as_before(images: Path, tmp_path: Path, starts) -> None:
    assert main(command(images, tmp_path / "run", "--seed", "2")) == 0
    assert equal(starts["dense"], state(2))  # seeded by 2
    report = read_report(tmp_path / "run")
    assert report["start"] is report["arguments"]["weights"] is None
    assert "content" not in report["arguments"]


def test_a_head_of_other_classes_is_left_as_initialised_and_named(images: Path, tmp_path: Path, starts, capsys) -> None:
    weights = state(1000)
    torch.save(weights, tmp_path / "w.pth")
    assert main(command(images, tmp_path / "run", "--weights", str(tmp_path / "w.pth"), "--seed", "2")) == 0
    random = state(2)
    for found in starts.values():
        assert equal(found, {name: random[name] if name in HEAD else x for name, x in weights.items()})
    note = "left as initialised: classifier.1.weight, classifier.1.bias (1,000 classes in --weights, 2 in DATA)"
    assert note in capsys.readouterr().out
    assert read_report(tmp_path / "run")["start"]["left_as_initialised"] == HEAD


def test_torchvisions_own_weights_are_found_where_it_keeps_them(images: Path, tmp_path: Path, starts, capsys) -> None:
    weights = state(1000)
    torch.save(weights, cache(tmp_path))
    assert main(command(images, tmp_path / "run", "--weights", "DEFAULT")) == 0
    for found in starts.values():
        assert equal(found, {name: x for name, x in weights.items() if name not in HEAD})
    report = read_report(tmp_path / "run")
    assert report["arguments"]["weights"] == report["start"]["weights"] == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert (report["data"]["mean"], report["data"]["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # ImageNet's
    assert "images are normalised as --weights were trained" in capsys.readouterr().out


def test_weights_of_a_run_bring_its_normalisation(images: Path, make_images: MakeImages, tmp_path: Path, capsys) -> None:
    assert main(command(images, tmp_path / "first", "--no-dense")) == 0
    other = make_images("other", {"cat": 5, "dog": 5}, size=(32, 32))
    capsys.readouterr()
    weights = str(tmp_path / "first" / "sparse.safetensors")
    assert main(command(other, tmp_path / "second", "--no-dense", "--weights", weights)) == 0
    first, second = (read_report(tmp_path / name)["data"] for name in ("first", "second"))
    assert (first["mean"], first["std"]) == (second["mean"], second["std"])
    assert first["classes"] != second["classes"]
    printed = capsys.readouterr().out
    assert "classes of other names: 'ant' in --weights is 'cat' in DATA; its output is kept" in printed


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_that_turn_their_inputs_by_themselves_get_what_they_turn_them_to(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torchvision.models.get_model(arch, weights=None, init_weights=False, transform_input=True).eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: model)
    start = read_start("DEFAULT", arch)
    assert start is not None
    raw = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own = (raw - torch.tensor(start.mean)[:, None, None]) / torch.tensor(start.std)[:, None, None]
    torch.testing.assert_close(own, model._transform_input((raw - mean) / std))


def test_a_resumed_run_from_weights_equals_an_uninterrupted_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    torch.save(state(1000), tmp_path / "w.pth")
    torch.save(state(3), tmp_path / "other.pth")
    more = ["--weights", str(tmp_path / "w.pth")]
    assert main(command(images, tmp_path / "whole", *more)) == 0
    whole, steps = training.augment, 0

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:  # 2 steps an epoch: the first of the sparse training, which starts anew from the weights
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "augment", interrupted)
        assert main(command(images, tmp_path / "broken", *more)) == 130
    capsys.readouterr()
    for arguments, message in (
        ([], f"--weights was {str(tmp_path / 'w.pth')!r} and is None"),
        (["--weights", str(tmp_path / "other.pth")], f"and is {str(tmp_path / 'other.pth')!r}"),
    ):
        assert main(command(images, tmp_path / "broken", "--resume", *arguments)) == 2
        assert message in capsys.readouterr().err
    before = (tmp_path / "w.pth").read_bytes()
    torch.save({name: x * 2 for name, x in state(1000).items()}, tmp_path / "w.pth")
    assert main(command(images, tmp_path / "broken", "--resume", *more)) == 2
    assert "the weights that --weights names are others now" in capsys.readouterr().err

    (tmp_path / "w.pth").write_bytes(before)
    assert main(command(images, tmp_path / "broken", "--resume", *more)) == 0
    for name in ("dense", "sparse"):
        found, expected = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("broken", "whole"))
        assert equal(found, expected)


def one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fasterai: error: ")
    assert error.count("\n") == 1


def of_another_network(path: Path) -> None:
    torch.save(state(2, "squeezenet1_0"), path)


def with_one_more(path: Path) -> None:
    torch.save(state(2) | {"extra": torch.ones(2)}, path)


def without_its_head(path: Path) -> None:
    torch.save({name: x for name, x in state(2).items() if name not in HEAD}, path)


def not_finite(path: Path) -> None:
    torch.save(state(2) | {"features.0.bias": torch.full((64,), torch.nan)}, path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "--weights must be a file, got {path}, which does not exist"),
    (Path.mkdir, "--weights must be a file, got the folder {path}"),
    (os.mkfifo, "--weights must be a file, got {path}, which is no regular file"),
    (Path.touch, "--weights must be a state dict that torch.save wrote, got {path} (EOFError)"),
    (of_another_network, "--arch must be the network that --weights are of, got 'squeezenet1_1', for which in {path} "
     "features.0.weight is 96x3x7x7 instead of 64x3x3x3; features.0.bias is 96 instead of 64; "),
    (with_one_more, "{path} extra is too many"),
    (without_its_head, "{path} classifier.1.weight is missing; classifier.1.bias is missing"),
    (not_finite, "--weights must be finite, got {path}, where features.0.bias holds"),
], ids=["absent", "folder", "pipe", "empty", "of another network", "one more", "without its head", "not finite"])  # fmt: skip
def test_what_cannot_be_started_from_is_one_line(images: Path, tmp_path: Path, capsys, make, message: str) -> None:
    path = tmp_path / "w.pth"
    make(path)
    assert main(command(images, tmp_path / "run", "--weights", str(path))) == 2
    one_line(capsys, message.format(path=path))
    assert not (tmp_path / "run").exists()


def test_a_word_that_is_neither_is_told_of_the_other(images: Path, tmp_path: Path, capsys) -> None:
    assert main(command(images, tmp_path / "run", "--weights", "default")) == 2
    one_line(capsys, "--weights must be a file or DEFAULT, got default")


def no_network(*_: Any, **__: Any) -> None:
    raise URLError(OSError(-2, "Name or service not known"))


def not_found(*_: Any, **__: Any) -> None:
    raise HTTPError("https://download", 404, "Not Found", {}, None)  # type: ignore[arg-type]


class Answer(io.BytesIO):
    """An answer of other content than was asked for."""

    def info(self) -> Any:
        return type("Meta", (), {"getheaders": lambda *_: []})()


@pytest.mark.parametrize(("answer", "said"), [
    (no_network, "URLError: [Errno -2] Name or service not known"), (not_found, "HTTPError: Not Found"),
    (lambda *_, **__: Answer(b"sign in first"), 'RuntimeError: invalid hash value (expected "b8a52dc0"'),
])  # fmt: skip
def test_a_download_that_fails_is_one_line(images: Path, tmp_path: Path, capsys, monkeypatch, answer, said: str) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", answer)
    monkeypatch.setattr(torch.hub, "tqdm", lambda **_: torch.hub._Faketqdm(total=0, disable=True, unit="B"), raising=False)
    assert main(command(images, tmp_path / "run", "--weights", "DEFAULT")) == 2
    one_line(capsys, f"--weights DEFAULT cannot be downloaded ({said}")
    assert list(cache(tmp_path).parent.iterdir()) == []


def test_a_broken_file_of_an_earlier_download_is_named(images: Path, tmp_path: Path, capsys) -> None:
    cache(tmp_path).write_text("broken")
    assert main(command(images, tmp_path / "run", "--weights", "DEFAULT")) == 2
    one_line(capsys, f"cannot read {cache(tmp_path)} (")


def test_a_network_that_torchvision_has_no_weights_for(tmp_path: Path, images: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: [])
    assert main(command(images, tmp_path / "run", "--weights", "DEFAULT")) == 2
    one_line(capsys, "--weights must be a file for --arch squeezenet1_1, for which torchvision has no weights")


def test_a_file_that_the_run_would_write_over_is_refused(tmp_path: Path, images: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    model = torchvision.models.get_model(ARCH, weights=None, num_classes=2)
    save_weights(model, tmp_path / "run" / "dense.safetensors", ("ant", "bee"))
    before = (tmp_path / "run" / "dense.safetensors").read_bytes()
    weights = str(tmp_path / "run" / "dense.safetensors")
    assert main(command(images, tmp_path / "run", "--weights", weights)) == 2
    one_line(capsys, f"--weights must not be a file that the run writes, got {weights}; move it out of")
    assert (tmp_path / "run" / "dense.safetensors").read_bytes() == before
