from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graph.rules.cases import (
    Case,
    around,
    aten,
    beside,
    both,
    goes_as_it_says,
    linears,
    on_images,
    over_channels,
    stands_in_the_program,
)


def turned(x):
    """Rotary positions, as Llama's own code has them."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    angle = torch.arange(4, device=x.device)[:, None] * torch.ones(2, dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def mixing(m, x):
    y = m.a(x).relu()
    return m.b(y + torch.fft.fft(y, dim=1).real * 0.1)


KINDS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
COMPLEX = ("conj_physical", "resolve_conj", "resolve_neg")
CASES = [
    Case(("fft_fft", "real"), mixing, linears(), (2, 4, 6), both),
    on_images("fft_rfft2", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5)),
    over_channels("fft_rfft", lambda x: torch.fft.irfft(torch.fft.rfft(x))),
    Case(
        ("view_as_complex", "view_as_real"),
        lambda m, x: m.b(turned(m.a(x).view(len(x), 4, -1, 4).transpose(1, 2)).transpose(1, 2).flatten(2)),
        linears(),
        (2, 4, 6),
        {("a.weight", 0): 2, ("b.weight", 1): 2},
        {},
        "rotary positions of two heads",
    ),
    Case(
        ("complex", "_conj"),
        lambda m, x: m.b((torch.complex(m.a(x), m.c(x)).conj() * 1j).abs()),
        lambda: {**linears()(), "c": nn.Linear(6, 8)},
        (4, 6),
        {**both, ("c.weight", 0): 8},
    ),
    *(beside(f"fft_{kind}", lambda x, kind=kind: getattr(torch.fft, kind)(x, dim=1).abs()) for kind in KINDS),
    *(on_images(f"fft_{kind}2", lambda x, kind=kind: getattr(torch.fft, f"{kind}2")(x).abs()) for kind in KINDS),
    *(on_images(f"fft_{kind}n", lambda x, kind=kind: getattr(torch.fft, f"{kind}n")(x, dim=(2, 3)).abs()) for kind in KINDS),
    *(beside(f"fft_{name}", lambda x, name=name: getattr(torch.fft, name)(x, dim=1)) for name in ("fftshift", "ifftshift")),
    beside("_fft_c2c", lambda x: aten._fft_c2c(torch.complex(x, x), [1], 0, True).abs()),
    beside("_fft_r2c", lambda x: aten._fft_r2c(x, [1], 0, True).abs()),
    beside("_fft_c2r", lambda x: aten._fft_c2r(torch.complex(x, x), [1], 0, 4)),
    *(around(op, lambda x, op=op: getattr(torch, op)(torch.complex(x, x)).abs()) for op in COMPLEX),
    around("imag", lambda x: torch.complex(x, x * 2).imag),
    around("angle", lambda x: torch.complex(x, x * 2).angle()),
    around("polar", lambda x: torch.polar(x, x).real),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
