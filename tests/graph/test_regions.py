"""Regions of an export: their operations in the place of their call, nested ones and branches too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasterai.graph.channels import channel_graph
from fasterai.graph.exported import exported
from fasterai.graph.regions import is_transformed
from fasterai.prune.removal import mask_channels_, remove

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers and a region around the second."""

    def __init__(self, region: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.region = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), region

    def inside(self, y: Tensor) -> Tensor:
        return self.b(y).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.region(self, self.a(x).relu(), x))


def autocast(m: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.inside(y)


def without_gradients(m: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        return m.inside(y)


def nested(m: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        left, right = y, y * 2
        with torch.set_grad_enabled(not torch.is_grad_enabled()), torch.autocast("cpu", enabled=False):
            return m.inside(left + right)


def checkpointed(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(m.inside, y, use_reentrant=False)


def checkpointed_again(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(m.inside, y, use_reentrant=True)


def mapped(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return torch.vmap(m.inside)(y)


def mapped_twice(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(m.inside))(y.unsqueeze(0)).squeeze(0)


def branches(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, m.inside, lambda y: m.b(y) * 2, (y,))


WHOLE = (autocast, without_gradients, nested, checkpointed, checkpointed_again, mapped, mapped_twice, branches)


@pytest.mark.parametrize("region", WHOLE)
def test_channels_go_through_a_region(region: Callable[..., Tensor]) -> None:
    net = Block(region).double().eval()
    graph = channel_graph(net, (X,))
    assert sorted(g.name for g in graph.groups) == ["a.weight", "b.weight"]
    mask_channels_(net, graph, [torch.arange(8).numpy() % 2 == 0] * len(graph.groups))
    wanted = [net(X), net(-X)]
    removal = remove(net, X, measure=False)
    assert (removal.refused, removal.parameters) == ({}, (130, 50))  # 40 + 72 + 18 numbers, then 20 + 20 + 10
    for given, y in zip((X, -X), wanted, strict=True):
        torch.testing.assert_close(net(given), y)


def targets(region: Callable[..., Tensor]) -> list[str]:
    (program,) = exported(Block(region).double().eval(), (X,))
    return [str(n.target) for n in program.program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("region", [autocast, without_gradients, nested])
def test_no_call_of_a_body_is_left(region: Callable[..., Tensor]) -> None:
    found = targets(region)
    assert found.count("aten.linear.default") == 3
    assert not any("wrap" in name or "submod" in name for name in found)


def test_both_branches_are_followed() -> None:
    found = targets(branches)
    assert found.count("aten.linear.default") == 4 and found.count("aten.where.self") == 1


def test_a_call_that_is_none_of_those_stays_and_fixes_what_it_reads() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    def looped(m: Any, y: Tensor, x: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, m.inside(y)), (count, y))[1]

    graph = channel_graph(Block(looped).double().eval(), (X,))
    assert graph.groups == () and "while_loop" in graph.pinned["a.weight", 0]


def test_vmap_is_told_from_operations_that_name_their_dimensions() -> None:
    with torch.no_grad():
        programs = [torch.export.export(Block(r).double().eval(), (X,), strict=False) for r in (mapped, autocast)]
    assert [is_transformed(one.graph) for one in programs] == [True, False]
    assert "vmap" in channel_graph(Block(mapped).double().eval(), (X,)).recorded
    assert channel_graph(Block(autocast).double().eval(), (X,)).recorded == ""


def test_a_gradient_inside_is_no_record_and_stays() -> None:
    """`torch.func.grad` needs autograd, which a record does without: the export is followed as far as it goes."""

    def slope(m: Any, y: Tensor, x: Tensor) -> Tensor:
        return m.inside(y) + torch.func.grad(lambda z: (z * z).sum())(x).sum(1, keepdim=True)

    graph = channel_graph(Block(slope).double().eval(), (X,))
    assert sorted(g.name for g in graph.groups) == ["a.weight", "b.weight"]
