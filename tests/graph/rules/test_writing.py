from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove
from tests.graph.rules.cases import Case, aten, both, goes_as_it_says, linears, stands_in_the_program

TO = torch.tensor([1, 0, 1, 2])


def graph(op: str, f: Callable[..., Tensor], name: str = "") -> Case:
    """Messages `(4 edges, 8 channels)` between two layers, and a tensor of 3 nodes."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x[0])
        return m.b(f(h, torch.zeros(3, h.shape[1], dtype=x.dtype)))

    return Case((op,), run, linears(), (1, 4, 6), both, {}, name or op)


def spread(h: Tensor) -> Tensor:
    """The nodes that messages go to, for each channel."""
    return TO[:, None].expand(-1, h.shape[1])


def written(name: str, f: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...] = (2, 4, 6), op: str = "copy") -> Case:
    return Case((op,), f, linears(), shape, both, {}, name)


def filled(m: Any, x: Tensor) -> Tensor:
    """Rows are written one by one, and read through a view that is older than they are."""
    h = m.a(x)
    out = torch.zeros(2, 4, h.shape[-1], dtype=x.dtype)
    seen = out.transpose(1, 2)
    for t in range(4):
        out[:, t] = h[:, t] * (t + 1)
    return m.b(seen.transpose(1, 2).relu())


def half_filled(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).clone()
    h[:, 1:3] = h[:, :2].exp()
    h[:, 0] = 0
    return m.b(h)


CASES = [
    Case(
        ("index_put",),
        lambda m, x: m.b((y := m.a(x).index_put((torch.tensor([1]),), torch.tensor(1.0, dtype=x.dtype))) * y.norm()),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "it is not zero where its channel is silent"},
        "ones written into zeros",
    ),
    graph("index_add", lambda h, zeros: zeros.index_add(0, TO, h)),
    graph("index_add", lambda h, zeros: zeros.index_add_(0, TO, h, alpha=2), "index_add in place"),
    graph("index_add", lambda h, zeros: torch.index_add(h[:3], -2, TO, h), "index_add, from behind"),
    graph("index_copy", lambda h, zeros: h.index_copy(0, TO[1:], zeros)),
    graph("index_reduce", lambda h, zeros: zeros.index_reduce(0, TO, h, "amax")),
    graph("index_select", lambda h, zeros: h.index_select(0, TO) + torch.index_select(h, dim=-2, index=TO)),
    graph("scatter", lambda h, zeros: zeros.scatter(0, spread(h), h)),
    graph("scatter", lambda h, zeros: h.scatter(0, spread(h), 0.5), "scatter of a number"),
    graph("scatter_add", lambda h, zeros: zeros.scatter_add_(0, spread(h), h)),
    graph("scatter_add", lambda h, zeros: zeros.scatter_add(-2, spread(h), h), "scatter_add, from behind"),
    graph("scatter_reduce", lambda h, zeros: zeros.scatter_reduce(0, spread(h), h, "mean", include_self=False)),
    graph("gather", lambda h, zeros: h.gather(0, spread(h)) + torch.gather(h, dim=-2, index=spread(h))),
    graph("take_along_dim", lambda h, zeros: aten.take_along_dim(h, spread(h), 0)),
    graph("index_put", lambda h, zeros: zeros.index_put((TO,), h, accumulate=True)),
    graph("index_put", lambda h, zeros: aten.index_put_(zeros, [TO[:3]], h[:3]) + h[:3], "index_put in place"),
    graph("slice_scatter", lambda h, zeros: torch.slice_scatter(h, zeros, dim=0, start=1) + h.slice_scatter(h.exp(), dim=1)),
    graph("select_scatter", lambda h, zeros: h.select_scatter(zeros[0] + h[1], 0, 2) + h.select_scatter(h[0], -2, -1)),
    written("rows written into zeros", filled),
    written("rows overwritten", half_filled),
    written("channels written after all", lambda m, x: m.b(torch.empty_like(m.a(x)).copy_(m.a(x).relu()))),
    Case(
        ("scatter",),
        lambda m, x: m.b(m.a(x).scatter(1, torch.zeros(4, 1, dtype=torch.int64), 0.5)),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "by number"},
        "scatter over channels",
    ),
    Case(
        ("scatter",),
        lambda m, x: m.b(m.a(x).scatter(0, torch.zeros(1, 3, dtype=torch.int64), 0.5)),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "first entries"},
        "scatter over the first channels",
    ),
    Case(
        ("gather",),
        lambda m, x: m.b(m.a(x).gather(1, torch.zeros(4, 8, dtype=torch.int64))),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "by number"},
        "gather over channels",
    ),
    Case(
        ("slice_scatter",),
        lambda m, x: m.b(m.a(x).slice_scatter(m.a(x)[:, :3].exp(), 1, 2, 5)),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "fixed positions"},
        "slice_scatter over channels",
    ),
    Case(
        ("index_put",),
        lambda m, x: m.b(m.a(x).index_put((torch.tensor([0, 2, 0])[:, None], torch.tensor([1, 2])), x[:3, :2])),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "by number"},
        "index_put over channels",
    ),
    Case(
        ("index_put",),
        lambda m, x: m.b(m.a(x).index_put((m.a(x) > 1e9,), torch.zeros((), dtype=x.dtype))),
        linears(),
        (4, 6),
        {},
        {("a.weight", 0): "indices"},
        "index_put at a mask",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops != ("copy",)], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)


def test_a_message_network_loses_the_channels_of_its_messages() -> None:
    """One round of messages: gathered by their sources, added by their targets."""

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.send, self.receive = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            messages = self.send(x)[edges[0]].relu()
            sums = messages.new_zeros(x.shape[0], messages.shape[1])
            return self.receive(sums.index_add_(0, edges[1], messages))

    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    net, inputs = Round(), (torch.randn(4, 6), edges)
    graph = channel_graph(net, inputs)
    mask_channels_(net, graph, [np.arange(group.channels) % 2 == 0 for group in graph.groups])
    wanted = net(*inputs)
    remove(net, inputs, measure=False)
    assert net.send.weight.shape == (8, 6)
    torch.testing.assert_close(net(*inputs), wanted)
