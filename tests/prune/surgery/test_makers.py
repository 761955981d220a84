from __future__ import annotations

import torch
from torch import nn

from fasterai.prune.surgery.makers import MAKERS, traced_makers
from fasterai.prune.surgery.tracing import traced


class Counting(nn.Module):
    def forward(self, x):
        return x + torch.zeros(x.shape[0], 4) + torch.arange(x.shape[1])


def test_a_trace_takes_up_tensors_that_code_makes_of_sizes():
    graph = traced(Counting(), {}, False)
    assert {torch.zeros, torch.arange} <= {node.target for node in graph.nodes}
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.fx.GraphModule(nn.Module(), graph)(x), Counting()(x), rtol=0, atol=0)


def test_afterwards_torch_is_as_it_was():
    before = [getattr(torch, name) for name in MAKERS]
    with traced_makers():
        assert torch.equal(torch.ones(2), torch.full((2,), 1.0))
    assert [getattr(torch, name) for name in MAKERS] == before
