"""Files of ternary models: read back equal, small, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fasterai.analyze.cost import file_size
from fasterai.misc.ternary.files import load_ternary, save_ternary
from fasterai.misc.ternary.ternarize import find_ternary, ternarize
from tests.misc.ternary.test_selection import Net, X


def make() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 1, groups=2), nn.ConvTranspose2d(32, 16, 3), nn.BatchNorm2d(16)]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_ternary(tmp_path / "a.safetensors", ternarize(make()))
    return tmp_path / "a.safetensors"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(x, state(second)[n]) and x.dtype == state(second)[n].dtype for n, x in state(first).items())


@pytest.mark.parametrize("group", [4, 5, "filter", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_read_back_equal(group, dtype, tmp_path):
    new = ternarize(make().to(dtype), group)
    save_ternary(tmp_path / "a", new, group)
    other = make().to(dtype)
    for p in other.parameters():
        nn.init.zeros_(p)
    assert load_ternary(tmp_path / "a", other) is other
    assert same(new, other)


def test_the_file_is_as_small_as_the_report_says(saved):
    report, dense = find_ternary(make()), file_size(make())
    header = 1500  # names of two tensors instead of one, and the description of the packed weights
    assert abs(saved.stat().st_size - (dense - report.dense_bytes + report.packed_bytes)) < header
    assert saved.stat().st_size < dense / 2
    with safe_open(str(saved), "pt") as file:
        assert set(json.loads(file.metadata()["layers"])) == set(report.layers)


def test_weights_with_half_scales_pack_smaller(saved, tmp_path):
    save_ternary(tmp_path / "half", ternarize(make(), scale_dtype=torch.float16))
    saving = find_ternary(make()).packed_bytes - find_ternary(make(), scale_dtype=torch.float16).packed_bytes
    assert saved.stat().st_size - (tmp_path / "half").stat().st_size == pytest.approx(saving, abs=20)


def test_tied_weights_are_packed_once(tmp_path):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        return model

    new = ternarize(tied(), targets="*")
    save_ternary(tmp_path / "a", new)
    with safe_open(str(tmp_path / "a"), "pt") as file:
        assert {name for name in file.keys() if name.startswith("0.")} == {"0.bias", "0.weight.codes", "0.weight.scales"}  # noqa: SIM118
        assert {name for name in file.keys() if name.startswith("2.")} == {"2.bias"}  # noqa: SIM118
    assert same(load_ternary(tmp_path / "a", tied()), new)


def test_a_buffer_that_is_a_view_of_a_weight_does_not_hide_it(tmp_path):
    def viewed() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model.register_buffer("rows", model[1].weight.detach()[:2])  # comes first in the state
        return model

    model = viewed()
    model[1].weight.detach().copy_(ternarize(model)[1].weight)
    save_ternary(tmp_path / "a", model)
    assert same(load_ternary(tmp_path / "a", viewed()), model)


def test_a_model_without_ternary_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ternary in groups of 4, got none; ternarize\(model, 4\) makes them"):
        save_ternary(tmp_path / "a", make())
    with pytest.raises(ValueError, match="ternary in groups of 16, got none"):
        save_ternary(tmp_path / "a", ternarize(make(), 4), 16)
    with pytest.raises(ValueError, match="ternary in groups of 1, got none"):  # each is, but with a scale for every weight
        save_ternary(tmp_path / "a", make(), 1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        save_ternary(tmp_path / "a", {})
    assert list(tmp_path.iterdir()) == []


def other_shape() -> nn.Sequential:
    model = make()
    model[1] = nn.Conv2d(16, 16, 5)
    return model


def embedding() -> nn.Sequential:
    model = make()
    model[7] = nn.Embedding(16, 16)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make()[:-1], "where 8.bias is not in it; 8.weight is not in it"),
        (lambda: nn.Sequential(*make(), nn.Linear(4, 4)), "where 9.bias is not in the file; 9.weight is not in the file"),
        (other_shape, r"1.weight is \(16, 16, 5, 5\) here and \(16, 16, 3, 3\) in the file"),
        (embedding, "7.weight cannot be divided into groups here"),
        (Net, "model must be built as the saved one was"),
    ],
)
def test_another_model_is_refused_and_stays(saved, model, message):
    other = model()
    before = {n: x.clone() for n, x in state(other).items()}
    with pytest.raises(ValueError, match=message):
        load_ternary(saved, other)
    assert all(torch.equal(x, before[n]) for n, x in state(other).items())


def rewrite(path: Path, tensors=None, **metadata: str) -> None:
    with safe_open(str(path), "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata()
    save_file({n: x for n, x in (held | (tensors or {})).items() if x is not None}, str(path), header | metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "another"}, "which is not one"),
        ({}, {"group": "-1"}, r"whose header is not one \(group must be at least 1"),
        ({}, {"layers": "[]"}, "whose header is not one"),
        ({}, {"layers": '{"1.weight": {"shape": [16], "dtype": "int8"}}'}, "dtype must be one of float16"),
        ({}, {"layers": '{"1.weight": {"shape": [-1, 16], "dtype": "float32"}}'}, "whose header is not one"),
        ({"1.weight.codes": None}, {}, "which lacks 1.weight"),
        ({"1.weight.codes": torch.full((576,), 255, dtype=torch.uint8)}, {}, "1.weight: codes must be 0, 1 or 2, got 3"),
        ({"1.weight.scales": torch.full((16, 4, 9), -1.0)}, {}, "1.weight: scales must be finite and at least 0"),
    ],
)
def test_a_file_that_was_changed_is_refused(saved, tensors, metadata, message):
    rewrite(saved, tensors, **metadata)
    model = make()
    with pytest.raises(ValueError, match=f"path must be a file that save_ternary wrote, got .*{message}"):
        load_ternary(saved, model)
    assert same(model, make())


def test_a_truncated_file_and_another_one_are_refused(saved, tmp_path):
    (tmp_path / "part").write_bytes(saved.read_bytes()[:-100])
    torch.save({}, tmp_path / "pickle")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "plain"))
    for name in ("part", "pickle", "plain"):
        with pytest.raises(ValueError, match="path must be a file that save_ternary wrote"):
            load_ternary(tmp_path / name, make())
    with pytest.raises(FileNotFoundError):
        load_ternary(tmp_path / "nothing", make())


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path):
    new = ternarize(Net(), 4, example_inputs=X).eval()
    save_ternary(tmp_path / "a", new)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_ternary(tmp_path / "a", Net().eval())(x), new(x))
