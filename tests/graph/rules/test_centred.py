from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.rules.centred import is_centred, squared

A = torch.randn(4, 3, 2, 2)


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def result(run: Callable[[Tensor], Tensor], x: Tensor = A) -> torch.fx.Node:
    graph = torch.export.export(Net(run), (x,), strict=False).graph
    return next(iter(graph.find_nodes(op="output"))).args[0][0]


CENTRED: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (lambda x: x - x.mean((1, 2, 3), keepdim=True), (1, 2, 3)),
    (lambda x: x - x.mean((1, 2, 3)).view(4, 1, 1, 1).expand_as(x), (3, 1, 2)),
    (lambda x: x - x.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True), (1, 2, 3)),
    (lambda x: (x - x.mean((1, 2, 3), keepdim=True)).view(4, -1), (1,)),
    (lambda x: (y := x.flatten(1)) - y.mean(1, keepdim=True) * 0.5, (1,)),
    (lambda x: x - torch.var_mean(x, 1, keepdim=True)[1], (1,)),
]


@pytest.mark.parametrize("case", range(len(CENTRED)))
def test_a_mean_that_was_taken_away_is_found(case: int) -> None:
    run, dims = CENTRED[case]
    assert is_centred(result(run), dims)


@pytest.mark.parametrize(
    ("run", "dims"),
    [
        (lambda x: x - x.mean((1, 2, 3), keepdim=True), (1, 2)),
        (lambda x: x - x.mean((2, 3), keepdim=True), (1, 2, 3)),
        (lambda x: x - x.amax((1, 2, 3), keepdim=True), (1, 2, 3)),
        (lambda x: x - x.exp().mean((1, 2, 3), keepdim=True), (1, 2, 3)),
        (lambda x: (x - x.mean((1, 2, 3), keepdim=True)).view(2, -1), (1,)),
        (lambda x: x.add(x.mean((1, 2, 3), keepdim=True)), (1, 2, 3)),
        (lambda x: x - 1, (1, 2, 3)),
    ],
)
def test_another_tensor_is_none(run: Callable[[Tensor], Tensor], dims: tuple[int, ...]) -> None:
    assert not is_centred(result(run), dims)


def test_a_mean_over_the_other_side_of_a_square_is_another() -> None:
    x = torch.randn(3, 3)
    assert is_centred(result(lambda x: x - x.mean(1)[:, None], x), (1,))
    assert not is_centred(result(lambda x: x - x.mean(1), x), (1,))


def test_squares() -> None:
    for run in (lambda x: x**2, lambda x: x * x, torch.square):
        assert squared(result(run)).name == "x"
    for run in (lambda x: x**3, lambda x: x * x.exp(), torch.exp):
        assert squared(result(run)) is None
