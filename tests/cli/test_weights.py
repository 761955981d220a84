from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fasterai.cli.errors import UsageError
from fasterai.cli.output import save_weights
from fasterai.cli.weights import Weights, load_classifier, read_weights
from fasterai.prune.small_files import save_small

ARCH = "squeezenet1_1"


def network(arch: str = ARCH, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(arch, weights=None, num_classes=classes, **options)


def same(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    found = network.state_dict()
    return all(torch.equal(found[name], value) for name, value in tensors.items() if name in found)


# How a state dict may be wrapped when it is saved: by DDP, by torch.compile, by Lightning, by fastai, in a checkpoint.
WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "ddp": lambda state: {f"module.{name}": x for name, x in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": x for name, x in state.items()},
    "lightning": lambda state: {"epoch": 3, "state_dict": {f"net.{name}": x for name, x in state.items()}},
    "fastai": lambda state: {"model": state, "opt": {"state": [{"mom": 0.9}]}},
    "checkpoint": lambda state: {"model_state_dict": state, "step": 7},
    "half": lambda state: {name: x.half() for name, x in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_saved_weights_load_into_their_network(tmp_path: Path, wrapper: str) -> None:
    state = network().state_dict()
    torch.save(WRAPPED[wrapper](state), tmp_path / "w.pth")
    found, classes, left_out = load_classifier(ARCH, read_weights(tmp_path / "w.pth"), 64)
    assert (classes, left_out, found.training) == (5, [], False)
    wanted = state if wrapper != "half" else {name: x.half().float() for name, x in state.items()}
    assert same(found, wanted)
    assert len(found.state_dict()) == len(state)


def test_weights_of_safetensors_tell_their_classes(tmp_path: Path) -> None:
    model = network("resnet18", 2)
    save_weights(model, tmp_path / "sparse.safetensors", ("cat", "dog"))
    weights = read_weights(tmp_path / "sparse.safetensors")
    assert weights.classes == ("cat", "dog")
    found, classes, _ = load_classifier("resnet18", weights, 64)
    assert classes == 2
    assert same(found, model.state_dict())
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert read_weights(tmp_path / "other.safetensors").classes is None


# Heads of every kind: a convolution, one linear layer of several, two levels deep, at the end of a stage of its own.
@pytest.mark.parametrize(("arch", "size"), [
    ("squeezenet1_0", 64), ("mobilenet_v3_small", 64), ("vit_b_32", 64), ("convnext_tiny", 64), ("densenet121", 64),
])  # fmt: skip
def test_the_number_of_classes_is_read_off_the_weights(arch: str, size: int) -> None:
    options = {"image_size": size} if arch.startswith("vit") else {}
    weights = Weights(Path("w.pth"), network(arch, 7, **options).state_dict())
    found, classes, _ = load_classifier(arch, weights, size)
    assert classes == 7
    assert same(found, dict(weights.tensors))


def test_auxiliary_classifiers_are_left_out_and_named() -> None:
    weights = Weights(Path("w.pth"), network("googlenet", 7, aux_logits=True, init_weights=False).state_dict())
    found, classes, left_out = load_classifier("googlenet", weights, 64)
    assert classes == 7
    assert {name.split(".")[0] for name in left_out} == {"aux1", "aux2"}
    assert not any(name.startswith("aux") for name in found.state_dict())


def test_weights_of_before_batches_were_counted() -> None:
    state = {name: x for name, x in network("resnet18").state_dict().items() if "num_batches" not in name}
    found, _, _ = load_classifier("resnet18", Weights(Path("old.pth"), state), 64)
    assert same(found, state)


# Files that torchvision still gives out; it renames them when it downloads them.
@pytest.mark.parametrize(("arch", "pattern", "before"), [
    ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
    ("vit_b_32", r"mlp\.([03])", lambda found: {"0": "mlp.linear_1", "3": "mlp.linear_2"}[found[1]]),
], ids=["densenet121", "vit_b_32"])  # fmt: skip
def test_names_of_older_files_are_known(arch: str, pattern: str, before: Any) -> None:
    options = {"image_size": 64} if arch.startswith("vit") else {}
    state = network(arch, 7, **options).state_dict()
    older = {re.sub(pattern, before, name): x for name, x in state.items()}
    assert older.keys() != state.keys()
    found, _, _ = load_classifier(arch, Weights(Path("old.pth"), older), 64)
    assert same(found, state)
    assert not same(network(arch, 7, **options).apply(halve), state)


def halve(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data /= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float) -> None:
    state = network().state_dict()
    state["features.0.bias"][3] = value
    with pytest.raises(UsageError, match=r"WEIGHTS must be finite, got w\.pth, where features\.0\.bias holds infinity or NaN"):
        load_classifier(ARCH, broken(state), 64)


def test_shapes_that_follow_the_images_are_said_to() -> None:
    state = network("vit_b_32", 2, image_size=64).state_dict()
    with pytest.raises(
        UsageError, match=r"got 'vit_b_32' \(of 32x32 images; --image-size changes its shapes\), for which .*pos"
    ):
        load_classifier("vit_b_32", broken(state), 32)


def test_a_name_for_each_class_or_none() -> None:
    weights = Weights(Path("w.safetensors"), network(classes=3).state_dict(), ("ant", "bee"))
    with pytest.raises(UsageError, match=r"WEIGHTS must name each of its 3 classes, got 2 names in w\.safetensors"):
        load_classifier(ARCH, weights, 64)


def broken(state: dict[str, Tensor], **changes: Tensor | None) -> Weights:
    return Weights(Path("w.pth"), {name: x for name, x in {**state, **changes}.items() if x is not None})


@pytest.mark.parametrize(("arch", "changes", "message"), [
    (ARCH, {"features.0.bias": None}, r"--arch .*'squeezenet1_1', for which in w.pth features.0.bias is missing$"),
    (ARCH, {"features.0.bias": torch.ones(3)}, r"features.0.bias is 3 instead of 64$"),
    (ARCH, {"extra": torch.ones(3)}, r"extra is too many$"),
    ("resnet18", {}, r"got 'resnet18', for which in w.pth conv1.weight is missing; bn1.weight is missing; .*; and \d+ more$"),
    (ARCH, {"classifier.1.bias": None, "classifier.1.weight": None}, "classifier.1.weight is missing; classifier.1.bias is"),
    ("squeezenet1_0", {}, r"features.0.weight is 64x3x3x3 instead of 96x3x7x7; .*; and \d+ more$"),
])  # fmt: skip
def test_weights_of_another_network_are_refused(arch: str, changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_classifier(arch, broken(network().state_dict(), **changes), 64)


@pytest.mark.parametrize(("name", "write", "message"), [
    ("w.pth", lambda path: path.write_text("text"), r"must be a state dict that torch.save wrote, got .*w.pth .*torch.save\("),
    ("w.pth", lambda path: torch.save(nn.Linear(2, 2), path), r"must be a state dict that torch.save wrote.*model.state_dict"),
    ("w.pth", lambda path: torch.save([1, 2], path), r"must be a state dict, got .*w.pth, which holds a list without tensors"),
    ("w.pth", lambda path: torch.save({}, path), r"which holds a dict without tensors"),
    ("w.safetensors", lambda path: path.write_text("text"), r"WEIGHTS must be a file of safetensors, got .*w.safetensors \("),
    ("w.safetensors", lambda path: save_small(path, nn.Linear(2, 2)), r"of full size, got .*, which holds a small one already"),
])  # fmt: skip
def test_files_that_hold_no_weights(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / name)


def test_a_truncated_file(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        save_file(network().state_dict(), path) if "safe" in name else torch.save(network().state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(UsageError, match=rf"WEIGHTS must be .*{name}"):
            read_weights(path)


def test_a_folder_of_a_run_names_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WEIGHTS must be a file, got the folder .*[^z]$"):
        read_weights(tmp_path)
    (tmp_path / "sparse.safetensors").write_text("")
    with pytest.raises(UsageError, match=r"got the folder .*; pass .*sparse.safetensors$"):
        read_weights(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"--weights must be a file, got .*w\.pth, which is no regular file"):
        read_weights(tmp_path / "w.pth", "--weights")


def test_a_network_that_asks_for_the_version_of_its_file_loads_from_one_without(tmp_path: Path) -> None:
    model = network("mnasnet0_5", 3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found, classes, _ = load_classifier("mnasnet0_5", read_weights(tmp_path / "w.safetensors"), 64)
    assert classes == 3
    assert all(torch.equal(found.state_dict()[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("classes", ["", "3", "{}", "[1, 2]", '"ab"', "[", "[" * 100_000, "null"])
def test_class_names_that_are_none_are_one_line(tmp_path: Path, classes: str) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", {"classes": classes})
    with pytest.raises(UsageError, match=r"WEIGHTS must name its classes in a list of text, got .* in .*w\.safetensors"):
        read_weights(tmp_path / "w.safetensors")
