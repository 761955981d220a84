from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.ops import DeformConv2d, nms, roi_align, roi_pool

from tests.graph.rules.cases import Case, both, convs, goes_as_it_says, linears, over_channels


def boxes(x: Tensor) -> Tensor:
    """Boxes from the first two columns, two units large."""
    return torch.cat([x[:, :2], x[:, :2] + 2], 1)


def looks_at_inputs(m: Any, x: Tensor) -> Tensor:
    """Whatever the inputs' values decide, the channels of hidden layers do not hear of it."""
    y, first = m.a(x), x[:, 0]
    if x.sum() > 0 and torch.equal(x, x) and torch.allclose(x, x):
        y = y * first.max().item()
    rows = [first.nonzero()[:, 0], first.nonzero(as_tuple=True)[0], torch.argwhere(first)[:, 0], nms(boxes(x), first, 0.1)]
    seen = [x.masked_select(x > 0), torch.bincount((first > 0).long()), torch.unique(x), torch.unique(x, dim=0)]
    seen += [torch.unique_consecutive(x), torch.tensor(x.tolist())]
    return torch.stack([m.b(y[at]).sum(0) for at in rows]) + sum(float(one.sum()) for one in seen)


def pooled(pool: Any) -> Any:
    """A pool of two boxes of each image."""
    return lambda m, x: m.b(pool(m.a(x), [boxes(x[0, 0, :2, :2])] * len(x), 2))


def of_lengths(m: Any, x: Tensor) -> Tensor:
    """Sequences of 4, 2 and 1 steps."""
    packed = pack_padded_sequence(m.a(x).tanh(), torch.tensor([4, 2, 1]), batch_first=True)
    return m.b(pad_packed_sequence(m.r(packed)[0], batch_first=True)[0])


READING = ("item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount")
CASES = [
    Case(
        (*READING, "nms", "_unique2", "unique_dim", "unique_consecutive", "seen", "leaving"),
        looks_at_inputs,
        linears(),
        (4, 6),
        both,
        {},
        "values of inputs",
    ),
    Case(
        ("nms",),
        lambda m, x: m.b(x[nms(m.a(x), x[:, 0], 0.5)]),
        lambda: {"a": nn.Linear(6, 4), "b": nn.Linear(6, 3)},
        (4, 6),
        {},
        {("a.weight", 0): "looks at its values"},
        "boxes",
    ),
    Case(
        ("masked_select",),
        lambda m, x: m.b(m.a(x)) + m.a(x).masked_select(m.a(x) > 0).sum(),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "looks at its values"},
        "chosen values of channels",
    ),
    Case(
        ("leaving",),
        lambda m, x: m.b(m.a(x)) + max(map(max, m.a(x).tolist())),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "leave torch"},
        "values of channels in Python",
    ),
    *(
        Case(
            ("_pack_padded_sequence", "_pad_packed_sequence"),
            of_lengths,
            lambda kind=kind: {"a": nn.Linear(6, 8), "r": kind(8, 5, 2, batch_first=True), "b": nn.Linear(5, 3)},
            (3, 4, 6),
            {("a.weight", 0): 8, ("r.weight_ih_l0", 1): 8, ("r.weight_hh_l1", 1): 5, ("b.weight", 1): 5},
            {},
            f"packed {kind.__name__}",
        )
        for kind in (nn.LSTM, nn.GRU)
    ),
    Case(("roi_align",), pooled(roi_align), convs(), (2, 3, 6, 6), both),
    Case(("roi_pool",), pooled(roi_pool), convs(), (2, 3, 6, 6), both),
    *(
        Case(
            ("deform_conv2d",),
            lambda m, x: m.b(m.d(m.a(x), m.o(x))),
            convs(back=4, o=lambda: nn.Conv2d(3, 18, 3, padding=1), d=lambda g=g: DeformConv2d(8, 4, 3, padding=1, groups=g)),
            (2, 3, 6, 6),
            {("a.weight", 0): 8, ("d.weight", 1): 8, ("d.weight", 0): 4, ("b.weight", 1): 4} if g == 1 else {},
            {("o.weight", 0): "places" if g == 1 else "not understood"},
            f"deform_conv2d of {g}",
        )
        for g in (1, 2)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


def test_a_decision_over_channels_keeps_them() -> None:
    goes_as_it_says(over_channels("argmax", lambda y: y.take_along_dim(y.argmax(1, keepdim=True), 1)[y[:, 0] > 0].repeat(1, 8)))
