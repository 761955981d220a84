"""Small models in files: the same numbers after loading, and clear errors for everything else."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2

from fasterai.prune.pruner import Pruner
from fasterai.prune.small import load_small, save_small

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return mobilenet_v2(weights=None, width_mult=0.25).eval()


@pytest.mark.parametrize("build", [transformer, convolutional])
def test_a_small_model_comes_back_bit_for_bit(build, tmp_path):
    model = build()
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=IMAGES).prune_model()
    assert removal.parameters[1] < removal.parameters[0]
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", build())
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert sum(p.numel() for p in loaded.parameters()) == removal.parameters[1]
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_it_goes_on_shrinking_after_loading(tmp_path):
    model = transformer()
    Pruner(model, 0.25, "local", "large_final", example_inputs=IMAGES).prune_model()
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", transformer())
    removal = Pruner(loaded, 1 / 3, "local", "large_final", example_inputs=IMAGES).prune_model()
    assert removal.removed["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] == (3, 2)
    assert not removal.refused


def test_another_model_is_refused_and_stays_as_it_was(tmp_path):
    save_small(tmp_path / "small.safetensors", nn.Linear(4, 3))
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight is \(2, 4\) here and \(3, 4\) in the file"):
        load_small(tmp_path / "small.safetensors", model)
    assert torch.equal(model.weight, before)
    with pytest.raises(ValueError, match=r"model must be the dense model .* bias is not in it"):
        load_small(tmp_path / "small.safetensors", nn.Linear(4, 3, bias=False))


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path, nn.Linear(4, 3))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"path must be a file that save_small wrote, got .*small.safetensors"):
        load_small(path, nn.Linear(4, 3))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 4)}, path)
    with pytest.raises(ValueError, match=r"path must be a file that save_small wrote, got .*, which is not one"):
        load_small(path, nn.Linear(4, 3))
