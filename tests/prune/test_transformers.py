"""Random transformers lose half of every group, the stream under their norms among them, and compute the same."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove
from tests.sweep.check import difference
from tests.transformer_nets import Design, Transformer

DESIGNS = st.builds(
    lambda heads, reads, **more: Design(heads=heads[0], shared=heads[1], reads=reads[0], tied=reads[1], **more),
    depth=st.integers(1, 2),
    heads=st.sampled_from([(2, 1), (4, 1), (4, 2)]),
    norm=st.sampled_from(["layer", "rms", "own rms"]),
    pre=st.booleans(),
    positions=st.sampled_from(["learned", "rotary", "waves", "none"]),
    reads=st.sampled_from([("tokens", False), ("tokens", True), ("patches", False)]),
    token=st.booleans(),
    gated=st.booleans(),
    fused=st.booleans(),
    bias=st.booleans(),
    causal=st.booleans(),
)


#: Without the search for a smaller failing example: each takes an export.
FEW = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@FEW
@example(Design(depth=2, pre=True, token=True, reads="patches", fused=True))  # a ViT
@example(Design(heads=4, shared=2, norm="own rms", positions="rotary", tied=True, gated=True, bias=False, causal=True))
@example(Design(pre=False, norm="layer", causal=True, tied=True))
@example(Design(norm="rms", positions="rotary", depth=2))
@example(Design(positions="waves", fused=True))
@given(DESIGNS)
def test_half_of_every_group_goes_and_outputs_and_training_go_on(design):
    torch.manual_seed(0)
    model = Transformer(design).eval()
    x = model.inputs(2, 6)
    others = [model.inputs(3, 9, 1), model.inputs(1, 2, 2)]
    graph, dice = channel_graph(model, (x,)), np.random.default_rng(0)
    mask_channels_(model, graph, [dice.permutation(g.channels) >= g.channels // 2 for g in graph.groups])
    with torch.no_grad():
        before = [model(one) for one in (x, *others)]
    removal = remove(model, x, measure=False)
    with torch.no_grad():
        after = [model(one) for one in (x, *others)]
    assert difference(before, after) < 1e-9
    stays = design.positions == "waves"  # what is added there is not zero, and norms average over it
    assert removal.refused == {}
    assert [m / n for n, m in removal.groups.values()] == [0.5] * (2 * design.depth + (not stays))
    assert model.head.weight.shape[1] == design.stream // (1 if stays else 2)
    learns(model.train(), x)


def learns(model: Transformer, x: torch.Tensor) -> None:
    """A few steps lower the loss, and every parameter takes part."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    goal = torch.randn(model(x).shape, dtype=torch.float64)
    losses = []
    for _ in range(4):
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())
