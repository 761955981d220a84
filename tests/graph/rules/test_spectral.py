from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graph.rules.cases import Case, both, goes_as_it_says, linears, on_images, over_channels, stands_in_the_program


def turned(x):
    """Rotary positions, as Llama's own code has them."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    angle = torch.arange(4, device=x.device)[:, None] * torch.ones(2, dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def mixing(m, x):
    y = m.a(x).relu()
    return m.b(y + torch.fft.fft(y, dim=1).real * 0.1)


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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
