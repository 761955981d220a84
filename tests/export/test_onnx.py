"""What is written is what the model computes, on any batch size, or nothing is written."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from fasterai.export import onnx as exporting
from fasterai.export.onnx import ONNXModel, export_onnx, verify_onnx
from fasterai.model.slim_norms import put_dense_size
from tests.networks import Branching, Counting

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_net() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 5)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model in training mode and its file, written with a batch of one."""
    torch.manual_seed(0)
    model = small_net()
    model[1].running_mean.normal_()
    model[2].eval()
    state = copy.deepcopy(model.state_dict())
    path = export_onnx(model, X[:1], tmp_path_factory.mktemp("onnx") / "m.onnx", input_names=["image"], output_names=["score"])
    return model, path, state


def test_the_file_computes_what_the_model_does_in_eval_mode(exported):
    model, path, _ = exported
    expected = copy.deepcopy(model).eval()(X)
    got = ONNXModel(path)(X)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_it_runs_on_any_batch_size(exported, size):
    model, path, _ = exported
    assert verify_onnx(model, path, torch.randn(size, 3, 8, 8))


def test_norms_over_fewer_channels_run_on_another_batch(tmp_path):
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 4))
    for norm, size in zip(net[1:], (10, 9, 3), strict=True):
        put_dense_size(norm, size)
    path = export_onnx(net, torch.randn(2, 4, 3), tmp_path / "m.onnx")
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(ONNXModel(path)(x), net(x))


def test_the_model_stays_as_it_was(exported):
    model, _, state = exported
    assert [m.training for m in model] == [True, True, False, True, True, True, True]
    assert model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_one_file_with_the_names_and_version_asked_for(exported):
    _, path, _ = exported
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]
    session = ONNXModel(path).session
    assert [node.name for node in session.get_inputs()] == ["image"]
    assert [node.name for node in session.get_outputs()] == ["score"]
    opsets = importlib.import_module("onnx").load(str(path)).opset_import
    assert [opset.version for opset in opsets if not opset.domain] == [18]


def test_a_changed_weight_is_noticed(exported):
    model, path, _ = exported
    other = copy.deepcopy(model)
    other[-1].bias.data[0] += 0.1
    assert verify_onnx(model, path, X)
    assert not verify_onnx(other, path, X)
    assert verify_onnx(other, path, X, atol=0.2)
    assert verify_onnx(other, path, X, rtol=1e6)


def test_another_number_or_shape_of_outputs_is_no_match(exported):
    _, path, _ = exported
    assert not verify_onnx(nn.Flatten(), path, X)


def test_a_file_is_called_with_what_it_takes(exported):
    _, path, _ = exported
    model = ONNXModel(path)
    assert torch.equal(model(X.numpy()), model(X))
    model.warmup(X, n=2)
    with pytest.raises(ValueError, match=r"inputs must be 1 \(image\), got 2"):
        model(X, X)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        model.warmup(X, n=0)


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, y):
        out = self.linear(x + y)
        return {"out": out, "best": out.argmax(1)}


@pytest.mark.filterwarnings("error")
def test_several_inputs_and_outputs(tmp_path):
    model = Two()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    path = export_onnx(model, (a, b), str(tmp_path / "m.onnx"), opset_version=20, optimize=False)
    out, best = ONNXModel(path)(a, b)
    expected = model(a, b)
    assert torch.allclose(out, expected["out"], atol=1e-5)
    assert torch.equal(best, expected["best"])


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_scalar_output(tmp_path, dynamic_batch):
    path = export_onnx(Mean(), torch.ones(2, 3), tmp_path / "m.onnx", dynamic_batch=dynamic_batch)
    out = ONNXModel(path)(torch.full((2, 3), 5.0))
    assert (out.shape, out.item()) == ((), 5.0)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) * 2


def test_a_fixed_batch(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="dynamic_batch must be False for a model that does not run on a batch of 3"):
        export_onnx(Fixed(), torch.randn(2, 3), path)
    assert list(tmp_path.iterdir()) == []
    export_onnx(Fixed(), torch.randn(2, 3), path, dynamic_batch=False)
    assert ONNXModel(path)(torch.ones(2, 3)).tolist() == [[2.0] * 3] * 2


class OtherForTwo(nn.Module):
    """Runs on any batch, and computes another thing for two."""

    def forward(self, x):
        return x if x.shape[0] == 2 else -x


def test_a_batch_size_that_decides_is_noticed(tmp_path):
    with pytest.raises(
        ValueError, match="dynamic_batch must be False for a model that depends on its batch size: inputs must be"
    ):
        export_onnx(OtherForTwo(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_is_not_left_behind(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("an older file")
    with pytest.raises(ValueError, match=r"the ONNX file must agree with the model to 0\.0001 of the outputs' scale"):
        export_onnx(Counting(), torch.randn(2, 3), path, dynamic_batch=False)
    assert path.read_text() == "an older file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_cannot_be_exported_is_named_and_keeps_its_mode(tmp_path):
    model = Branching(nn.Identity())
    with pytest.raises(ValueError, match="model must be exportable to ONNX, got an error"):
        export_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_large_weights_go_into_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SINGLE_FILE", 1000)
    model = nn.Linear(64, 64)
    path = export_onnx(model, torch.randn(2, 64), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert verify_onnx(model, path, torch.randn(5, 64))


def test_an_operator_version_that_is_not_reached_is_named(tmp_path, monkeypatch):
    write = exporting._write
    monkeypatch.setattr(exporting, "_write", lambda *args, **options: write(*args, **options | {"opset_version": 18}))
    with pytest.raises(
        ValueError, match="opset_version must be one that the exporter reaches for this model, got 19; it wrote 18"
    ):
        export_onnx(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "m.onnx", opset_version=19)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (X, {"quantize": True}, "quantize must be False, got True: quantisation is not part of this library"),
        (X, {"opset_version": 0}, "opset_version must be at least 1, got 0"),
        (torch.randn(2, 5, 8, 8), {}, "sample must be arguments that the model runs on, got an error"),
        ((X, X[:1]), {}, "sample must be arguments that the model runs on"),
    ],
)
def test_bad_arguments_are_named(sample, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(small_net(), sample, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_without_one_batch_size_is_named(tmp_path):
    class Broadcast(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(
        ValueError, match=r"sample must have one batch size in dimension 0, got 1, 2; or pass dynamic_batch=False"
    ):
        export_onnx(Broadcast(), (torch.randn(2, 3), torch.randn(1, 3)), tmp_path / "m.onnx")


def test_names_are_lists(tmp_path):
    with pytest.raises(TypeError, match="input_names and output_names must be lists of names, got 'image'"):
        export_onnx(nn.ReLU(), X, tmp_path / "m.onnx", input_names="image")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"path must be an ONNX file, got '.*none.onnx'"):
        ONNXModel(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"path must be an ONNX file that onnxruntime reads, got '.*bad\.onnx'"):
        ONNXModel(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        ONNXModel(tmp_path / "bad.onnx", device="tpu")


def test_a_device_that_onnxruntime_has_not_got_is_named(exported, monkeypatch):
    runtime = importlib.import_module("onnxruntime")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="device must be one that onnxruntime was built for, got 'cuda'"):
        ONNXModel(exported[1], device="cuda")
