"""Seconds by the number of layers: `python tests/benchmarks/depth.py [LAYERS ...]`, by default 250 and 1000.

Stacks of small layers (8 channels), so that what is measured is the work per layer and not that on weights. A step whose time
per layer grows with the number of layers is not linear; the last column is the time per layer at the most layers by that at
the fewest, 1.0 if linear. Each step is measured once, on one thread, after a turn on a small stack.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.exported import exported
from fasterai.model.norms import watch
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

Net = tuple[nn.Module, Tensor]


def linears(layers: int) -> Net:
    """Stack linear layers with ReLUs."""
    stack = [m for _ in range(layers) for m in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*stack, nn.Linear(8, 2)), torch.randn(2, 8)


def convolutions(layers: int) -> Net:
    """Stack convolutions with batch norms and ReLUs."""
    stack = [m for _ in range(layers) for m in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(32, 2)), torch.randn(2, 8, 2, 2)


def sparsify(model: nn.Module, x: Tensor) -> str:
    sparsifier = Sparsifier(model, "weight", "local", sparsity=0.5)
    sparsifier.sparsify_model()
    return str(sparsifier.report())


STEPS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "data flow": lambda model, x: watch(model, (x,)),
    "Sparsifier, weight": lambda model, x: Sparsifier(model, "weight", "local", example_inputs=x),
    "Sparsifier, filters": lambda model, x: Sparsifier(
        model, "filter" if any(isinstance(m, nn.Conv2d) for m in model) else "row", "local", example_inputs=x
    ),
    "masks and report": sparsify,
    "export (torch)": lambda model, x: exported(model, (x,)),
    "channel graph": lambda model, x: channel_graph(model, (x,)),
    "Sparsifier, coupled": lambda model, x: Sparsifier(model, "coupled", "local", example_inputs=x),
    "Pruner": lambda model, x: Pruner(model, 0.5, "local", "large_final", example_inputs=x),
    "Pruner, removal": lambda model, x: Pruner(model, 0.5, "local", "large_final", example_inputs=x).prune_model(),
}


def seconds(make: Callable[[int], Net], layers: int, step: Callable[[nn.Module, Tensor], Any]) -> float:
    model, x = make(layers)
    start = time.perf_counter()
    step(model, x)
    return time.perf_counter() - start


def main(counts: list[int]) -> None:
    torch.set_num_threads(1)
    print(f"{'':14}{'':22}" + "".join(f"{n:>9} layers" for n in counts) + "   ms per layer, by that of the fewest")
    for make in (linears, convolutions):
        for name, step in STEPS.items():
            seconds(make, 4, step)
            times = [seconds(make, n, step) for n in counts]
            each = [1000 * t / n for t, n in zip(times, counts, strict=True)]
            row = "".join(f"{t:>14.2f} s" for t in times)
            print(f"{make.__name__:14}{name:22}{row}   {each[-1]:8.2f}   x{each[-1] / each[0]:.2f}", flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [250, 1000])
