from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from tests.graph.rules.cases import Case, goes_as_it_says, stands_in_the_program


def recurrent(kind: type[nn.RNNBase], **how: Any) -> Case:
    directions = 2 if how.get("bidirectional") else 1
    layers = lambda: {"a": nn.Linear(6, 5), "r": kind(5, 8, batch_first=True, **how), "b": nn.Linear(8 * directions, 3)}  # noqa: E731
    op = {nn.LSTM: "lstm", nn.GRU: "gru"}.get(kind, f"rnn_{how.get('nonlinearity', 'tanh')}")
    goes = {("a.weight", 0): 5, ("r.weight_ih_l0", 1): 5, ("r.weight_hh_l0", 1): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(m.r(m.a(x))[0]), layers, (2, 4, 6), goes, {}, f"{op} {how}")


def with_states(m: Any, x: Tensor) -> Tensor:
    state = torch.ones(1, x.shape[0], 8, dtype=x.dtype).cumsum(2)
    return m.b(m.r(m.a(x), (state, state))[0])


def cell(op: str, kind: type[nn.RNNCellBase], **how: Any) -> Case:
    """Three steps of a cell, one after another."""

    def run(m: Any, x: Tensor) -> Tensor:
        states = None
        for t in range(3):
            states = m.r(m.a(x[:, t]), states)
        return m.b(states[0] if isinstance(states, tuple) else states)

    layers = lambda: {"a": nn.Linear(6, 5), "r": kind(5, 8, **how), "b": nn.Linear(8, 3)}  # noqa: E731
    goes = {("a.weight", 0): 5, ("r.weight_ih", 1): 5, ("r.weight_hh", 1): 8, ("b.weight", 1): 8}
    return Case((op,), run, layers, (2, 4, 6), goes, {}, f"{op} {how}")


CASES = [
    cell("lstm_cell", nn.LSTMCell),
    cell("gru_cell", nn.GRUCell),
    cell("gru_cell", nn.GRUCell, bias=False),
    cell("rnn_tanh_cell", nn.RNNCell),
    cell("rnn_relu_cell", nn.RNNCell, nonlinearity="relu"),
    Case(
        ("gru_cell",),
        lambda m, x: m.b(m.r(m.a(x), torch.ones(x.shape[0], 8, dtype=x.dtype).cumsum(1))),
        lambda: {"a": nn.Linear(6, 5), "r": nn.GRUCell(5, 8), "b": nn.Linear(8, 3)},
        (4, 6),
        {("a.weight", 0): 5},
        {("r.weight_hh", 1): "given its states"},
        "a cell with fixed states",
    ),
    *(
        recurrent(kind, **how)
        for kind in (nn.LSTM, nn.GRU)
        for how in ({}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False})
    ),
    recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    recurrent(nn.RNN),
    recurrent(nn.RNN, nonlinearity="relu"),
    Case(
        ("lstm",),
        lambda m, x: m.b(m.r(m.a(x), (m.s + x[None, :, 0, :1] * 0, m.s + x[None, :, 0, :1] * 0))[0]),
        lambda: {
            "a": nn.Linear(6, 5),
            "r": nn.LSTM(5, 8, batch_first=True),
            "b": nn.Linear(8, 3),
            "s": nn.Parameter(torch.randn(1, 1, 8)),
        },
        (2, 4, 6),
        {("r.weight_hh_l0", 1): 8, ("s", 2): 8},
        {},
        "learnt states",
    ),
    Case(
        ("lstm",),
        with_states,
        lambda: {"a": nn.Linear(6, 5), "r": nn.LSTM(5, 8, batch_first=True), "b": nn.Linear(8, 3)},
        (2, 4, 6),
        {("a.weight", 0): 5},
        {("r.weight_hh_l0", 1): "given its states"},
        "fixed states",
    ),
    Case(
        ("lstm",),
        lambda m, x: m.b(m.r(m.a(x))[0]),
        lambda: {"a": nn.Linear(6, 5), "r": nn.LSTM(5, 8, proj_size=4), "b": nn.Linear(4, 3)},
        (2, 4, 6),
        {},
        {("a.weight", 0): "not understood", ("r.weight_hh_l0", 0): "not understood"},
        "lstm with projections",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_one_hidden_unit_stays(kind: type[nn.RNNBase]) -> None:
    net = nn.ModuleDict({"a": nn.Linear(6, 5), "r": kind(5, 1, batch_first=True)})
    net.forward = lambda x: net["r"](net["a"](x))[0]  # type: ignore[method-assign]
    graph = channel_graph(net, (torch.randn(2, 4, 6),))
    assert graph.groups == ()
    assert "is not understood" in graph.pinned["a.weight", 0]
