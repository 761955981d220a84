"""The oracle is torch on all entries, of which those that are gone stand as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.model.slim_weights import told_batch_norm, told_centred, told_variance

WIDE = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.7
WIDE[:, 4:] = 0
LEFT = WIDE[:, :4]
CENTRED = WIDE - WIDE.mean((1, 2), keepdim=True)

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (((1, 2),), {}),
    (([1, 2], False, True), {}),
    (((-2, -1), True), {"keepdim": True}),
    ((), {"dim": (1, 2), "unbiased": False}),
    ((), {"axis": (1, 2), "correction": 2, "keepdim": True}),
]


@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_a_variance_of_what_is_left_is_that_of_all(name: str, call: int) -> None:
    args, kwargs = CALLS[call]
    kwargs = {"dim" if key == "axis" else key: value for key, value in kwargs.items()}
    wanted, given = getattr(torch, name)(WIDE, *args, **kwargs), CALLS[call]
    torch.testing.assert_close(told_variance(name, 6, 4, LEFT, *given[0], **given[1]), wanted, rtol=1e-13, atol=1e-13)


def test_all_dimensions_are_meant_where_none_is_named() -> None:
    for args in ((), (False,)):
        torch.testing.assert_close(told_variance("var", 6, 4, LEFT, *args), torch.var(WIDE, *args), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["var", "std"])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_what_a_mean_was_taken_from_says_what_is_gone(name: str, call: int) -> None:
    args, kwargs = CALLS[call]
    wanted = getattr(torch, name)(WIDE, *args, **{"dim" if key == "axis" else key: value for key, value in kwargs.items()})
    found = told_centred(name, 6, 4, CENTRED[:, :4], *args, **kwargs)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_squares_of_what_is_left_are_averaged_and_summed_over_all(name: str) -> None:
    for args, kwargs in ((((1, 2),), {}), (((1, 2), True), {}), ((), {"dim": (1, 2), "keepdim": True})):
        wanted: Tensor = getattr(CENTRED.square(), name)(*args, **kwargs)
        torch.testing.assert_close(told_centred(name, 6, 4, CENTRED[:, :4], *args, **kwargs), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_batch_norm_of_what_is_left_is_that_of_all(affine: bool, dtype: torch.dtype, limit: float) -> None:
    wide = WIDE.transpose(0, 1).flatten(1)[None].transpose(1, 2)  # (1, 12, 6), of which two along the last are zero
    weight, bias = (torch.rand(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)) if affine else (None, None)
    wanted = F.batch_norm(wide, None, None, weight, bias, training=True, eps=1e-3)[..., :4]
    given = [None if one is None else one.to(dtype) for one in (weight, bias)]
    found = told_batch_norm(6, 4, wide[..., :4].to(dtype), None, None, *given, training=True, eps=1e-3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=limit)
