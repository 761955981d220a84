from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fasterai.analyze.cost import cost, file_size


def small_net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


X = torch.zeros(2, 1, 4, 4)


def test_the_figures_of_a_small_net():
    net = small_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
        net[4].weight[:, :64] = 0
    found = cost(net, X)
    assert found.parameters == (8 * 9 + 8) + (8 + 8) + (1280 + 10) == 1386
    assert found.nonzero == 1386 - 640
    assert found.macs == 2 * (8 * 16 * 9 + 128 * 10) == 4864
    # conv, norm and relu return 2*8*4*4 values each, the linear layer 2*10, a flattened view none
    assert found.activation_bytes == 4 * (3 * 256 + 20)
    assert found.peak_bytes == 4 * 512
    assert found.weight_bytes == 4 * 1386
    assert found.buffers == 8 + 8 + 1
    assert found.buffer_bytes == 4 * 16 + 8
    assert [(r.name, r.kind, r.parameters, r.nonzero, r.macs, r.output_shape) for r in found.layers] == [
        ("0", "Conv2d", 80, 80, 2304, (2, 8, 4, 4)),
        ("1", "BatchNorm2d", 16, 16, 0, (2, 8, 4, 4)),
        ("2", "ReLU", 0, 0, 0, (2, 8, 4, 4)),
        ("4", "Linear", 1290, 650, 2560, (2, 10)),
    ]


def test_batch_norms_count_are_left_as_they_were():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    cost(net, X)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_the_layers_bytes_and_the_head_make_the_file(tmp_path):
    net = nn.Sequential(*small_net(), nn.Module())
    net[5].register_buffer("held", torch.zeros(3, dtype=torch.float64))
    net[5].register_buffer("not_saved", torch.zeros(9), persistent=False)
    net[5].tied = net[0].weight
    net[5].forward = lambda x: x
    save_file({n: t for n, t in net.state_dict().items() if n != "5.tied"}, tmp_path / "net")
    found = cost(net, X)
    # a batch norm holds four vectors and a count of int64, the tied weight stands in the first layer
    assert {row.name: row.file_bytes for row in found.layers if row.file_bytes} == {
        "0": 4 * 80, "1": 4 * 32 + 8, "4": 4 * 1290, "5": 24
    }  # fmt: skip
    head = 8 + int.from_bytes((tmp_path / "net").read_bytes()[:8], "little")
    assert sum(row.file_bytes for row in found.layers) + head == found.file_bytes == (tmp_path / "net").stat().st_size


def test_inputs_and_random_generators_stay():
    net, x, rng = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout()), torch.tensor([-1.0]), torch.get_rng_state()
    cost(net, x)
    assert x.item() == -1
    cost(nn.Sequential(nn.RReLU()), x)
    assert torch.equal(torch.get_rng_state(), rng)


def test_resnet18_by_arithmetic():
    torchvision = pytest.importorskip("torchvision")
    found = cost(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 224, 224))
    stem = 112 * 112 * 64 * 3 * 49
    block = 56 * 56 * 64 * 64 * 9  # the same in every stage: half the side, twice the channels
    halving = 28 * 28 * 128 * 64 * 9
    shortcut = 28 * 28 * 128 * 64
    assert found.macs == stem + 4 * block + 3 * (halving + 3 * block + shortcut) + 512 * 1000 == 1_814_073_344
    weights = 64 * 3 * 49 + 4 * 64 * 64 * 9 + 512 * 1000 + 1000
    for n in (128, 256, 512):
        weights += n * (n // 2) * 9 + 3 * n * n * 9 + n * (n // 2)
    norms = 2 * (5 * 64 + 5 * (128 + 256 + 512))
    assert found.parameters == weights + norms == 11_689_512
    assert {row.name: row.macs for row in found.layers}["layer2.0.downsample.0"] == shortcut


def test_vgg16_bn_by_arithmetic():
    torchvision = pytest.importorskip("torchvision")
    vgg = torchvision.models.vgg
    convolutions = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    stages = [(32, (3, 64, 64)), (16, (64, 128, 128)), (8, (128, 256, 256, 256)), (4, (256, 512, 512, 512)), (2, (512,) * 4)]
    expected = sum(side * side * 9 * a * b for side, widths in stages for a, b in itertools.pairwise(widths))
    assert cost(convolutions, torch.zeros(1, 3, 32, 32)).macs == expected == 313_196_544


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_shared_parameters_count_once():
    found = cost(Tied(), torch.tensor([1, 2]))
    assert (found.parameters, found.weight_bytes, found.macs) == (15, 60, 2 * 15)
    assert {row.name: row.parameters for row in found.layers} == {"embedding": 15, "head": 0}


def test_a_batch_counts_whole():
    assert cost(nn.Linear(4, 3), torch.zeros(8, 4)).macs == 8 * cost(nn.Linear(4, 3), torch.zeros(1, 4)).macs == 96


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a @ b


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs(kind):
    assert cost(TwoInputs(), kind([torch.zeros(2, 3), torch.zeros(3, 4)])).macs == 24


def test_what_runs_outside_of_modules_stands_in_the_models_own_row():
    (row,) = cost(TwoInputs(), (torch.zeros(2, 3), torch.zeros(3, 4))).layers
    assert (row.name, row.kind, row.macs) == ("", "TwoInputs", 24)
    assert "(model)" in str(cost(TwoInputs(), (torch.zeros(2, 3), torch.zeros(3, 4))))


def test_wrapped_models_go_by_their_own_names():
    compiled = torch.compile(small_net())
    assert [row.name for row in cost(compiled, X).layers] == ["0", "1", "2", "4"]
    assert cost(nn.DataParallel(small_net()), X).macs == 4864


def overlapping():
    net, both = nn.Linear(3, 2), torch.arange(6.0)
    net.register_buffer("all", both)
    net.register_buffer("part", both[:3])
    net.register_buffer("as_matrix", both.view(2, 3))
    net.register_buffer("passing", torch.zeros(9), persistent=False)
    return net


FILES = {
    "linear": lambda: nn.Linear(4, 3),
    "net with buffers": small_net,
    "half precision": lambda: small_net().half(),
    "channels last": lambda: small_net().to(memory_format=torch.channels_last),
    "transposed weight": lambda: nn.Linear(4, 3).apply(lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(4, 3).t()))),
    "no tensors": nn.ReLU,
    "empty tensors": lambda: nn.ParameterList([torch.zeros(0, 3), torch.zeros(0, 3)]),
}


@pytest.mark.parametrize("case", FILES)
def test_the_file_size_is_that_of_the_file(case, tmp_path):
    model = FILES[case]()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "weights.safetensors")
    assert file_size(model) == (tmp_path / "weights.safetensors").stat().st_size


def test_the_file_has_tied_weights_once(tmp_path):
    tied = Tied()
    save_file({"embedding.weight": tied.embedding.weight}, tmp_path / "weights.safetensors")
    assert file_size(tied) == (tmp_path / "weights.safetensors").stat().st_size


def test_tensors_that_share_part_of_their_memory_are_each_stored(tmp_path):
    model = overlapping()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(state) == ["weight", "bias", "all", "part", "as_matrix"]
    save_file(state, tmp_path / "weights.safetensors")
    assert file_size(model) == (tmp_path / "weights.safetensors").stat().st_size


def test_a_mask_changes_the_nonzeros_alone():
    net = small_net()
    dense = cost(net, X)
    with torch.no_grad():
        net[0].weight[:4] = 0
    masked = cost(net, X)
    assert dense.nonzero - masked.nonzero == 36
    same = ("parameters", "macs", "activation_bytes", "peak_bytes", "file_bytes", "weight_bytes")
    assert all(getattr(dense, field) == getattr(masked, field) for field in same)


def test_it_is_plain_data():
    found = cost(small_net(), X)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["macs"] == 4864
    assert read["layers"][0]["output_shape"] == [2, 8, 4, 4]
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AttributeError):
        found.macs = 0


def test_the_table_has_layers_and_the_whole():
    lines = str(cost(small_net(), X)).splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "non-zero", "MACs", "file", "activations"]
    assert lines[2].split()[:4] == ["0", "Conv2d", "2x8x4x4", "80"]
    assert lines[2].split()[6:] == ["320", "B", "1", "KiB"]
    (whole,) = [line for line in lines if line.startswith("whole model")]
    assert whole.split()[2] == "1,386" and whole.split()[4] == "4,864"
    assert lines[-2].startswith("weights 5.41 KiB, buffers 72 B, file ")
    assert lines[-2].endswith("activations at most 2 KiB at once")
    assert lines[-1] == "MACs and activations of 2 samples"
    assert cost(nn.Linear(2, 2), torch.zeros(1, 2)).batch_size == 1
    torchvision = pytest.importorskip("torchvision")
    deformed = cost(torchvision.ops.DeformConv2d(2, 3, 3), (torch.zeros(1, 2, 5, 5), torch.zeros(1, 18, 3, 3)))
    assert str(deformed).endswith("not counted, without a rule: torchvision::deform_conv2d")


def test_the_picture_shows_shares():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert cost(small_net(), X).plot(ax) is ax
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([2304 / 4864, 80 / 1386, 0, 16 / 1386, 2560 / 4864, 1290 / 1386])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "4"]
    plt.close(figure)
    many = nn.Sequential(
        *[nn.Linear(4, 4 + i // 30) if i == 30 else nn.Linear(4, 4) for i in range(31)], *[nn.Linear(5, 5)] * 30
    )
    ax = cost(many, torch.zeros(1, 4)).plot()
    assert len(ax.patches) == 2 * 32  # a module that stands in many places is one
    plt.close("all")


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential()])
def test_a_model_that_costs_nothing(model):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = cost(model, torch.zeros(2))
    assert (found.parameters, found.macs, found.layers) == (0, 0, ())
    assert "whole model" in str(found)
    found.plot()
    plt.close("all")


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"example_inputs must be arguments that the model runs on, got an error: .*shapes"):
        cost(nn.Linear(4, 3), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        cost(3, torch.zeros(1))
    with pytest.raises(ValueError, match="model must be initialised, got weight"):
        cost(nn.LazyLinear(3), torch.zeros(1, 4))
