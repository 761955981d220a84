"""Decomposed linear layers are the best of their rank, exact at full rank, and stand only where they save parameters."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.misc.decomposition import DecompositionReport, FC_Decomposer, decompose_linear, factorise_linear


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def low_rank(outs: int, ins: int, rank: int, **options) -> nn.Linear:
    layer = nn.Linear(ins, outs, **options)
    layer.weight.data = torch.randn(outs, rank) @ torch.randn(rank, ins)
    return layer


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_reproduces_the_layer(shape, bias):
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    pair = factorise_linear(layer, 0.0)
    x = torch.randn(7, 3, shape[1])
    assert [tuple(part.weight.shape) for part in pair] == [(min(shape), shape[1]), (shape[0], min(shape))]
    assert (pair(x) - layer(x)).abs().max() <= 1e-6 * layer(x).abs().max()
    assert (pair[1].bias is not None) == bias
    assert pair[0].bias is None


def test_the_truncation_is_numpys():
    layer = nn.Linear(10, 6)
    u, s, vt = np.linalg.svd(layer.weight.detach().double().numpy(), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    pair = factorise_linear(layer, 2 / 3)  # of 6 values 4 go
    np.testing.assert_allclose((pair[1].weight @ pair[0].weight).detach().numpy(), best, atol=1e-6)


@pytest.mark.parametrize(("share", "rank"), [(0, 4), (0.25, 3), (0.5, 2), (0.75, 1), (1, 1)])
def test_the_rank_is_what_the_share_leaves_and_at_least_one(share, rank):
    assert factorise_linear(nn.Linear(4, 9), share)[0].out_features == rank


@pytest.mark.parametrize(("energy", "rank"), [(0.0, 1), (0.64, 1), (0.65, 2), (0.98, 2), (0.99, 3), (1.0, 3)])
def test_the_energy_threshold_keeps_the_smallest_rank_that_has_it(energy, rank):
    """Singular values 4, 3 and 0.5: squares 16, 9 and 0.25 of 25.25 are 0.634, 0.990 and 1 of the whole."""
    shares = {0.64: 16 / 25.25, 0.65: 0.65, 0.98: 25 / 25.25, 0.99: 0.9902}
    layer = nn.Linear(5, 4)
    layer.weight.data = torch.zeros(4, 5)
    layer.weight.data[[0, 1, 2], [0, 1, 2]] = torch.tensor([3.0, 4.0, 0.5])
    assert factorise_linear(layer, energy_threshold=shares.get(energy, energy))[0].out_features == rank


def test_a_layer_that_is_low_rank_is_reproduced_and_saves():
    layer = low_rank(32, 32, 3)
    model = nn.Sequential(layer, nn.ReLU())
    small = decompose_linear(model, energy_threshold=1.0)
    x = torch.randn(5, 32)
    assert small[0][0].out_features == 3
    assert (small(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    assert sum(p.numel() for p in small.parameters()) == 3 * 64 + 32


def test_a_square_layer_at_half_saves_nothing_and_stays():
    """D-M3: 64 x 64 at 0.5 is 32 x 128 weights for 4096."""
    decomposer = FC_Decomposer()
    with pytest.warns(UserWarning, match="no linear layer was decomposed: 0: rank 32 of 64 would not save parameters"):
        new = decomposer.decompose(nn.Sequential(nn.Linear(64, 64)))
    assert type(new[0]) is nn.Linear
    assert decomposer.report == DecompositionReport(
        {}, {"0": "rank 32 of 64 would not save parameters (below 32 does)"}, 4160, 4160
    )


def test_the_report_counts():
    decomposer = FC_Decomposer()
    decomposer.decompose(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), 0.75)
    # 64 x 64 at rank 16 is 2048 weights; 2 x 64 at rank 1 (of 2, half a value rounds to even) is 66
    assert decomposer.report.ranks == {"0": 16, "2": 1}
    assert (decomposer.report.parameters_before, decomposer.report.parameters_after) == (4160 + 130, 2048 + 64 + 66 + 2)
    assert str(decomposer.report).splitlines() == [
        "2 of 2 linear layers decomposed, 4,290 -> 2,180 parameters",
        "0: rank 16",
        "2: rank 1",
    ]


def test_a_root_linear_comes_back_as_two():
    """D-M3: a model that is a linear layer itself."""
    layer = nn.Linear(16, 16)
    new = FC_Decomposer().decompose(layer, 0.75)
    assert type(new) is nn.Sequential
    assert [part.out_features for part in new] == [4, 16]


def test_a_shared_layer_stays_shared():
    """D-M3: one module under two names."""
    layer = nn.Linear(16, 16)
    decomposer = FC_Decomposer()
    new = decomposer.decompose(nn.Sequential(layer, nn.ReLU(), layer), 0.75)
    assert new[0] is new[2]
    assert type(new[0]) is nn.Sequential
    assert decomposer.report.ranks == {"0": 4}


def test_a_tied_weight_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.embedding.weight

    decomposer = FC_Decomposer()
    with pytest.warns(UserWarning, match="head: its weight is shared with another module"):
        new = decomposer.decompose(Tied(), 0.75)
    assert new.head.weight is new.embedding.weight


def test_frozen_stays_frozen():
    """D-M3: and what trains goes on training."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    new = decompose_linear(model, 0.75)
    assert {n: p.requires_grad for n, p in new.named_parameters()} == {
        "0.0.weight": False,
        "0.1.weight": False,
        "0.1.bias": True,
        "1.0.weight": True,
        "1.1.weight": True,
        "1.1.bias": False,
    }


@pytest.mark.parametrize("module", [nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), nn.MultiheadAttention(16, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_layers_whose_weights_are_read_directly_stay(module, training):
    """D-M3: attention and the encoder layer's fast path take the weights without a call."""
    model = copy.deepcopy(module).train(training)
    decomposer = FC_Decomposer()
    with pytest.warns(UserWarning, match="reads its weight directly"):
        new = decomposer.decompose(model, 0.75)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert list(decomposer.report.left) == linear
    assert all("reads its weight directly" in why for why in decomposer.report.left.values())
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        new(x) if isinstance(new, nn.TransformerEncoderLayer) else new(x, x, x)


def test_a_decoder_layer_runs_with_its_feed_forward_part_decomposed():
    model = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True).eval()
    decomposer = FC_Decomposer()
    new = decomposer.decompose(model, 0.5)
    assert decomposer.report.ranks == {"linear1": 8, "linear2": 8}
    assert new(torch.randn(2, 5, 16), torch.randn(2, 4, 16)).shape == (2, 5, 16)


class Reader(nn.Module):
    """Reads the weight of `direct`, sets that of `called` when it is built."""

    def __init__(self):
        super().__init__()
        self.direct, self.called = nn.Linear(16, 16), nn.Linear(16, 16)
        self.called.weight.data.normal_()

    @torch.no_grad()
    def forward(self, x):
        return self.called(F.linear(x, self.direct.weight))


def test_a_users_module_that_reads_a_weight_is_noticed():
    decomposer = FC_Decomposer()
    new = decomposer.decompose(nn.Sequential(Reader()), 0.75)
    assert decomposer.report.ranks == {"0.called": 4}
    assert decomposer.report.left == {"0.direct": "Reader reads its weight directly"}
    assert new(torch.randn(2, 16)).shape == (2, 16)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Scaled(16, 16), "a Scaled may compute more than a linear layer"),
        (hooked(), "it has hooks, which would be lost"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
            "a ParametrizedLinear may compute more than a linear layer",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:no linear layer")
def test_layers_that_are_more_than_a_matrix_stay(layer, why):
    decomposer = FC_Decomposer()
    decomposer.decompose(nn.Sequential(layer), 0.75)
    assert decomposer.report.left == {"0": why}


def test_the_given_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout()).train()
    weight, state = model[0].weight, copy.deepcopy(model.state_dict())
    new = decompose_linear(model, 0.75)
    assert model[0].weight is weight
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert new is not model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_kept(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
    model[1].eval()
    new = decompose_linear(model, 0.75)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert [[m.training for m in part.modules()] for part in new] == [[True] * 3, [False] * 3]


def nested():
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "head": nn.Linear(16, 16)})


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {"body.0", "body.1", "head"}),
        ({"layers": "head"}, {"head"}),
        ({"layers": ["body"]}, {"body.0", "body.1"}),
        ({"layers": ["*.1", "head"]}, {"body.1", "head"}),
        ({"exclude": "body.0"}, {"body.1", "head"}),
        ({"layers": "body", "exclude": ["*.1"]}, {"body.0"}),
    ],
)
def test_layers_are_chosen_by_name(options, chosen):
    decomposer = FC_Decomposer()
    decomposer.decompose(nested(), 0.75, **options)
    assert decomposer.report.ranks.keys() == chosen
    assert decomposer.report.left.keys() == {"body.0", "body.1", "head"} - chosen
    assert set(decomposer.report.left.values()) <= {"not named in layers", "named in exclude"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: decompose_linear(m, 50), r"share_removed must be in \[0, 1\], got 50; pass 0.5"),
        (lambda m: FC_Decomposer().decompose(m, 50), r"percent_removed must be in \[0, 1\], got 50; pass 0.5"),
        (lambda m: decompose_linear(m, energy_threshold=1.5), r"energy_threshold must be in \[0, 1\], got 1.5"),
        (
            lambda m: decompose_linear(m, layers="hea"),
            "layers must be the name of a linear layer .*, got 'hea'; did you mean 'head'",
        ),
        (lambda m: decompose_linear(m, exclude=["tail"]), "exclude must be the name .*, got 'tail'"),
        (lambda m: factorise_linear(m["head"], -0.1), r"share_removed must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(nested())


def test_weights_that_are_not_finite_are_named():
    model = nested()
    model["body"][1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in body\.1"):
        decompose_linear(model, 0.75)
    with pytest.raises(ValueError, match="layer must have a finite weight"):
        factorise_linear(model["body"][1])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got None"):
        decompose_linear(None)


def test_familiar_svd():
    layer = nn.Linear(8, 8)
    expected, got = factorise_linear(layer, 0.75), FC_Decomposer().SVD(layer, 0.75)
    assert [p.shape for p in got.parameters()] == [p.shape for p in expected.parameters()]


def test_with_a_scale_the_errors_of_large_inputs_weigh_more():
    """The weight is diag(1, 2, 3): by itself the first goes; with inputs of sizes 8, 2, 1 the last does."""
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    for scale, kept in ((None, [0.0, 2.0, 3.0]), (torch.tensor([8.0, 2.0, 1.0]), [1.0, 2.0, 0.0])):
        pair = factorise_linear(layer, 1 / 3, scale=scale)
        assert torch.allclose(pair(torch.eye(3)), torch.diag(torch.tensor(kept)), atol=1e-6)


def test_with_data_the_outputs_error_is_the_least_of_that_rank():
    """Independent inputs: the least squared error is the sum of the smallest squared singular values of W X."""
    layer, sizes = nn.Linear(12, 12, bias=False), torch.logspace(-2, 1, 12)
    x = torch.linalg.qr(torch.randn(64, 12))[0] * sizes  # columns at right angles, of these norms
    model = nn.Sequential(layer)
    small = FC_Decomposer().decompose(model, 0.75, None, [(x, torch.zeros(64))])
    wanted = np.linalg.svd((x @ layer.weight.T).detach().double().numpy(), compute_uv=False)[3:]
    error, plain = ((other(x) - model(x)).norm().item() for other in (small, decompose_linear(model, 0.75)))
    assert error == pytest.approx(np.sqrt((wanted**2).sum()), rel=1e-3)
    assert error < 0.5 * plain


def test_full_rank_reproduces_the_layer_with_inputs_that_are_never_there():
    layer = nn.Linear(6, 4)
    for scale in (torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 9.0]), torch.zeros(6)):
        x = torch.randn(7, 6)
        assert (factorise_linear(layer, 0.0, scale=scale)(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()


def test_no_more_batches_than_asked_for_are_run_and_the_model_stays():
    drawn, model = [], nn.Sequential(nn.Dropout(), nn.Linear(16, 16)).train()
    before = copy.deepcopy(model.state_dict())

    def batches():
        while True:
            drawn.append(1)
            yield torch.randn(2, 16)

    decompose_linear(model, 0.75, data=batches(), n_batches=2)
    assert len(drawn) == 2
    assert model[0].training and not model[1]._forward_pre_hooks
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_bad_data_are_named():
    model = HalfUsed()
    assert type(decompose_linear(model, 0.75, data=[torch.zeros(1, 8)], exclude="unused").used) is nn.Sequential
    with pytest.raises(ValueError, match=r"data must hold batches that reach every layer to decompose, .*unused"):
        decompose_linear(model, 0.75, data=[torch.zeros(1, 8)])
    with pytest.raises(ValueError, match="data must hold batches"):
        decompose_linear(model, 0.75, data=[])
    with pytest.raises(ValueError, match="n_batches must be at least 1, got 0"):
        decompose_linear(model, 0.75, data=[torch.zeros(1, 8)], n_batches=0)
    for scale in (torch.ones(7), torch.tensor([-1.0] + [1.0] * 7), torch.full((8,), torch.nan)):
        with pytest.raises(ValueError, match="scale must be 8 finite numbers of at least 0"):
            factorise_linear(model.used, scale=scale)


def test_the_familiar_path():
    from fasterai.misc import fc_decomposer

    assert fc_decomposer.FC_Decomposer is FC_Decomposer


def test_a_layer_that_reads_nothing_is_left_alone():
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 8))
    assert decompose_linear(model, 0.5)[0].weight.shape == (3, 0)


def test_the_familiar_calls_refuse_to_remove_everything():
    model = nn.Sequential(nn.Linear(10, 10))
    with pytest.raises(
        ValueError, match=r"percent_removed must be below 1, got 1\.0: .*decompose_linear .* keep one singular value"
    ):
        FC_Decomposer().decompose(model, percent_removed=1.0)
    with pytest.raises(ValueError, match="percent_removed must be below 1, got 1:"):
        FC_Decomposer().SVD(model[0], 1)
    assert decompose_linear(model, 1.0)[0][0].out_features == 1
    assert FC_Decomposer().SVD(model[0], 1, energy_threshold=0.0)[0].out_features == 1
