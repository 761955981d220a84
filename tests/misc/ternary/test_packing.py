"""Two bits a weight and a scale for each group, read back equal."""

from __future__ import annotations

import pytest
import torch

from fasterai.misc.ternary.groups import divide
from fasterai.misc.ternary.optimum import ternary_of
from fasterai.misc.ternary.packing import is_ternary, pack, packed_bytes, unpack
from tests.misc.ternary.test_groups import LAYERS, first_weight


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group", [4, 64, "filter", "tensor"])
def test_what_is_packed_is_read_back_equal(name, group):
    weight, layout = first_weight(LAYERS[name]())
    division = divide(layout, group)
    ternary = ternary_of(weight, division)
    codes, scales = pack(ternary, division)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    assert codes.nbytes + scales.nbytes == packed_bytes(weight.numel(), division.groups, torch.float32)
    assert torch.equal(unpack(codes, scales, division, weight.shape), ternary)
    assert is_ternary(ternary, division) and not is_ternary(weight, division)


def test_the_bytes_of_a_few_weights_by_hand():
    """Codes 2 0 1 2 and 1 1 0: 2 + 0 + 16 + 128 and 1 + 4 + 0, then 1 in the place that is left over: + 64."""
    weight, layout = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.0, 0.0, -3.0]]), first_weight(torch.nn.Linear(7, 1))[1]
    codes, scales = pack(weight, divide(layout, 4))
    assert codes.tolist() == [146, 69]
    assert scales.flatten().tolist() == [0.5, 3.0] and scales.dtype == torch.float16


@pytest.mark.parametrize(
    ("scale", "dtype", "narrowest"),
    [
        (0.5, torch.float32, torch.float16),
        (1e-20, torch.bfloat16, torch.bfloat16),
        (0.1, torch.float32, torch.float32),
        (0.1, torch.float64, torch.float64),
        (0.1, torch.float16, torch.float16),
    ],
)
def test_scales_are_in_the_narrowest_type_that_holds_them(scale, dtype, narrowest):
    weight, layout = torch.full((2, 8), scale, dtype=dtype), first_weight(torch.nn.Linear(8, 2))[1]
    codes, scales = pack(weight, divide(layout, 4))
    assert scales.dtype == narrowest
    assert torch.equal(unpack(codes, scales, divide(layout, 4), weight.shape).to(dtype), weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, s: (c[:-1], s), r"codes must be 4 bytes, got \(3,\)"),
        (lambda c, s: (c.char(), s), "codes must be 4 bytes, got .* of torch.int8"),
        (lambda c, s: (c | 3, s), "codes must be 0, 1 or 2, got 3"),
        (lambda c, s: (c, s[:, :1]), r"scales must be of shape \(2, 2, 1\), got \(2, 1, 1\)"),
        (lambda c, s: (c, -s), "scales must be finite and at least 0"),
        (lambda c, s: (c, s * torch.inf), "scales must be finite and at least 0"),
    ],
)
def test_codes_and_scales_that_are_none_are_refused(spoil, message):
    weight, layout = torch.full((2, 8), 0.1), first_weight(torch.nn.Linear(8, 2))[1]
    with pytest.raises(ValueError, match=message):
        unpack(*spoil(*pack(weight, divide(layout, 4))), divide(layout, 4), weight.shape)
