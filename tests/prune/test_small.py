"""Small models in files: the same numbers after loading, and clear errors for everything else."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2

from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
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


def test_a_model_that_lost_nothing_is_saved_as_well_and_loads_into_its_like(tmp_path):
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    save_small(tmp_path / "whole.safetensors", model)
    assert load_small(tmp_path / "whole.safetensors", other) is other
    assert torch.equal(other.weight, model.weight)


def test_what_cannot_be_saved_is_refused_and_no_file_is_left(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3 \(int\)"):
        save_small(tmp_path / "small.safetensors", 3)
    with pytest.raises(ValueError, match=r"model must hold its weights, got weight on the meta device"):
        save_small(tmp_path / "small.safetensors", nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match=r"model must be initialised, got weight without a shape"):
        save_small(tmp_path / "small.safetensors", nn.LazyLinear(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, length):
    path = tmp_path / "small.safetensors"
    save_small(path, nn.Linear(4, 3))
    path.write_bytes(path.read_bytes()[:length])
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"path must be a file that save_small wrote, got .*small\.safetensors"):
        load_small(path, model)
    assert torch.equal(model.weight, before)


class Attending(nn.Module):
    """Attention, or something else with parameters of the same names."""

    def __init__(self, is_own):
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True)
        if is_own:
            parameters = self.a._parameters
            self.a = nn.Module()
            self.a._parameters.update(parameters)
            self.a.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0]


def test_a_model_without_the_modules_of_the_file_is_refused_before_anything_changes(tmp_path):
    x = torch.randn(2, 5, 8)
    small = Attending(False).eval()
    Pruner(small, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model()
    assert small.a.num_heads == 2
    save_small(tmp_path / "small.safetensors", small)
    other = Attending(True)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"model must be the dense model .*a is no nn\.MultiheadAttention; a has no num_heads"):
        load_small(tmp_path / "small.safetensors", other)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in before.items())
    assert other.a.out_proj.in_features == 8


def test_a_wrapped_model_is_not_loaded_into(tmp_path):
    save_small(tmp_path / "small.safetensors", nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"model must be the bare network, got torch\.compile"):
        load_small(tmp_path / "small.safetensors", torch.compile(nn.Linear(4, 3)))


def test_a_model_whose_norms_made_up_for_what_went_comes_back(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    dense, x = copy.deepcopy(model), torch.randn(4, 5)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[2] = 0
    assert remove(model, x, exact=False).removed == {"0.weight": (8, 7)}
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", dense)
    assert loaded[1].normalized_shape == (7,)
    assert torch.equal(loaded(x), model(x))
