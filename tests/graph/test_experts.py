"""Mixtures are found by what gates and stacks do, whatever the product is written as; nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.experts import expert_graph

COUNT = 4


def blend_einsum(g: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("be,eoi->boi", g, w)


def blend_tensordot(g: Tensor, w: Tensor) -> Tensor:
    return torch.tensordot(g, w, dims=([1], [0]))


def blend_sum(g: Tensor, w: Tensor) -> Tensor:
    return (g[:, :, None, None] * w).sum(1)


def blend_matrix(g: Tensor, w: Tensor) -> Tensor:
    return (g @ w.flatten(1)).unflatten(1, w.shape[1:])


class Blended(nn.Module):
    def __init__(self, blend=blend_einsum, hidden=6):
        super().__init__()
        self.blend = blend
        self.w = nn.Parameter(torch.randn(COUNT, hidden, 5))
        self.b = nn.Parameter(torch.randn(COUNT, hidden))
        self.v = nn.Parameter(torch.randn(COUNT, 3, hidden))
        self.gate = nn.Sequential(nn.Linear(5, 7), nn.ELU(), nn.Linear(7, COUNT))

    def forward(self, x):
        g = self.gate(x).softmax(-1)
        h = torch.baddbmm((g @ self.b)[..., None], self.blend(g, self.w), x[..., None]).relu()
        return torch.bmm(self.blend(g, self.v), h).squeeze(-1)


class Stacked(nn.Module):
    """Each expert runs; the outputs are blended."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(COUNT, 5, 6)), nn.Parameter(torch.randn(COUNT, 6, 3))
        self.gate = nn.Linear(5, COUNT, bias=False)

    def forward(self, x):
        y = torch.bmm(torch.bmm(x.expand(len(self.w), -1, -1), self.w).relu(), self.v)
        return torch.einsum("be,ebo->bo", self.gate(x).softmax(-1), y)


class Turned(Stacked):
    """The gate's matrix is transposed where it is multiplied."""

    def forward(self, x):
        y = torch.bmm(torch.bmm(x.expand(len(self.w), -1, -1), self.w).relu(), self.v)
        return torch.einsum("be,ebo->bo", (x @ self.gate.weight.T).softmax(-1), y)


class Chosen(nn.Module):
    """The matrices of the two highest experts are looked up for each row; the gate's matrix is (in, expert)."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(COUNT, 6, 5)), nn.Parameter(torch.randn(COUNT, 3, 6))
        self.router = nn.Parameter(torch.randn(5, COUNT))

    def forward(self, x):
        shares, numbers = (x @ self.router).softmax(-1).topk(2, -1)
        rows, shares = x.repeat_interleave(2, 0)[..., None], (shares / shares.sum(-1, keepdim=True)).flatten()
        y = torch.bmm(self.v[numbers.flatten()], torch.bmm(self.w[numbers.flatten()], rows).relu())[..., 0]
        return (y * shares[:, None]).unflatten(0, (-1, 2)).sum(1)


def found(model: nn.Module, shape=(7, 5)):
    torch.manual_seed(0)
    return expert_graph(model, (torch.randn(shape),))


@pytest.mark.parametrize("blend", [blend_einsum, blend_tensordot, blend_sum, blend_matrix])
def test_blended_experts_are_found_with_their_gate_and_biases(blend):
    graph = found(Blended(blend))
    assert graph.experts == {"gate.2.weight": COUNT}
    assert set(graph.graph.groups[0].places) == {(n, 0) for n in ("w", "b", "v", "gate.2.weight", "gate.2.bias")}
    assert graph.gates == {"gate.2.weight": (("gate.2.weight", 0),)}
    assert graph.stacks == {"gate.2.weight": ("w", "v")}
    assert graph.top_k == {}


@pytest.mark.parametrize("kind", [Stacked, Turned])
def test_stacked_experts_are_found(kind):
    graph = found(kind())
    assert {n for n, _ in graph.graph.groups[0].places} == {"w", "v", "gate.weight"}
    assert graph.gates == {"gate.weight": (("gate.weight", 0),)}


def test_chosen_experts_are_found_with_how_many_are_chosen():
    graph = found(Chosen())
    assert graph.top_k == {"router": 2}
    assert graph.gates == {"router": (("router", 1),)}
    assert set(graph.graph.groups[0].places) == {("w", 0), ("v", 0), ("router", 1)}


def test_two_mixtures_have_names_and_gates_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Chosen(), Chosen()
            self.between = nn.Linear(3, 5)

        def forward(self, x):
            return self.b(self.between(self.a(x)))

    graph = found(Two())
    assert graph.gates == {"a.router": (("a.router", 1),), "b.router": (("b.router", 1),)}
    assert graph.stacks == {"a.router": ("a.w", "a.v"), "b.router": ("b.w", "b.v")}
    assert repr(graph) == "<ExpertGraph: 8 experts in 2 mixtures>"


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.ModuleList(nn.Linear(5, 3) for _ in range(COUNT)), nn.Linear(5, COUNT)

    def forward(self, x):
        return torch.einsum("be,beo->bo", self.gate(x).softmax(-1), torch.stack([e(x) for e in self.experts], 1))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1)), (7, 5)),
        (nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 3)), (7, 5)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 4, 8)),
        (Modules(), (7, 5)),
    ],
    ids=["a classifier", "a softmax between matrices", "attention", "experts that are modules"],
)
def test_what_is_no_mixture_of_stacks_is_not_taken_for_one(model, shape):
    assert found(model, shape).experts == {}
    assert "no mixture" in str(found(model, shape))
