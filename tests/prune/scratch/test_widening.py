import pytest
import torch

from fasterai.graph.channels import channel_graph
from fasterai.prune.scratch.renewal import renewed
from fasterai.prune.scratch.widening import widen_
from tests.prune.scratch.nets import make

# Of each network the sizes of some weights and attributes with half as many channels more in every group.
WIDE = {
    "residual": {
        "stem.weight": (9, 3, 3, 3),
        "branch.0.weight": (6, 9, 3, 3),
        "branch.1.num_features": 6,
        "head.in_features": 9,
    },
    "depthwise": {"3.weight": (12, 1, 3, 3), "3.groups": 12, "4.running_var": (12,), "8.weight": (4, 12)},
    "grouped": {"2.groups": 2, "2.in_channels": 12, "2.weight": (18, 6, 3, 3), "6.weight": (4, 72)},
    "attention": {"attention.in_proj_weight": (72, 24), "attention.num_heads": 6, "attention.out_proj.weight": (24, 24)},
    "heads": {"body.query.weight": (24, 12), "body.out.in_features": 24},
    "functional": {"first": (12, 3, 3, 3), "second": (4, 12, 1, 1)},
}


@pytest.mark.parametrize("name", list(WIDE))
def test_every_group_gets_more_channels(name: str) -> None:
    model, x = make(name)
    graph = channel_graph(model, (x,))
    widen_(model, graph, {group.name: group.channels // 2 for group in graph.groups})
    for path, wanted in WIDE[name].items():
        owner, _, own = path.rpartition(".")
        found = getattr(model.get_submodule(owner), own)
        assert (tuple(found.shape) if isinstance(found, torch.Tensor) else found) == wanted, path
    renewed(model, None, 0)
    assert model(x).shape == (4, 5 if name == "residual" else 4)
    torch.autograd.backward(model(x).sum())
    assert all(p.grad is not None for p in model.parameters())
