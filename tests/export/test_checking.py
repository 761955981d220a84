"""Samples hold tensors, outputs are those of eval mode, and a file is whole or absent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.export import checking
from fasterai.export.checking import as_inputs, model_outputs, require, written
from fasterai.export.onnx import export_onnx
from fasterai.export.program import export_program


def test_inputs_are_tensors():
    x = torch.zeros(1)
    assert as_inputs(x) == (x,)
    assert as_inputs([x, x]) == (x, x)
    with pytest.raises(TypeError, match=r"sample must be a tensor or a tuple of the model's arguments, got 'x' \(str\)"):
        as_inputs("x")


def test_outputs_are_those_of_eval_mode_and_modes_stay():
    model = nn.Sequential(nn.Dropout(0.99), nn.BatchNorm1d(4)).train()
    model[1].eval()
    x = torch.ones(2, 4)
    (output,) = model_outputs(model, (x,))
    assert torch.allclose(output, x, atol=1e-4)
    assert [m.training for m in model.modules()] == [True, True, False]
    with pytest.raises(ValueError, match="sample must be arguments that the model runs on, got an error"):
        model_outputs(model, (torch.ones(2, 5),))


def test_a_file_takes_its_place_when_all_went_well(tmp_path):
    path = tmp_path / "model.bin"
    with written(path) as place:
        place.write_text("weights")
        place.with_name("model.bin.data").write_text("more")
        assert not path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.bin.data"]
    assert path.read_text() == "weights"


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("old")

    def fail():
        with written(path) as place:
            place.write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(ValueError, match=r"output_path must be in a folder that is there, got '.*nowhere/m\.onnx'"),
        written(tmp_path / "nowhere" / "m.onnx"),
    ):
        pass
    with pytest.raises(ValueError, match="output_path must be a file, got the folder"), written(tmp_path):
        pass


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(checking.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs onnx and onnxruntime: pip install '\.\[export\]' in a checkout"):
        require("onnx", "onnxruntime")


class Tallying(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_buffers_that_a_pass_writes_to_are_as_before(tmp_path, export):
    model = Tallying()
    calls = model.calls
    export(model, torch.randn(2, 3), tmp_path / "file.pt2")
    assert model.calls is calls
    assert calls.item() == 0
