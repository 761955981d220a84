from __future__ import annotations

import pytest
import torch

from tests.graph.rules.cases import (
    Case,
    around,
    aten,
    beside,
    goes_as_it_says,
    over_channels,
    over_zeros,
    stands_in_the_program,
)

CASES = [
    over_channels("softmax", lambda x: x.softmax(-1)),
    over_channels("log_softmax", lambda x: x.log_softmax(1)),
    over_channels("_softmax", lambda x: aten._softmax(x, -1, False)),
    over_channels("_log_softmax", lambda x: aten._log_softmax(x, -1, False)),
    over_zeros("cumsum", lambda x: x.cumsum(1)),
    over_zeros("cumsum", lambda x: x.exp().cumsum(1), "exp makes it something else"),
    around("flip", lambda x: x.flip(1)),
    over_channels("cumprod", lambda x: x.cumprod(1)),
    over_channels("triu", lambda x: x.triu()),
    over_zeros("cdist", lambda x: x * torch.cdist(x, x.flip(0)).mean()),
    over_zeros("_cdist_forward", lambda x: x * aten._cdist_forward(x, x.flip(0), 2.0, None).mean()),
    over_channels("tril", lambda x: x.tril()),
    over_zeros("cdist", lambda x: x * aten.cdist(x, x.flip(0)).mean()),
    over_zeros("cdist", lambda x: x * aten.cdist(x.sigmoid(), x).mean(), "it is not zero where its channel is silent"),
    over_channels("roll", lambda x: x.roll(1, 1)),
    over_channels("roll", lambda x: x.roll(1)),
    *(over_channels(op, lambda x, op=op: getattr(aten, op)(x, 1, True) + x) for op in ("argmax", "argmin")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)(1, keepdim=True) + x) for op in ("amax", "amin")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)(1, keepdim=True) + x) for op in ("logsumexp", "prod")),
    *(over_channels(op, lambda x, op=op: getattr(x > 0, op)(1, keepdim=True) + x) for op in ("any", "all")),
    *(over_channels(op, lambda x, op=op: getattr(x, op)() + x) for op in ("mean", "max", "min", "median")),
    *(
        over_channels(op, lambda x, op=op: getattr(torch, op)(x, 1, keepdim=True)[0] + x)
        for op in ("max", "min", "median", "mode")
    ),
    *(over_channels(op, lambda x, op=op: getattr(torch, op)(x, 1)[0] + x) for op in ("sort", "cummax", "cummin")),
    *(over_channels(op, lambda x, op=op: getattr(torch, op)(x, 8, 1)[0] + x) for op in ("topk",)),
    over_channels("kthvalue", lambda x: torch.kthvalue(x, 3, 1, keepdim=True)[0] + x),
    over_channels("aminmax", lambda x: torch.aminmax(x, dim=1, keepdim=True)[0] + x),
    *(over_zeros(op, lambda x, op=op: getattr(torch, op)(x, 1, keepdim=True)[0] + x) for op in ("var_mean", "std_mean")),
    *(over_zeros(op, lambda x, op=op: getattr(x, op)(1, keepdim=True) + x) for op in ("mean", "var", "std")),
    over_zeros("sum", lambda x: x.sum(1, keepdim=True) * x),
    over_zeros("linalg_vector_norm", lambda x: x.norm(dim=1, keepdim=True) * x),
    over_zeros("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, 1, 1, keepdim=True) * x),
    over_zeros("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, float("inf")) * x),
    over_zeros("norm", lambda x: aten.norm(x, 2) * x),
    over_zeros("sum", lambda x: x.sigmoid().sum(1, keepdim=True) * x, "sigmoid makes it something else"),
    over_channels("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, float("-inf"), 1, keepdim=True) * x),
    over_zeros("cosine_similarity", lambda x: torch.cosine_similarity(x, x.sin(), 1)[:, None] * x),
    over_zeros("cosine_similarity", lambda x: torch.cosine_similarity(x, x.cos(), 1)[:, None] * x, "cos makes it"),
    beside("softmax", lambda x: x.softmax(1)),
    beside("log_softmax", lambda x: x.log_softmax(1)),
    beside("_softmax", lambda x: aten._softmax(x, 1, False)),
    beside("_log_softmax", lambda x: aten._log_softmax(x, 1, False)),
    beside("cumsum", lambda x: x.cumsum(1)),
    beside("flip", lambda x: x.flip(1)),
    beside("roll", lambda x: x.roll(1, 1)),
    *(beside(op, lambda x, op=op: getattr(aten, op)(x, 1).double()) for op in ("argmax", "argmin")),
    *(
        beside(op, lambda x, op=op: getattr(x, op)(1))
        for op in ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod")
    ),
    *(beside(op, lambda x, op=op: getattr(x > 0, op)(1).double()) for op in ("any", "all")),
    *(
        beside(op, lambda x, op=op: getattr(torch, op)(x, 1)[0])
        for op in ("max", "min", "median", "mode", "sort", "cummax", "cummin")
    ),
    *(beside(op, lambda x, op=op: getattr(torch, op)(x, 2, 1)[0]) for op in ("topk", "kthvalue")),
    beside("aminmax", lambda x: torch.aminmax(x, dim=1)[1]),
    *(beside(op, lambda x, op=op: getattr(torch, op)(x, 1)[0]) for op in ("var_mean", "std_mean")),
    beside("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, 2, 1)),
    beside("norm", lambda x: aten.norm(x, 2, [1])),
    around("max", lambda x: torch.max(x, x.exp() - 1)),
    around("min", lambda x: torch.min(x, x.exp() - 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
