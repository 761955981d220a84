"""Small models in files: the same numbers after loading, and clear errors for everything else."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small
from tests.networks import short_mobilenet

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return short_mobilenet().eval()


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


class Pool(nn.Module):
    """Its numbers are attributes only; `steps` and `loss` are a training's, `p` one that eval mode does not read."""

    def __init__(self, size: int = 2):
        super().__init__()
        self.size, self.loss, self.p = size, math.nan, 0.5

    def forward(self, x):
        return nn.functional.max_pool2d(x, self.size)


class Small(nn.Module):
    def __init__(self, channels: int = 16, stride: int = 2, classes: int = 4, size: int = 2, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.steps = 0
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, stride), nn.BatchNorm2d(channels), act(), Pool(size))
        self.more = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.more(self.features(x)))


def small_in_a_file(path, **options) -> nn.Module:
    model = Small(**options).eval()
    Pruner(model, 0.5, "local", "large_final", example_inputs=IMAGES, round_to=1).prune_model(measure=False)
    assert (model.features[0].out_channels, model.more[0].out_channels) == (8, 4)
    save_small(path, model)
    return model


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"classes": 9}, r"head\.weight is \(9, 8\) here and \(4, 8\) in the file, cut to \(4, 4\)"),
        (
            {"channels": 24},
            r"features\.0\.weight is \(24, 3, 3, 3\) here and \(16, 3, 3, 3\) in the file, cut to \(8, 3, 3, 3\)",
        ),
        ({"channels": 6}, r"features\.0\.weight is \(6, 3, 3, 3\) here and \(16, 3, 3, 3\) in the file"),
        ({"stride": 1}, r"got one where features\.0\.stride is \[1, 1\] here and \[2, 2\] in the file"),
        ({"act": nn.GELU}, r"got one where features\.2 is a GELU here and a ReLU in the file"),
        ({"size": 3}, r"got one where features\.3\.size is 3 here and 2 in the file"),
    ],
)
def test_a_network_that_was_built_otherwise_is_refused_and_stays_as_it_was(options, difference, tmp_path):
    small_in_a_file(tmp_path / "small.safetensors")
    other = Small(**options).eval()
    tensors, outputs = {n: t.clone() for n, t in other.state_dict().items()}, other(IMAGES)
    with pytest.raises(ValueError, match=f"model must be the dense model .*{difference}"):
        load_small(tmp_path / "small.safetensors", other)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in tensors.items())
    assert torch.equal(other(IMAGES), outputs)


def test_modules_more_or_less_are_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path, nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"got one where 1 is not in it$"):
        load_small(path, nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"got one where 2 is not in the file$"):
        load_small(path, nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.ReLU()))


def test_attention_with_another_number_of_heads_is_refused(tmp_path):
    x = torch.randn(2, 5, 8)
    small = Attending(False).eval()
    Pruner(small, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model(measure=False)
    save_small(tmp_path / "small.safetensors", small)
    other = Attending(False)
    other.a = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"a\.head_dim is 4 here and 2 in the file"):
        load_small(tmp_path / "small.safetensors", other)
    assert isinstance(other.a, nn.MultiheadAttention)


def test_a_dense_model_does_not_load_into_a_larger_one(tmp_path):
    save_small(tmp_path / "whole.safetensors", nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"got one where weight is \(3, 8\) here and \(3, 4\) in the file$"):
        load_small(tmp_path / "whole.safetensors", nn.Linear(8, 3))


def test_what_a_training_leaves_on_the_modules_is_no_difference(tmp_path):
    path = tmp_path / "small.safetensors"
    model = small_in_a_file(path)
    model.steps, model.features[3].p, model.features[1].momentum, model.note = 100, 0.0, 0.2, "mine"
    save_small(path, model)
    assert torch.equal(load_small(path, Small().eval())(IMAGES), model(IMAGES))


def test_a_small_model_is_loaded_again_saved_again_and_knows_what_it_came_from(tmp_path):
    path = tmp_path / "small.safetensors"
    model = small_in_a_file(path)
    assert load_small(path, model) is model
    save_small(path, load_small(path, Small()))
    assert torch.equal(load_small(path, Small().eval())(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match=r"head\.weight is \(9, 8\) here and \(4, 8\) in the file, cut to \(4, 4\)"):
        load_small(path, Small(classes=9))


def test_a_head_that_was_put_on_later_fits_a_dense_one(tmp_path):
    path = tmp_path / "small.safetensors"
    model = small_in_a_file(path)
    model.head = nn.Linear(4, 7)
    save_small(path, model)
    assert torch.equal(load_small(path, Small(classes=7).eval())(IMAGES), model(IMAGES))


def test_a_file_from_before_the_shapes_and_classes_were_kept_loads(tmp_path):
    path = tmp_path / "small.safetensors"
    model = small_in_a_file(path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert json.loads(header["dense"])["head.weight"] == [4, 8]
    save_file(tensors, path, {key: header[key] for key in ("format", "sizes", "slim")})
    assert torch.equal(load_small(path, Small().eval())(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match=r"features\.0\.weight is \(6, 3, 3, 3\) here and \(8, 3, 3, 3\) in the file;"):
        load_small(path, Small(channels=6))


def test_the_width_of_a_turned_linear_layer_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, attn_pdrop=0.0)
    ids = torch.arange(14).reshape(2, 7)

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = transformers.GPT2Model(config)

        def forward(self, ids):
            return self.body(ids)[0]

    model = Language().eval()
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=ids, round_to=1).prune_model(measure=False)
    assert removal.removed["body.h.0.mlp.c_fc.weight"] == (128, 64)
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", Language().eval())
    assert loaded.body.h[0].mlp.c_fc.nf == 64
    assert torch.equal(loaded(ids), model(ids))


def test_what_a_file_says_of_the_dense_shapes_goes_on_in_a_model_that_was_built_small(tmp_path):
    path, x = tmp_path / "small.safetensors", torch.randn(2, 3)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    Pruner(model, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model(measure=False)
    save_small(path, model)
    save_small(path, load_small(path, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))
    assert torch.equal(load_small(path, nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))(x), model(x))


class Noting(nn.Module):
    """Notes the sizes that it meets, as detectors do, and is told one."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride, self.scales, self.layer = stride, None, nn.Linear(4, 6)

    def forward(self, x):
        self.scales = [x.shape[0] / 8]
        return self.layer(x)


def test_what_a_run_notes_stops_no_load_and_what_was_told_does(tmp_path):
    nets = [nn.Sequential(Noting(stride), nn.ReLU(), nn.Linear(6, 2)) for stride in (2, 2, 3)]
    for n, net in enumerate(nets):
        net(torch.randn(n + 1, 4))
    save_small(tmp_path / "small.safetensors", nets[0])
    assert load_small(tmp_path / "small.safetensors", nets[1])[0].scales == [2 / 8]
    with pytest.raises(ValueError, match=r"0.stride is 3 here and 2 in the file$"):
        load_small(tmp_path / "small.safetensors", nets[2])
