from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.rules.cases import Case, goes_as_it_says, stands_in_the_program


def keys(c: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {**{n: nn.Linear(6, c) for n in "qkv"}, "o": nn.Linear(c, 6)}


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def sdpa(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(heads(layer(x), 4) for layer in (m.q, m.k, m.v)))
    return m.o(y.transpose(1, 2).flatten(2))


def sdpa_masked(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(heads(layer(x), 4) for layer in (m.q, m.k, m.v)), attn_mask=m.mask)
    return m.o(y.transpose(1, 2).flatten(2))


def by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
    return m.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.o(y.transpose(1, 2).flatten(2))


def repeated_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grouped_layers() -> dict[str, Any]:
    return {"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "o": nn.Linear(16, 6)}


CASES = [
    Case(
        ("scaled_dot_product_attention",),
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), scale=0.5)),
        keys(),
        (2, 5, 6),
        {("q.weight", 0): 8, ("k.weight", 0): 8, ("v.weight", 0): 8, ("o.weight", 1): 8},
        {},
        "one head, a scale of its own",
    ),
    Case(
        ("scaled_dot_product_attention",),
        sdpa,
        keys(),
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("v.weight", 0): 2, ("o.weight", 1): 2},
    ),
    Case(
        ("scaled_dot_product_attention",),
        sdpa_masked,
        lambda: {**keys()(), "mask": nn.Parameter(torch.randn(2, 5, 5))},
        (2, 5, 6),
        {("q.weight", 0): 2, ("mask", 0): 2},
        {("mask", 1): "computes across it", ("mask", 2): "computes across it"},
        "attention with a learnt bias",
    ),
    Case(
        ("scaled_dot_product_attention",),
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        keys(),
        (2, 5, 6),
        {("v.weight", 0): 8, ("o.weight", 1): 8},
        {("q.weight", 0): "width of a head"},
        "attention with one head",
    ),
    Case(
        ("scaled_dot_product_attention",),
        grouped_queries,
        grouped_layers,
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("v.weight", 0): 2, ("o.weight", 1): 2},
        {},
        "grouped queries",
    ),
    Case(
        ("repeat_interleave",),
        repeated_keys,
        grouped_layers,
        (2, 5, 6),
        {("q.weight", 0): 2, ("k.weight", 0): 2, ("o.weight", 1): 2},
    ),
    Case(("matmul", "softmax"), by_hand, keys(), (2, 5, 6), {("q.weight", 0): 2, ("v.weight", 0): 2}, {}, "attention by hand"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
