import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.scratch.gating import Gating
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import make_plan
from tests.prune.scratch.nets import NETS, make


@pytest.mark.parametrize("name", list(NETS))
def test_gates_of_zero_are_the_network_without_the_channels(name: str) -> None:
    model, x = make(name)
    model.eval()
    graph = channel_graph(model, (x,))
    gating = Gating(model, graph)
    kept = [np.arange(group.channels) % 3 != 1 for group in graph.groups]
    gates = torch.from_numpy(np.concatenate(kept)).double()
    found = torch.func.functional_call(model, gating.tensors(gates), (x,))
    small = copy.deepcopy(model)
    Surgery(small, make_plan(small, graph, kept))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(found, small(x))


def test_a_gate_stands_behind_the_norm_and_before_the_relu_as_published() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)
    model, x = nn.Sequential(*layers).double(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    gates = torch.tensor([0.3, 1.0, 0.0, 0.7], dtype=torch.float64)
    gating = Gating(model, channel_graph(model, (x,)))
    found = torch.func.functional_call(model, gating.tensors(gates), (x,))  # norms in training mode
    conv, norm, _, pool, last = layers
    wanted = last(pool(F.relu(gates.view(1, 4, 1, 1) * norm(conv(x)))))
    torch.testing.assert_close(found, wanted)


class Mean(nn.Module):
    """No weight reads the hidden channels one by one: their mean is read."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(3, 4), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.hidden(x)).mean(1, keepdim=True))


def test_channels_that_no_weight_reads_get_their_gates_where_they_are_made() -> None:
    torch.manual_seed(0)
    model, x = Mean().double(), torch.randn(5, 3, dtype=torch.float64)
    gates = torch.tensor([0.5, 1.0, 0.0, 0.25], dtype=torch.float64)
    gating = Gating(model, channel_graph(model, (x,), exact=False))
    found = torch.func.functional_call(model, gating.tensors(gates), (x,))
    torch.testing.assert_close(found, model.last((gates * F.relu(model.hidden(x))).mean(1, keepdim=True)))


def test_gates_are_split_by_group() -> None:
    model, x = make("grouped")
    gating = Gating(model, channel_graph(model, (x,)))
    parts = gating.split(torch.arange(sum(gating.counts)))
    assert [len(parts[name]) for name in gating.names] == list(gating.counts)
    assert torch.cat(list(parts.values())).tolist() == list(range(sum(gating.counts)))
