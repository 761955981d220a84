"""The whole way: sparsify channels in a training, hold them, take them out, train on, fold the batch norms, export."""

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401 - gives the Learner its no_bar
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from sklearn.datasets import load_digits
from torch import nn

from fasterai.export.all import ONNXModel, export_onnx
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import PruneCallback, agp, load_small, remove, save_small
from fasterai.sparse.all import HoldCallback, SparsifyCallback, large_final, one_cycle


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def build() -> nn.Sequential:
    return nn.Sequential(block(1, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def test_from_a_dense_network_to_a_small_one_in_onnx(tmp_path):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    pairs = list(zip(images, torch.tensor(digits.target), strict=True))
    model = build()
    learn = Learner(DataLoaders.from_dsets(pairs[:512], pairs[512:576], bs=64), model, loss_func=nn.CrossEntropyLoss(), lr=1e-2)

    with learn.no_bar(), learn.no_logging():
        callback = SparsifyCallback(0.5, "filter", "local", large_final, one_cycle)
        learn.fit(2, cbs=callback)
        learn.fit(1, cbs=HoldCallback(callback.sparsifier))
        masked = model.eval()(images[:50]).detach()

        removal = remove(model, images[:4], optimizer=learn.opt)
        assert removal.removed == {"0.0.weight": (8, 4), "1.0.weight": (16, 8)}
        assert removal.parameters == (8 * 9 + 8 * 3 + 16 * 72 + 16 * 3 + 170, 4 * 9 + 4 * 3 + 8 * 36 + 8 * 3 + 90)
        assert (model(images[:50]) - masked).abs().max() <= 1e-5 * masked.abs().max(), "nothing moves at the removal"

        weights = model[0][0].weight.detach().clone()
        learn.fit(1)
        assert not torch.equal(model[0][0].weight, weights), "the same optimizer trains what is left"

    model.eval()
    save_small(tmp_path / "small.safetensors", model)
    assert torch.equal(load_small(tmp_path / "small.safetensors", build()).eval()(images), model(images))

    folded = BN_Folder().fold(model, images[:4])
    assert torch.allclose(folded(images), model(images), atol=1e-4)
    pytest.importorskip("onnxruntime")
    export_onnx(folded, images[:4], tmp_path / "small.onnx")
    exported = np.asarray(ONNXModel(tmp_path / "small.onnx")(images[:7]))
    assert np.abs(exported - folded(images[:7]).detach().numpy()).max() <= 1e-4


def test_coupled_channels_all_the_way_to_onnx(tmp_path):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    pairs = list(zip(images, torch.tensor(digits.target), strict=True))
    model = build()
    learn = Learner(DataLoaders.from_dsets(pairs[:512], pairs[512:576], bs=64), model, loss_func=nn.CrossEntropyLoss(), lr=1e-2)

    with learn.no_bar(), learn.no_logging():
        callback = SparsifyCallback(0.5, "coupled", "local", large_final, one_cycle)
        learn.fit_one_cycle(2, 1e-2, cbs=callback)
        learn.fit(1, cbs=HoldCallback(callback.sparsifier))
        masked = model.eval()(images[:50]).detach()

        removal = remove(learn.model, images[:4])  # the learner's optimizer is known
        assert removal.removed == {"0.0.weight": (8, 4), "1.0.weight": (16, 8)}
        assert removal.parameters == (size(8, 16), size(4, 8))
        assert (model(images[:50]) - masked).abs().max() <= 1e-5 * masked.abs().max(), "nothing moves at the removal"

        learn.fit_one_cycle(2, 1e-2, cbs=PruneCallback(0.5, agp, "local", large_final))
        assert (model[0][0].out_channels, model[1][0].out_channels) == (2, 4)
        assert sum(p.numel() for p in model.parameters()) == size(2, 4)
        learn.fit(1)

    model.eval()
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", build()).eval()
    assert torch.equal(loaded(images), model(images))

    folded = BN_Folder().fold(loaded, images[:4])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = model(images[:50]).detach()
    assert (folded(images[:50]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(folded, images[:4], tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {session.get_inputs()[0].name: images[:50].numpy()})
    assert np.abs(exported - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


def size(first: int, second: int) -> int:
    """The parameters of `build` with those widths."""
    return (9 + 1 + 2) * first + (9 * first + 1 + 2) * second + 10 * second + 10
