"""The oracle is torch on the wide tensor, in which the channels that are gone stand as zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasterai.model.slim_averages import Counting, slim_group_norm, slim_layer_norm, slim_rms_norm

LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, float, float]:
    """Draw what is left of a tensor, how many channels there were, eps, and the limit for its type."""
    dtype = draw(st.sampled_from(list(LIMITS)))
    n = draw(st.integers(1, 9))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(2, n, generator=dice, dtype=torch.float64) * draw(st.sampled_from([1e-2, 1.0, 30.0]))
    x = x + draw(st.sampled_from([0.0, 3.0, -20.0]))
    return x.to(dtype), n + draw(st.integers(0, 12)), draw(st.sampled_from([1e-6, 1e-5, 1e-1])), LIMITS[dtype]


def wide(x: Tensor, size: int) -> Tensor:
    """Put the zeros back."""
    return F.pad(x.double(), (0, size - x.shape[-1]))


def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    return torch.linspace(0.5, 2, n, dtype=torch.float64).to(x.dtype), torch.linspace(-1, 1, n, dtype=torch.float64).to(x.dtype)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_a_layer_norm_of_what_is_left_is_that_of_all(
    case: tuple[Tensor, int, float, float], affine: bool, training: bool
) -> None:
    x, size, eps, limit = case
    weight, bias = vectors(x) if affine else (None, None)
    wanted = F.layer_norm(wide(x, size), (size,), None, None, eps)[:, : x.shape[1]]
    given = F.layer_norm(F.pad(x, (0, size - x.shape[1])), (size,), None, None, eps)[:, : x.shape[1]].double()
    own = (given - wanted).abs().max()  # where nothing is gone and all are alike, torch's own norm is far off too
    wanted = wanted * weight.double() + bias.double() if weight is not None and bias is not None else wanted
    with torch.set_grad_enabled(training):
        found = slim_layer_norm(x, weight, bias, eps, size)
    torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=float(limit * 3 + 8 * own))


@pytest.mark.parametrize("size", [3, 7])
def test_gradients_of_a_layer_norm_are_those_of_its_values(size: int) -> None:
    dice = torch.Generator().manual_seed(0)
    values = [torch.randn(n, dtype=torch.float64, generator=dice).requires_grad_() for n in ((2, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(lambda x, weight, bias: slim_layer_norm(x, weight, bias, 1e-3, size), values)


@pytest.mark.parametrize("mean", [0.0, 1e2, -1e4])
def test_a_layer_norm_of_a_large_mean_is_as_exact_as_that_of_torch(mean: float) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) + mean
    weight, bias = vectors(x[0])
    own = (F.layer_norm(x, (16,)) - F.layer_norm(x.double(), (16,))).abs().max()
    wanted = F.layer_norm(wide(x, 24), (24,))[:, :16] * weight.double() + bias.double()
    for training in (True, False):
        with torch.set_grad_enabled(training):
            assert (slim_layer_norm(x, weight, bias, 1e-5, 24) - wanted).abs().max() <= 4 * own + 1e-6


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_an_rms_norm_of_what_is_left_is_that_of_all(case: tuple[Tensor, int, float, float], affine: bool) -> None:
    x, size, eps, limit = case
    weight = vectors(x)[0] if affine else None
    wanted = F.rms_norm(wide(x, size), (size,), None, eps)[:, : x.shape[1]]
    wanted = wanted if weight is None else wanted * weight.double()
    torch.testing.assert_close(slim_rms_norm(x, weight, eps, size).double(), wanted, rtol=limit, atol=limit * 3)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_an_rms_norm_without_eps_takes_the_one_of_torch(dtype: torch.dtype) -> None:
    x = torch.full((1, 3), 1e-4, dtype=dtype)
    wanted = F.rms_norm(F.pad(x, (0, 1)), (4,))[:, :3]
    torch.testing.assert_close(slim_rms_norm(x, None, None, 4), wanted, rtol=LIMITS[dtype], atol=0)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 3), st.booleans())
def test_a_group_norm_of_what_is_left_is_that_of_all(case: tuple[Tensor, int, float, float], groups: int, affine: bool) -> None:
    x, size, eps, limit = case
    n = x.shape[1]
    image = torch.stack([x.roll(i, 1) * (i + 1) for i in range(groups)], 1)[..., None] * torch.tensor([1.0, 0.5]).to(x.dtype)
    full = F.pad(image.double(), (0, 0, 0, size - n)).flatten(1, 2)
    wanted = F.group_norm(full, groups, None, None, eps).view(2, groups, size, 2)[:, :, :n].flatten(1, 2)
    weight, bias = (
        (torch.ones(groups * n, dtype=x.dtype) * 1.5, torch.ones(groups * n, dtype=x.dtype)) if affine else (None, None)
    )
    wanted = wanted * 1.5 + 1 if affine else wanted
    given = slim_group_norm(image.flatten(1, 2), groups, weight, bias, eps, size)
    torch.testing.assert_close(given.double(), wanted, rtol=limit, atol=limit * 3)


def _by_hand(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


def _channels_first(x: Tensor) -> Tensor:
    x = x.t()
    mean = x.mean(0, keepdim=True)
    spread = (x - mean) * (x - mean)
    difference = x - mean
    return ((x - mean) / torch.sqrt((difference * difference).mean(0, keepdim=True) + 1e-5) + 0 * spread).t()


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean(-1),
    "mean of squares": lambda x: x.pow(2).mean((-1,), keepdim=True),
    "torch.mean": lambda x: torch.mean(x, dim=1),
    "var": lambda x: x.var(-1, keepdim=True),
    "var unbiased": lambda x: x.var(-1, False),
    "var by keyword": lambda x: torch.var(x, dim=-1, unbiased=False),
    "var correction": lambda x: torch.var(x, -1, correction=2),
    "std": lambda x: x.std(-1),
    "var_mean": lambda x: torch.var_mean(x, 1, correction=0, keepdim=True),
    "std_mean": lambda x: torch.std_mean(x, -1),
    "by hand": _by_hand,
    "channels first": _channels_first,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-3),
    "along several": lambda x: x[..., None].mean((0, 2))[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_code_of_ones_own_gives_the_averages_of_all_channels(form: str) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    with Counting(9):
        found = FORMS[form](x)
    wanted = FORMS[form](F.pad(x, (0, 4)))
    for a, b in zip(*[y if isinstance(y, tuple) else (y,) for y in (found, wanted)], strict=True):
        torch.testing.assert_close(a, b[:, :5] if b.dim() == 2 and b.shape[1] == 9 else b, rtol=1e-12, atol=1e-12)
