from __future__ import annotations

import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove


class Steps(nn.Module):
    """A cell over steps; its first state has a size in code, and is joined to what each step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Linear(5, 6), nn.GRUCell(14, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        for step in range(2):
            state = self.cell(torch.cat([self.stem(x[:, step]).relu(), state], 1), state)
        return self.out(state)


def test_a_first_state_of_a_size_in_code_goes_with_the_hidden_units():
    net, x = Steps().double().eval(), torch.randn(2, 2, 5, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    hidden = next(group for group in graph.groups if ("cell.weight_hh", 1) in group.places)
    assert hidden.channels == 8 and graph.sized == {"": False}
    assert {place: indices.shape[1] for place, indices in hidden.places.items()} == {
        **{(f"cell.{name}", 0): 3 for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        **dict.fromkeys((("cell.weight_ih", 1), ("cell.weight_hh", 1), ("out.weight", 1)), 1),
    }
    mask_channels_(net, graph, [torch.arange(group.channels).numpy() % 2 == 0 for group in graph.groups])
    wanted = net(x)
    assert remove(net, x, measure=False).refused == {}
    assert net.cell.hidden_size == 4 and net.cell.input_size == 7
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-12)


def test_a_first_state_stays_where_code_stays():
    graph = channel_graph(Steps().double().eval(), (torch.randn(2, 2, 5, dtype=torch.float64),), rewrite=False)
    assert not any(("cell.weight_hh", 1) in group.places for group in graph.groups)


class Padded(nn.Module):
    """A shortcut that is made wider with zeros; half of its channels are added to nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Linear(4, 6), nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        wide = torch.cat([x, torch.zeros(x.shape[0], 4, dtype=x.dtype)], 1)
        return self.out(self.norm(wide + self.b(x)))


def test_zeros_beside_channels_are_known_to_be_zero():
    net, x = Padded().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    graph = channel_graph(net, (x,))
    assert sum(g.channels for g in graph.groups if ("norm.weight", 0) in g.places) == 10
    mask_channels_(net, graph, [torch.arange(group.channels).numpy() % 2 == 0 for group in graph.groups])
    wanted = net(x)
    assert remove(net, x, measure=False).refused == {}
    assert net.norm.weight.shape == (5,)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-12)
