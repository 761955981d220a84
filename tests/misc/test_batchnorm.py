"""Folding is exact, changes nothing but what it folds, and says what it left alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.misc import batchnorm
from fasterai.misc.batchnorm import BN_Folder, FoldReport, find_folds, fold_batchnorms


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts as after training, none of them 0 or 1; in eval mode."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            if norm.running_mean is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1.5, 1.5)
                nn.init.normal_(norm.bias)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def relative_difference(a, b) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def test_weights_by_hand():
    conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1.0)
    conv.weight.data = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    conv.bias.data = torch.tensor([1.0, 0.0])
    norm.weight.data, norm.bias.data = torch.tensor([3.0, 0.5]), torch.tensor([0.5, 1.0])
    norm.running_mean, norm.running_var = torch.tensor([2.0, 4.0]), torch.tensor([3.0, 0.0])
    folded = fold_batchnorms(nn.Sequential(conv, norm), torch.randn(2, 1, 3, 3))
    # sqrt(var + eps) is 2 and 1: scales 3/2 and 1/2; shifts (1 - 2) 3/2 + 1/2 and (0 - 4) 1/2 + 1
    assert folded[0].weight.flatten().tolist() == [3.0, -0.5]
    assert folded[0].bias.tolist() == [-1.0, -1.0]
    assert isinstance(folded[1], nn.Identity)


KINDS = {
    "Conv1d": (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), (3, 9)),
    "Conv2d": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (3, 9, 7)),
    "Conv3d": (nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), (3, 5, 6, 7)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 8, 3), nn.BatchNorm1d(8), (3, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), (3, 5, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 8, 2), nn.BatchNorm3d(8), (3, 3, 4, 5)),
    "Linear": (nn.Linear(3, 8), nn.BatchNorm1d(8), (3,)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (6, 9, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (4, 9, 7)),
    "grouped transposed": (nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (6, 5, 4)),
    "transposed, in = out": (nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), (4, 5, 4)),
    "no bias": (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), (3, 9, 7)),
    "linear, no bias": (nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), (3,)),
    "not affine": (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), (3, 9, 7)),
    "large eps": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1), (3, 9, 7)),
    "reflected": (nn.Conv2d(3, 8, 3, padding=2, padding_mode="reflect", dilation=2), nn.BatchNorm2d(8), (3, 9, 7)),
    "same": (nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), (3, 9, 7)),
    "synchronised": (nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), (3, 9, 7)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_kind_of_layer_folds(kind, dtype, tolerance):
    layer, norm, shape = KINDS[kind]
    model = trained(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())).to(dtype)
    inputs, other = torch.randn(4, *shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype)
    folded = fold_batchnorms(model, inputs)
    assert norms(folded) == 0
    assert relative_difference(model(other), folded(other)) <= tolerance
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_every_layer_class_has_a_case():
    classes = {name for name in nn.modules.conv.__all__ if not name.startswith("Lazy")} | {"Linear"}
    assert classes <= KINDS.keys()


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [("resnet18", 32, 0), ("mobilenet_v2", 32, 0), ("shufflenet_v2_x0_5", 64, 0), ("densenet121", 32, 62)],
)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_torchvision_networks(name, size, left, with_inputs):
    model = trained(getattr(torchvision.models, name)(weights=None))
    inputs = torch.randn(2, 3, size, size)
    count = norms(model)
    folder = BN_Folder()
    folded = folder.fold(model, inputs if with_inputs else None)
    # A dense layer is [norm, relu, conv 1x1, norm, relu, conv 3x3]: its first norm reads a concatenation and stays.
    assert norms(folded) == len(folder.report.left) == left
    assert len(folder.report.folded) == count - left
    assert relative_difference(model(inputs), folded(inputs)) <= 1e-5


class Net(nn.Module):
    """Layers a and b of 3 channels and norms p and q, called by the function given."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.p, self.q = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.order = forward

    def forward(self, x):
        return self.order(self, x)


def keep(self, x):
    self.kept = y = self.a(x)
    return self.p(y)


INPUTS = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def test_registration_order_does_not_matter():
    """D-M1: a, b, p, q registered; b comes before p and a before q."""
    model = trained(Net(lambda self, x: self.q(self.a(self.p(self.b(x)).relu()))))
    report = find_folds(model, INPUTS)
    assert report == FoldReport(folded={"p": "b", "q": "a"}, left={})
    folded = fold_batchnorms(model, INPUTS)
    assert relative_difference(model(INPUTS), folded(INPUTS)) <= 1e-5
    assert isinstance(folded.p, nn.Identity)
    assert isinstance(folded.q, nn.Identity)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Deaf(nn.Conv2d):
    """Reads no bias, whether there is one or not."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def with_hook(module):
    module.register_forward_hook(lambda *_: None)
    return module


def tied():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    return {"a": first, "b": second}


def shared_scale():
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    second.weight = first.weight
    return {"p": first, "q": second}


def one_norm(self, x):
    return self.p(self.a(x))


NOT_EXACT = {
    "relu between": (lambda self, x: self.p(self.a(x).relu()), {}, "p", "the output of relu"),
    "relu in place between": (lambda self, x: self.p(self.a(x).relu_()), {}, "p", "the output of relu_"),
    "output used twice": (lambda self, x: self.p(y := self.a(x)) + y, {}, "p", "a has its output read by add as well"),
    "output used without a gradient": (
        lambda self, x: self.p(y := self.a(x)) * (y.detach() > 0),
        {},
        "p",
        "a has its output read by detach",
    ),
    "two norms on one": (
        lambda self, x: self.p(y := self.a(x)) + self.q(y),
        {},
        "q",
        "a has its output read by two batch norms",
    ),
    "output returned": (lambda self, x: (self.p(y := self.a(x)), y), {}, "p", "a has its output read by an output"),
    "output kept": (keep, {}, "p", "a has its output read by .* the model keeps"),
    "layer called twice": (lambda self, x: self.a(self.p(self.a(x))), {}, "p", "a is called 2 times"),
    "norm called twice": (lambda self, x: self.p(self.b(self.p(self.a(x)))), {}, "p", "it is called 2 times"),
    "norm first": (lambda self, x: self.a(self.p(x).relu()), {}, "p", "an input of the model"),
    "not called": (lambda self, x: self.a(x), {}, "p", "called 0 times"),
    "no statistics": (one_norm, {"p": nn.BatchNorm2d(3, track_running_stats=False)}, "p", "no running statistics"),
    "weight read elsewhere": (
        lambda self, x: self.p(self.a(x)) * self.a.weight.sum(),
        {},
        "p",
        "a cannot take it: its weight is read elsewhere",
    ),
    "scale read elsewhere": (lambda self, x: self.p(self.a(x)) * self.p.weight.sum(), {}, "p", "its weight is read elsewhere"),
    "statistics read elsewhere": (
        lambda self, x: self.p(self.a(x)) + self.p.running_mean.sum(),
        {},
        "p",
        "its running_mean is read elsewhere",
    ),
    "tied weight": (one_norm, tied(), "p", "a cannot take it: its weight is shared"),
    "shared scale": (one_norm, shared_scale(), "p", "its weight is shared"),
    "weight worked out": (one_norm, {"a": Standardised(3, 3, 1)}, "p", "weight of its own"),
    "parametrised": (one_norm, {"a": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))}, "p", "weight of its own"),
    "reads no bias": (one_norm, {"a": Deaf(3, 3, 1, bias=False)}, "p", "a is a Deaf without bias"),
    "ignores its bias": (one_norm, {"a": Deaf(3, 3, 1)}, "p", "weight of its own"),
    "norm that does more": (one_norm, {"p": Activated(3)}, "p", "a Activated may compute more"),
    "hook on the norm": (one_norm, {"p": with_hook(nn.BatchNorm2d(3))}, "p", "it has hooks"),
    "hook on the layer": (one_norm, {"a": with_hook(nn.Conv2d(3, 3, 1))}, "p", "a has hooks"),
    "functional norm": (
        lambda self, x: F.batch_norm(self.a(x), self.p.running_mean, self.p.running_var),
        {},
        "p",
        "called 0 times",
    ),
}


@pytest.mark.parametrize("case", NOT_EXACT)
@pytest.mark.filterwarnings("ignore:no batch norm")
def test_what_cannot_be_folded_exactly_is_left_alone(case):
    forward, modules, norm, why = NOT_EXACT[case]
    model = trained(Net(forward, **modules))
    folder = BN_Folder()
    folded = folder.fold(model, INPUTS)
    assert folder.report.folded == {}
    assert re.search(why, folder.report.left[norm])
    assert norms(folded) == 2
    before, after = model(INPUTS), folded(INPUTS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_features_of_a_linear_layer_in_another_dimension_are_left_alone():
    """(N, L, C) with L = C: the norm reads dimension 1, the layer writes dimension 2."""
    model = trained(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    report = find_folds(model, torch.randn(4, 5, 5))
    assert report.left == {"1": "0 has an output of 3 dimensions, whose dimension 1 is not that of its features"}
    assert find_folds(model, torch.randn(4, 5)).folded == {"1": "0"}


def test_an_unbatched_convolution_is_left_alone():
    """(C, H, W) without a batch: BatchNorm1d takes H, here as large as C, for the channels."""
    model = trained(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm1d(4)))
    assert find_folds(model, torch.randn(2, 4, 4)).folded == {}


def test_a_missing_child_and_a_second_name_are_no_obstacle():
    """D-M1: a child that is None; and a norm that goes by two names."""
    model = trained(Net(one_norm, downsample=None))
    model.alias = model.p
    folded = fold_batchnorms(model, INPUTS)
    assert folded.downsample is None
    assert isinstance(folded.p, nn.Identity)
    assert folded.alias is folded.p
    assert relative_difference(model(INPUTS), folded(INPUTS)) <= 1e-5


@pytest.mark.parametrize("with_inputs", [True, False])
def test_the_given_model_stays_as_it_is(with_inputs):
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())).train()
    model[0].eval()
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    weight, generator = model[0].weight, torch.get_rng_state()
    fold_batchnorms(model, INPUTS if with_inputs else None)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model[0].weight is weight
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_forward_pass_that_counts_is_not_run_on_the_given_model():
    def count(self, x):
        self.calls += 1
        self.buffer += 1
        return self.p(self.a(x))

    model = trained(Net(count))
    model.calls = 0
    model.register_buffer("buffer", torch.zeros(()))
    folded = fold_batchnorms(model, INPUTS)
    assert (model.calls, model.buffer.item()) == (0, 0)
    assert (folded.calls, folded.buffer.item()) == (0, 0)


def test_modes_frozen_parameters_and_formats_are_kept():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    model[0].weight.mark = "theirs"
    folded = fold_batchnorms(model, INPUTS)
    assert [m.training for m in folded] == [True, False, True, True]
    assert {n: p.requires_grad for n, p in folded.named_parameters()} == {
        "0.weight": False,
        "0.bias": True,
        "2.weight": True,
        "2.bias": False,
    }
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.is_contiguous()
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_the_folded_model_trains():
    folded = fold_batchnorms(trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))), INPUTS)
    folded(INPUTS).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in folded.parameters())


def test_wrapped_models_are_folded_inside():
    inner = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for wrapped in (nn.DataParallel(inner), torch.compile(inner)):
        folded = fold_batchnorms(wrapped, INPUTS)
        assert type(folded) is nn.Sequential
        assert relative_difference(inner(INPUTS), folded(INPUTS)) <= 1e-5


def test_several_inputs_and_structured_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, y, scale=2):
            out = self.norm(self.conv(x + y)) * scale
            return {"out": out, "best": out.flatten(1).argmax(1)}

    model = trained(Two())
    folded = fold_batchnorms(model, (INPUTS, INPUTS.flip(0)))
    assert isinstance(folded.norm, nn.Identity)
    assert relative_difference(model(INPUTS, INPUTS)["out"], folded(INPUTS, INPUTS)["out"]) <= 1e-5


def test_half_precision_folds_within_its_own_rounding():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(torch.bfloat16)
    folded = fold_batchnorms(model, INPUTS.to(torch.bfloat16))
    assert folded[0].bias.dtype == torch.bfloat16
    assert relative_difference(model(INPUTS.bfloat16()), folded(INPUTS.bfloat16())) <= 0.05


@pytest.mark.parametrize("inputs", [INPUTS, None])
def test_a_fold_that_moves_the_outputs_is_refused(inputs, monkeypatch):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    state = copy.deepcopy(model.state_dict())
    right = batchnorm._absorb

    def wrong(layer, norm):
        right(layer, norm)
        layer.weight.data *= 1.001

    monkeypatch.setattr(batchnorm, "_absorb", wrong)
    folder = BN_Folder()
    with pytest.raises(
        ValueError,
        match=r"must agree with the model to 1e-05 of the outputs' scale, got a difference of .*nothing was changed",
    ):
        folder.fold(model, inputs)
    assert folder.report == FoldReport()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_whole_number_outputs_must_stay_the_same(monkeypatch):
    class Best(nn.Sequential):
        def forward(self, x):
            return super().forward(x).flatten(1).argmax(1)

    model = trained(Best(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert norms(fold_batchnorms(model, INPUTS)) == 0
    monkeypatch.setattr(batchnorm, "_absorb", lambda layer, norm: nn.init.normal_(layer.weight))
    with pytest.raises(
        ValueError, match=r"the folded model must agree with the model exactly, got a difference of .*nothing was changed"
    ):
        fold_batchnorms(model, INPUTS)


def test_statistics_that_are_not_numbers_are_refused():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var[0] = float("nan")
    for inputs in (INPUTS, None):
        with pytest.raises(ValueError, match="got a difference of nan"):
            fold_batchnorms(model, inputs)


def test_a_model_that_asks_its_norm_is_refused():
    model = trained(Net(lambda self, x: self.p(self.a(x)) / self.p.num_features))
    with pytest.raises(ValueError, match="runs on folded, got an error: 'Identity' object has no attribute 'num_features'"):
        fold_batchnorms(model, INPUTS)


def test_without_inputs_a_forward_pass_that_depends_on_values_needs_them():
    model = trained(Net(lambda self, x: self.p(self.a(x)) if x.sum() > 0 else x))
    with pytest.raises(
        ValueError, match=r"example_inputs must be given .*, got None \(a tensor or tuple that the model runs on"
    ):
        BN_Folder().fold(model)
    assert find_folds(model, INPUTS.abs()).folded == {"p": "a"}


def test_a_model_without_batch_norms_needs_no_inputs():
    model = Net(lambda self, x: self.a(x) if x.sum() > 0 else x, p=nn.ReLU(), q=nn.ReLU())
    folded = fold_batchnorms(model)
    assert folded is not model
    assert torch.equal(folded.a.weight, model.a.weight)


def test_inputs_that_do_not_fit_are_refused():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"example_inputs must be arguments that the model runs on, got an error: .*channels"):
        fold_batchnorms(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 'resnet18'"):
        fold_batchnorms("resnet18", INPUTS)


def test_nothing_to_fold_is_said():
    model = trained(Net(lambda self, x: self.p(self.a(x).relu()), q=nn.Identity()))
    with pytest.warns(UserWarning, match="no batch norm can be folded: p: it reads the output of relu"):
        fold_batchnorms(model, INPUTS)


def test_the_report_reads_as_text():
    model = trained(Net(lambda self, x: self.q(self.p(self.b(x)).relu())))
    assert str(find_folds(model, INPUTS)).splitlines() == [
        "1 of 2 batch norms fold",
        "p: into b",
        "q: left alone, it reads the output of relu, not that of a convolution or linear layer with a weight of its own",
    ]


def test_precision_switches_are_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with batchnorm._full_precision():
        if hasattr(torch.backends.cudnn, "conv"):
            assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        else:
            assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    model = trained(torchvision.models.resnet18(weights=None)).cuda()
    folded = fold_batchnorms(model, torch.randn(2, 3, 64, 64, device="cuda"))
    assert norms(folded) == 0
    assert {p.device.type for p in folded.parameters()} == {"cuda"}
