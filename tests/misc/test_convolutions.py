"""Decomposed convolutions: exact at full rank, as good as an oracle's below, and only where they save parameters."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.misc.convolution_factors import METHODS, factors_of, full_ranks, product_of
from fasterai.misc.convolutions import Conv_Decomposer, ConvolutionReport, decompose_convolutions, factorise_convolution

EXACT = [method for method in METHODS if method != "cp"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative(found, wanted):
    return float(((found - wanted).norm() / wanted.norm()).detach())


# --- exact at full rank ---


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(EXACT),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
)
def test_full_rank_computes_what_the_layer_does(method, channels, kernel, stride, padding, dilation, bias, mode):
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
    parts = factorise_convolution(layer, 0.0, method)
    x = torch.randn(2, channels[0], 12, 13, dtype=torch.float64)
    torch.testing.assert_close(parts(x), layer(x), rtol=1e-9, atol=1e-9)
    assert (parts[-1].bias is not None) == bias
    assert all(part.bias is None for part in parts[:-1])


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_kept(method, padding):
    layer = nn.Conv2d(3, 5, (3, 4), padding=padding, dilation=2)
    x = torch.randn(2, 3, 11, 12)
    torch.testing.assert_close(factorise_convolution(layer, 0.0, method)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tucker", "svd"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, padding=3), (2, 4, 20)),
        (nn.Conv3d(3, 4, (1, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0)), (2, 3, 6, 7, 8)),
        (nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 2)), (2, 4, 9, 9)),
    ],
)
def test_other_dimensions_and_flat_kernels_are_exact_too(method, layer, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(factorise_convolution(layer, 0.0, method)(x), layer(x), rtol=1e-5, atol=1e-5)


# --- against oracles of numpy's ---


def unfolded(w, mode):
    return np.moveaxis(w, mode, 0).reshape(w.shape[mode], -1)


def hosvd_error(w, ranks):
    """Truncated higher-order SVD of the first two modes: an upper bound of the best Tucker-2."""
    bases = [np.linalg.svd(unfolded(w, mode), full_matrices=False)[0][:, :rank] for mode, rank in enumerate(ranks)]
    core = np.einsum("oihw,or,is->rshw", w, *bases)
    return np.linalg.norm(np.einsum("rshw,or,is->oihw", core, *bases) - w) / np.linalg.norm(w)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (6, 4), (12, 2), (5, 8)])
def test_tucker_is_at_least_as_good_as_the_truncated_higher_order_svd(ranks):
    layer = nn.Conv2d(8, 12, 3)
    parts = factorise_convolution(layer, ranks=ranks, n_iter=50, tol=1e-9)
    found = relative(product_of([p.weight for p in parts], "tucker"), layer.weight)
    oracle = hosvd_error(layer.weight.detach().double().numpy(), ranks)
    # Discarded squares of both unfoldings bound the truncated error, and half of them the best one (De Lathauwer et al. 2000).
    assert oracle / math.sqrt(2) - 1e-6 <= found <= oracle + 1e-6
    assert [tuple(p.weight.shape[:2]) for p in parts] == [(ranks[1], 8), ranks, (12, ranks[0])]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_svd_and_spatial_are_the_truncations_of_numpy(rank):
    layer = nn.Conv2d(6, 10, (3, 4))
    w = layer.weight.detach().double().numpy()
    for method, matrix in (("svd", w.reshape(10, -1)), ("spatial", w.transpose(1, 2, 0, 3).reshape(18, 40))):
        s = np.linalg.svd(matrix, compute_uv=False)
        best = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
        parts = factorise_convolution(layer, method=method, ranks=rank)
        assert relative(product_of([p.weight for p in parts], method), layer.weight) == pytest.approx(best, rel=1e-5)


def als_error(w, rank, sweeps, seed):
    """Alternating least squares by numpy's lstsq on Khatri-Rao products, from random factors."""
    factors = [np.random.default_rng(seed + n).normal(size=(size, rank)) for n, size in enumerate(w.shape)]
    for _ in range(sweeps):
        for mode in range(4):
            others = [f for n, f in enumerate(factors) if n != mode]
            joined = np.einsum("ar,br,cr->abcr", *others).reshape(-1, rank)
            factors[mode] = np.linalg.lstsq(joined, unfolded(w, mode).T, rcond=None)[0].T
    return np.linalg.norm(np.einsum("or,ir,hr,wr->oihw", *factors) - w) / np.linalg.norm(w)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_cp_comes_as_near_as_an_oracle_from_other_beginnings(rank):
    layer = nn.Conv2d(6, 8, 3)
    parts = factorise_convolution(layer, method="cp", ranks=rank, n_iter=200, tol=1e-7)
    found = relative(product_of([p.weight for p in parts], "cp"), layer.weight)
    oracle = min(als_error(layer.weight.detach().double().numpy(), rank, 100, seed) for seed in (0, 10, 20))
    assert found <= 1.03 * oracle


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cp_finds_a_weight_that_is_one(rank):
    factors = [torch.randn(n, rank, dtype=torch.float64) for n in (10, 7, 3, 3)]
    layer = nn.Conv2d(7, 10, 3, stride=2, padding=1).double()
    layer.weight.data = torch.einsum("or,ir,hr,wr->oihw", *factors)
    parts = factorise_convolution(layer, method="cp", ranks=rank, n_iter=500, tol=1e-10)
    x = torch.randn(2, 7, 9, 9, dtype=torch.float64)
    assert relative(parts(x), layer(x)) < 1e-4
    assert [p.groups for p in parts] == [1, rank, rank, 1]
    assert [p.kernel_size for p in parts] == [(1, 1), (3, 1), (1, 3), (1, 1)]
    assert [p.stride for p in parts] == [(1, 1), (2, 1), (1, 2), (1, 1)]


def test_more_rounds_of_cp_never_make_it_worse():
    weight = nn.Conv2d(6, 8, 3).weight.detach().double()
    errors = [relative(product_of(factors_of(weight, "cp", (5,), n, 0.0), "cp"), weight) for n in (1, 2, 5, 20, 60)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


# --- ranks ---


@pytest.mark.parametrize(
    ("method", "share", "ranks"),
    [
        ("tucker", 0.5, (8, 1)),  # of 16 outputs and 3 inputs: Python rounds 1.5 to 2, so that 1 is left
        ("tucker", 0.95, (1, 1)),
        ("svd", 0.5, (8,)),  # of min(16, 27)
        ("spatial", 0.5, (5,)),  # of min(9, 48): 9 - round(4.5), which is 4
        ("cp", 0.0, (3,)),
    ],
)
def test_the_share_of_the_ranks_that_goes(method, share, ranks):
    parts = factorise_convolution(nn.Conv2d(3, 16, 3), share, method)
    sizes = {"tucker": lambda p: (len(p[1].weight), len(p[0].weight))}.get(method, lambda p: (len(p[0].weight),))
    assert sizes(parts) == ranks


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("error", [0.1, 0.3, 0.6])
def test_an_allowed_error_is_kept_to_and_no_rank_is_wasted(method, error):
    layer = nn.Conv2d(8, 12, 3)
    layer.weight.data *= torch.logspace(0, -3, 12)[:, None, None, None]
    parts = factorise_convolution(layer, method=method, error=error)
    assert relative(product_of([p.weight for p in parts], method), layer.weight) <= error
    if method != "tucker" and len(parts[0].weight) > 1:
        fewer = factorise_convolution(layer, method=method, ranks=len(parts[0].weight) - 1)
        assert relative(product_of([p.weight for p in fewer], method), layer.weight) > error


def test_an_energy_threshold_of_one_finds_the_rank_of_the_weight():
    layer = nn.Conv2d(8, 12, 3).double()
    factors = [torch.randn(size, dtype=torch.float64) for size in ((12, 4), (4, 3, 3, 3), (3, 8))]
    layer.weight.data = torch.einsum("or,rshw,si->oihw", *factors)
    parts = factorise_convolution(layer, energy_threshold=1.0)
    assert [len(p.weight) for p in parts] == [3, 4, 12]
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(parts(x), layer(x))


def test_a_weight_of_zeros_stays_one():
    layer = nn.Conv2d(4, 6, 3)
    nn.init.zeros_(layer.weight)
    x = torch.randn(1, 4, 5, 5)
    for method in METHODS:
        torch.testing.assert_close(factorise_convolution(layer, 0.5, method)(x), layer(x))


# --- a model ---


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_model_gets_thinner_and_can_be_trained_on(method):
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = decompose_convolutions(model, 0.5, method=method)
    assert isinstance(small[0], nn.Sequential) and isinstance(small[2], nn.Sequential) and isinstance(small[4], nn.Conv2d)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())
    x, y = torch.randn(8, 3, 6, 6), torch.randn(8, 8, 6, 6)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(small(x), y)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_the_report_counts_parameters_and_macs():
    decomposer = Conv_Decomposer()
    x = torch.randn(1, 3, 10, 10)
    small = decomposer.decompose(network(), method="svd", ranks=4, exclude="0", example_inputs=x)
    report = decomposer.report
    assert report.ranks == {"2": (4,)}
    assert report.left == {"0": "named in exclude", "4": "its kernel of 1 has nothing to split"}
    # 3*16*9 + 16, 16*32*9 + 32 and 32*8 + 8; then 16*4*9 and 4*32 + 32 in the second's place
    assert (report.parameters_before, report.parameters_after) == (448 + 4640 + 264, 448 + 576 + 160 + 264)
    assert (report.macs_before, report.macs_after) == (100 * (432 + 4608 + 256), 100 * (432 + 576 + 128 + 256))
    product = product_of([p.weight for p in small[2]], "svd")
    assert 0 < report.errors["2"] < 1 and product.shape == (32, 16, 3, 3)
    assert str(report).startswith("1 of 3 convolutions decomposed (svd), 5,352 -> 1,448 parameters, 529,600 -> 139,200 MACs")
    assert "2: rank 4, weight off by" in str(report)
    assert ConvolutionReport().ranks == {}


def test_what_stays_says_why():
    class Scaled(nn.Conv2d): ...

    shared = nn.Conv2d(4, 4, 3)
    twin = nn.Conv2d(4, 4, 3)
    twin.weight = shared.weight
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *a: None)
    model = nn.ModuleList(
        [nn.Conv2d(4, 4, 3, groups=2), Scaled(4, 4, 3), shared, twin, hooked, nn.Conv2d(4, 4, (1, 3)), nn.Conv1d(4, 4, 3)]
    )
    decomposer = Conv_Decomposer()
    with pytest.warns(UserWarning, match="no convolution was decomposed"):
        decomposer.decompose(model, 0.5, "spatial")
    left = list(decomposer.report.left.values())
    text = " | ".join(left)
    for part in (
        "its 2 groups share no channels",
        "a Scaled may compute more than a convolution",
        "shared with another module",
    ):
        assert part in text
    for part in (
        "hooks, which would be lost",
        "its kernel of (1, 3) cannot be split",
        "its kernel has 1 dimensions, and spatial needs 2",
    ):
        assert part in text


def test_a_rank_that_saves_nothing_leaves_the_layer():
    decomposer = Conv_Decomposer()
    with pytest.warns(UserWarning, match="rank 16 x 3 would not save parameters"):
        assert isinstance(decomposer.decompose(nn.Sequential(nn.Conv2d(3, 16, 3)), 0.0)[0], nn.Conv2d)


def test_dtype_mode_and_frozen_weights_are_kept_and_a_lone_layer_is_replaced():
    layer = nn.Conv2d(8, 8, 3).to(torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    small = decompose_convolutions(layer, 0.75)
    assert isinstance(small, nn.Sequential) and not small.training
    assert [p.dtype for p in small.parameters()] == [torch.bfloat16] * 4
    assert [p.requires_grad for p in small.parameters()] == [False, False, False, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"percent_removed": 1.0}, ValueError, "percent_removed must be below 1, got 1.0: nothing would be left"),
        ({"percent_removed": 50}, ValueError, r"percent_removed must be in \[0, 1\], got 50; pass 0.5"),
        ({"method": "bad"}, ValueError, "method must be one of tucker, svd, spatial, cp, got 'bad'"),
        ({"method": "cp", "energy_threshold": 0.9}, ValueError, "energy_threshold must be None for method 'cp'.*pass ranks="),
        ({"method": "cp", "error": 0.9}, ValueError, "error must be None for method 'cp'"),
        ({"error": 0.1, "ranks": 2}, ValueError, "error and ranks must not both be given"),
        ({"error": 2}, ValueError, r"error must be in \[0, 1\], got 2"),
        ({"ranks": 0}, ValueError, "ranks must be at least 1, got 0"),
        ({"ranks": (1, 2, 3)}, ValueError, r"ranks must be 2 for tucker, got \(1, 2, 3\)"),
        ({"n_iter": -1}, ValueError, "n_iter must be at least 0, got -1"),
        ({"layers": "9"}, ValueError, "layers must be the name of a convolution or of a module that holds one"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Conv_Decomposer().decompose(network(), **options)


def test_bad_layers_are_named():
    with pytest.raises(ValueError, match="layer must be a convolution that tucker can decompose, got one where its 2 groups"):
        factorise_convolution(nn.Conv2d(4, 4, 3, groups=2))
    bad = nn.Sequential(nn.Conv2d(4, 8, 3))
    bad[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="layer must have a finite weight"):
        factorise_convolution(bad[0])
    with pytest.raises(ValueError, match="model must have finite weights, got NaN or infinity in 0"):
        decompose_convolutions(bad)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        decompose_convolutions(3)


def test_full_ranks_by_hand():
    weight = torch.zeros(12, 5, 3, 2)
    assert {m: full_ranks(weight, m) for m in METHODS} == {"tucker": (12, 5), "svd": (12,), "spatial": (15,), "cp": (5,)}
