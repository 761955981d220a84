"""What must hold where folding and decomposition are known to go wrong, and familiar calls as notebooks have them.

D-M1 is about folding batch norms, D-M3 about the singular value decomposition of linear layers.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.analyze.all import sensitivity
from fasterai.core import criteria
from fasterai.core.all import Criteria
from fasterai.export.all import ONNXModel, export_onnx, verify_onnx
from fasterai.misc.all import BN_Folder, FC_Decomposer
from fasterai.prune.all import PruneCallback, Pruner, Schedule, large_final, one_cycle, one_shot, sched_onecycle
from fasterai.sparse.all import Sparsifier
from tests.networks import Crossed

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def run(model: nn.Module, *inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs)


def unlike_the_default(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales of its norms that a mistake would not hide."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (norm.running_mean, -2, 2),
                (norm.running_var, 0.2, 4),
                (norm.weight, 0.5, 3),
                (norm.bias, -2, 2),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return model.eval()


# --- folding batch norms (D-M1) ----------------------------------------------------------------------------------------


class Between(nn.Module):
    """A convolution, a function, a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(F.relu(self.conv(x)))


class Twice(Between):
    """The convolution's output is read by the norm and by something else."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Dense(nn.Module):
    """As in a DenseNet: norms of concatenations, before convolutions of other widths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)


def with_a_missing_child() -> nn.Module:
    model = Crossed(3)
    model.shortcut = None
    return model


FOLDS = {
    "registered in another order": (partial(Crossed, 3), {"norm1": "conv2", "norm2": "conv1"}),
    "a function between": (Between, {}),
    "an output that is used twice": (Twice, {}),
    "the norm before the convolution": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), {}),
    "norms of concatenations": (Dense, {}),
    "no scale": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), {"1": "0"}),
    "no statistics": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), {}),
    "a child that is None": (with_a_missing_child, {"norm1": "conv2", "norm2": "conv1"}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4)), {"1": "0"}),
    "a linear layer": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.Sigmoid()),
        {"2": "1"},
    ),
}


@pytest.mark.filterwarnings("ignore:no batch norm can be folded")
@pytest.mark.parametrize("name", FOLDS)
def test_batch_norms_fold_into_what_they_alone_read(name):
    """D-M1: they were folded by the order of registration; differences up to 3.4, or a crash."""
    make, folds = FOLDS[name]
    model = unlike_the_default(make())
    expected = run(model, X)
    folder = BN_Folder()
    folded = folder.fold(model, X)
    assert folder.report.folded == folds
    assert (run(folded, X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) - len(folds)
    assert torch.equal(run(model, X), expected)


def test_a_fold_by_hand():
    """D-M1: W gamma / sqrt(var + eps) and (b - mean) gamma / sqrt(var + eps) + beta: 6 x 3 / 2 and (5 - 1) x 3 / 2 + 7."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)).eval()
    with torch.no_grad():
        for tensor, value in zip(
            (model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var),
            (6.0, 5.0, 3.0, 7.0, 1.0, 4.0),
            strict=True,
        ):
            tensor.fill_(value)
    folded = BN_Folder().fold(model)
    assert (folded[0].weight.item(), folded[0].bias.item()) == (9.0, 13.0)


# --- linear layers as two (D-M3) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_the_full_rank_reproduces_the_layer(shape):
    """D-M3, and D-M2's promise for what is in scope: nothing removed is nothing changed."""
    layer, x = nn.Linear(*shape), torch.randn(6, shape[0])
    expected = run(layer, x)
    assert (run(FC_Decomposer().SVD(layer, 0.0), x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(6, 16), (2, 6, 16), (2, 3, 6, 16)])
def test_inputs_of_any_number_of_dimensions(shape):
    """D-M3: sequences failed. A rank of 2 is kept as a rank of 2 of 16."""
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16))
    x = torch.randn(shape)
    halves = FC_Decomposer().decompose(nn.Sequential(layer), 14 / 16)
    assert [tuple(p.shape) for p in halves.parameters()] == [(2, 16), (16, 2), (16,)]
    expected = run(layer, x)
    assert (run(halves, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:no linear layer was decomposed")
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_runs(training):
    """D-M3: its fast path reads the weights of layers that were replaced."""
    model = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True).train(training)
    smaller = FC_Decomposer().decompose(model, 0.75)
    assert smaller(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_a_linear_layer_that_is_the_model():
    """D-M3: it came back as it was. Rank 4 of 16 x 8: 4 x (16 + 8) + 8 parameters."""
    smaller = FC_Decomposer().decompose(nn.Linear(16, 8), 0.5)
    assert sum(p.numel() for p in smaller.parameters()) == 4 * (16 + 8) + 8


def test_a_shared_layer_stays_shared_and_a_frozen_one_frozen():
    """D-M3: both were lost."""
    layer = nn.Linear(16, 16)
    layer.requires_grad_(False)
    smaller = FC_Decomposer().decompose(nn.Sequential(layer, nn.ReLU(), layer), 0.75)
    assert smaller[0] is smaller[2]
    assert sum(p.numel() for p in smaller.parameters()) == 4 * 32 + 16
    assert not any(p.requires_grad for p in smaller.parameters())


def test_a_layer_that_would_not_get_smaller_stays_and_says_so():
    """D-M3: 4160 parameters became 4160. A square of 64 at rank 32 has as many as before."""
    decomposer, model = FC_Decomposer(), nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="no linear layer was decomposed: 0: rank 32 of 64 would not save parameters"):
        same = decomposer.decompose(model, 0.5)
    assert [tuple(p.shape) for p in same.parameters()] == [(64, 64), (64,)]
    assert (decomposer.report.parameters_before, decomposer.report.parameters_after) == (4160, 4160)


# --- familiar calls of pruning -----------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def channels(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_the_star_import_has_what_notebooks_of_pruning_need():
    found: dict = {}
    exec("from fasterai.prune.all import *", found)
    names = "Pruner PruneCallback remove Budget save_small load_small Sparsifier SparsifyCallback HoldCallback Schedule "
    names += "large_final movement agp one_cycle cos one_shot sched_onecycle Criteria Granularities"
    assert [name for name in names.split() if name not in found] == []


@pytest.mark.parametrize(("context", "ratio"), [("local", 0.3), ("global", 0.3)])
def test_pruner_positional(context, ratio):
    """Pattern 14. local: round(2.4) of 8 and round(4.8) of 16 go; global: round(7.2) of 24."""
    model = net()
    pruner = Pruner(model, ratio, context, large_final, one_shot, None, X)
    pruner.prune_model()
    if context == "local":
        assert channels(model) == [6, 11]
    assert sum(channels(model)) == 17
    assert sum(p.numel() for p in model.parameters()) == parameters(*channels(model))
    assert run(model, X).shape == (4, 4)


def parameters(first: int, second: int) -> int:
    """Of `net` with those widths: two convolutions, two norms, the head."""
    return (27 + 1 + 2) * first + (9 * first + 1 + 2) * second + 4 * second + 4


def test_iterative_steps_in_a_loop(capsys):
    """Pattern 14: a fifth of the half of 8, of 16, at each step, rounded: 0.8 1.6 2.4 3.2 4 and 1.6 3.2 4.8 6.4 8."""
    model = net()
    pruner = Pruner(model, 0.5, "local", large_final, example_inputs=X, iterative_steps=5)
    found = []
    for _ in range(5):
        pruner.prune_model(measure=False)
        found.append(channels(model))
    assert found == [[7, 14], [6, 13], [6, 11], [5, 10], [4, 8]]
    pruner.print_sparsity()
    assert capsys.readouterr().out.splitlines() == ["0.weight: 4 of 8 channels", "3.weight: 8 of 16 channels"]
    with pytest.raises(ValueError, match="iterative_steps must be at least the number of calls, got 5 and a further call"):
        pruner.prune_model()


def test_a_schedule_of_ones_own_over_iterative_steps():
    """Pattern 16: the one-cycle's parameters; 1.0 at the end, and never up again. Ten steps, each followed by training."""
    model = net()
    schedule = Schedule(partial(sched_onecycle, α=10, β=4))
    pruner = Pruner(model, 0.5, "local", large_final, schedule=schedule, example_inputs=X, iterative_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(10):
        pruner.prune_model(optimizer, measure=False)
        found.append(channels(model)[1])
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # 8 (1 + e^-6) / (1 + e^(-10 p + 4)) = 0.38 0.95 2.2 4.0 5.9 7.1 7.6 7.9 8.0 8.0
    assert found == [16, 15, 14, 12, 10, 9, 8, 8, 8, 8]


def test_a_dict_of_layers():
    """Pattern 14."""
    model = net()
    Pruner(model, {"3": 0.25}, "local", large_final, example_inputs=X).prune_model()
    assert channels(model) == [8, 12]


def test_ignored_layers_by_module_or_name():
    """Patterns 14 and 16: of the detector's head nothing goes."""
    for ignored in ([0], ["0"]):
        model = net()
        layers = [model[i] if isinstance(i, int) else i for i in ignored]
        Pruner(model, 0.5, "local", large_final, ignored_layers=layers, example_inputs=X).prune_model()
        assert channels(model) == [8, 8]


@pytest.mark.parametrize("criterion", [large_final, criteria.random, Criteria(torch.square), torch.abs])
def test_criteria_are_compared_with_random(criterion):
    """Pattern 14."""
    model = net()
    Pruner(model, 0.5, "local", criterion, example_inputs=X).prune_model()
    assert channels(model) == [4, 8]


def test_the_lowest_go_and_not_random_ones():
    """Pattern 14: the largest four of eight, whose weights are 8 1 7 2 6 3 5 4."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]).view(8, 1, 1, 1))
        model[2].weight.fill_(1.0)
    Pruner(model, 0.5, "local", large_final, example_inputs=X[:, :1]).prune_model()
    assert model[0].weight.flatten().tolist() == [8.0, 7.0, 6.0, 5.0]


def test_prune_callback_positional_and_by_keywords():
    """Pattern 15: the schedule is the second argument."""
    positional = PruneCallback(0.4, one_cycle, "global", large_final)
    by_name = PruneCallback(pruning_ratio=0.4, context="global", criteria=large_final, schedule=one_cycle)
    assert positional.settings.__dict__ == by_name.settings.__dict__
    with pytest.raises(ValueError, match=r"context must be .*got 'large_final'"):
        PruneCallback(0.4, "one_cycle", "large_final", "global")


# --- familiar calls: folding, decomposition, export, sensitivity -------------------------------------------------------


def test_fold_then_decompose():
    """Pattern 22."""
    model = unlike_the_default(net())
    expected = run(model, X)
    folded = BN_Folder().fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert (run(folded, X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    wide = nn.Sequential(folded, nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 48))
    smaller = FC_Decomposer().decompose(wide, 0.75)
    # 48 x 64 at rank 12; 64 x 4 at rank 1.
    assert [tuple(p.shape) for p in smaller[3].parameters()] == [(12, 64), (48, 12), (48,)]
    assert run(smaller, X).shape == (4, 48)


def test_a_small_model_in_onnx(tmp_path):
    """Pattern 23, after pattern 14."""
    pytest.importorskip("onnxruntime")
    model = unlike_the_default(net())
    Pruner(model, 0.5, "local", large_final, example_inputs=X).prune_model(measure=False)
    path = str(tmp_path / "m.onnx")
    export_onnx(model, X, path)
    assert verify_onnx(model, path, X)
    assert torch.allclose(ONNXModel(path)(X[:1]), run(model, X[:1]), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model[8].bias.add_(1.0)
    assert not verify_onnx(model, path, X)


class Rated(nn.Module):
    """Layer `a` matters four times as much as layer `b` when half of it goes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.c = nn.Linear(8, 2, bias=False)
        for layer in (self.a, self.b, self.c):
            nn.init.ones_(layer.weight)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def rating(model: Rated) -> float:
    gone = [float((layer.weight == 0).float().mean()) for layer in (model.a, model.b)]
    return 1.0 - 0.8 * gone[0] - 0.2 * gone[1]


@pytest.mark.filterwarnings("ignore:all scores of")
def test_from_sensitivity_to_targets_to_a_pruner():
    """Pattern 24: at one tolerated drop `b` gives up four times as much: 0.8 x 8 + 0.2 x 8 is half of 16."""
    model = Rated()
    result = sensitivity(model, rating, granularity="row", sparsities=[0.25, 0.5, 0.75], targets=["a", "b"], progress=False)
    targets = result.to_layer_targets(model, target_pct=0.5)
    assert [round(8 * share) for share in targets.values()] == [2, 6]
    sparsified = copy.deepcopy(model)
    sparsifier = Sparsifier(sparsified, "row", "local", large_final, targets=["a", "b"])
    for name, share in targets.items():
        sparsifier.sparsify_layer(sparsified.get_submodule(name), share)
    assert [int((layer.weight == 0).all(1).sum()) for layer in (sparsified.a, sparsified.b)] == [2, 6]
    Pruner(model, targets, "local", large_final, example_inputs=torch.ones(1, 2)).prune_model(measure=False)
    assert (model.a.out_features, model.b.out_features) == (6, 2)


@pytest.mark.filterwarnings("ignore:all scores of")
def test_sensitive_layers_are_ignored():
    """Pattern 24: what may lose less than a third is left alone."""
    model = Rated()
    result = sensitivity(model, rating, granularity="row", sparsities=[0.25, 0.5, 0.75], targets=["a", "b"], progress=False)
    sensitive = [name for name, share in result.to_layer_targets(model).items() if share < 1 / 3]
    assert sensitive == ["a"]
    Pruner(model, 0.5, "local", large_final, ignored_layers=sensitive, example_inputs=torch.ones(1, 2)).prune_model()
    assert (model.a.out_features, model.b.out_features) == (8, 4)
