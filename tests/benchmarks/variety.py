"""How much variety costs, in processor time of one thread: `python tests/benchmarks/variety.py [--quick]`.

Two tables: the order of removal of one wide layer, by each similarity; trainings with 50 moves of the masks by a criterion
alone and by it with variety, whose steps take turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.criteria import variety
from fasterai.core.variety import SIMILARITIES, order_of_removal
from fasterai.sparse.sparsifier import Sparsifier

SEED = 0


def orders(repeats: int) -> None:
    """Print the seconds of one order of removal."""
    print(f"{'filters x weights':20}" + "".join(f"{name:>12}" for name in SIMILARITIES))
    for count, features in ((512, 4608), (2048, 4608)):
        generator = torch.Generator().manual_seed(SEED)
        vectors, scores = torch.randn(count, features, generator=generator), torch.rand(count, generator=generator)
        spent = []
        for similarity in SIMILARITIES:
            times = []
            for _ in range(repeats):
                start = time.process_time()
                order_of_removal(scores, vectors, similarity)
                times.append(time.process_time() - start)
            spent.append(statistics.median(times))
        print(f"{f'{count} x {features}':20}" + "".join(f"{seconds:11.3f}s" for seconds in spent))


def _stepper(network: nn.Module, criteria: object, steps: int) -> Callable[[], None]:
    sparsifier = Sparsifier(network, "filter", "local", criteria, sparsity=0.7, schedule="agp", layer_type=nn.Conv2d)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    handle = attach(optimizer, sparsifier, total_steps=steps, model=network)
    x, y = torch.randn(64, 3, 32, 32), torch.arange(64) % 10

    def step() -> None:
        loss = handle.loss(F.cross_entropy(network(x), y), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def trainings(steps: int, networks: dict[str, Callable[[], nn.Module]]) -> None:
    """Print the seconds of a training by each criterion, and their ratio."""
    print(f"\n{steps} steps of 64 images of 32x32, at most 50 moves")
    print(f"{'network':12}{'criterion':14}{'alone':>10}{'variety':>10}{'ratio':>8}")
    for (name, make), by in itertools.product(networks.items(), ("large_final", "movement", "taylor")):
        spent = {"alone": 0.0, "variety": 0.0}
        runs = {}
        for which in spent:
            torch.manual_seed(SEED)
            with warnings.catch_warnings(action="ignore"):  # that there are no example inputs
                runs[which] = _stepper(make(), by if which == "alone" else variety(by), steps)
        for _, (which, run) in itertools.product(range(steps), runs.items()):
            start = time.process_time()
            with warnings.catch_warnings(action="ignore"):
                run()
            spent[which] += time.process_time() - start
        ratio = spent["variety"] / spent["alone"]
        print(f"{name:12}{by:14}{spent['alone']:9.1f}s{spent['variety']:9.1f}s{ratio:7.2f}x", flush=True)


def _plain(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats, a small network alone")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    orders(3 if quick else 7)
    networks: dict[str, Callable[[], nn.Module]] = {"plain 16": lambda: _plain(16)}
    if not quick:
        networks["resnet18"] = lambda: torchvision.models.resnet18(num_classes=10)
    trainings(200 if quick else 400, networks)


if __name__ == "__main__":
    main()
