"""Channels that layer norms average over let go: `exact=False`, as a table in Markdown.

`python -m tests.sweep.streams`. Half of the channels of every group are silenced at random and removed; weights are random,
scaled as for the other tables.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import Removal, mask_channels_, remove
from tests.sweep.check import randomize_

__all__ = ["half_removed", "main"]

SIDE = 64
NETWORKS: dict[str, dict[str, int]] = {"convnext_tiny": {}, "vit_b_16": {"image_size": SIDE}}


def half_removed(model: nn.Module, x: Tensor, exact: bool) -> tuple[Removal, float]:
    """What came of it, and how the outputs correlate with those of the masked model; the model is changed."""
    graph, dice = channel_graph(model, (x,), exact), np.random.default_rng(0)
    mask_channels_(model, graph, [dice.permutation(g.channels) >= g.channels // 2 for g in graph.groups])
    with torch.no_grad():
        masked = model(x)
        removal = remove(model, x, exact=exact, measure=False)
        both = torch.stack([masked.flatten(), model(x).flatten()])
    return removal, float(torch.corrcoef(both)[0, 1])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {SIDE} x {SIDE} pixels, batch 2\n")
    print("| network | parameters left, exact | parameters left, `exact=False` | outputs moved by | correlation |")
    print("|---|--:|--:|--:|--:|")
    for name, settings in NETWORKS.items():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **settings).eval()
        x = torch.randn(2, 3, SIDE, SIDE)
        randomize_(model, (x,))
        exact, _ = half_removed(copy.deepcopy(model), x, True)
        removal, correlation = half_removed(model, x, False)
        left = [found.parameters[1] / found.parameters[0] for found in (exact, removal)]
        print(f"| {name} | {left[0]:.3f} | {left[1]:.3f} | {removal.difference:.3f} | {correlation:.3f} |", flush=True)


if __name__ == "__main__":
    main()
