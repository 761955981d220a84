"""How long ternary groups take, in processor time of one thread: `python tests/benchmarks/ternary.py [--quick]`.

Two tables: the best values of all weights of a network, by the library, by torch.sort and by trying every pattern of a group;
and a training step of a resnet18 with straight-through fine-tuning beside a dense one, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.types import Target
from fasterai.misc.ternary.groups import Division, divide
from fasterai.misc.ternary.optimum import ternary_of
from fasterai.misc.ternary.selection import choose_targets
from fasterai.misc.ternary.ternarize import ternarize
from fasterai.misc.ternary.training import TernaryTraining

SEED = 0
#: One of so many rows of a weight is tried by brute force, whose time is then multiplied.
PART = 64


def sorted_by_torch(weight: Tensor, division: Division) -> Tensor:
    """Return the best ternary values as one writes them first: `torch.sort` and its positions."""
    groups = division.split(weight).movedim(2, -1)
    ranked, places = groups.abs().sort(-1, descending=True)
    totals = ranked.cumsum(-1)
    counts = torch.arange(1, groups.shape[-1] + 1)
    k = (totals.square() / counts).argmax(-1, keepdim=True)
    kept = torch.zeros_like(groups).scatter(-1, places, (torch.arange(groups.shape[-1]) <= k).to(groups.dtype))
    scale = totals.gather(-1, k) / (k + 1)
    return division.join((groups.sign() * kept * scale).movedim(-1, 2), weight.shape)


def tried(weight: Tensor, division: Division) -> Tensor:
    """Return the best ternary values by trying all 3^N patterns of each group."""
    groups = division.split(weight).movedim(2, -1)
    patterns = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=groups.shape[-1])))
    counts = patterns.abs().sum(1).clamp_min(1)
    sums = (groups @ patterns.T).clamp_min(0)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    scale = sums.gather(-1, best) / counts[best]
    return division.join((patterns[best.squeeze(-1)] * scale).movedim(-1, 2), weight.shape)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median of the seconds that a function takes."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def all_of(targets: tuple[Target, ...], group: int, make: Callable[[Tensor, Division], Tensor]) -> Callable[[], None]:
    def run() -> None:
        for target in targets:
            make(target.parameter.detach(), divide(target.layout, group))

    return run


def whole_networks(names: list[str], repeats: int) -> None:
    """Print the seconds that the weights of each network take."""
    print(f"{'network':10}{'weights':>10}{'group':>7}{'ours':>9}{'sort':>9}{'threshold':>11}{'patterns':>10}{'whole call':>12}")
    for name in names:
        torch.manual_seed(SEED)
        model = getattr(torchvision.models, name)()
        targets = choose_targets(model, None, None, None).targets
        count = sum(t.parameter.numel() for t in targets)
        for group in (4, 16, 64):
            ours = seconds(all_of(targets, group, ternary_of), repeats)
            by_sort = seconds(all_of(targets, group, sorted_by_torch), repeats)
            usual = seconds(all_of(targets, group, lambda w, d: ternary_of(w, d, "threshold")), repeats)
            whole = seconds(partial(ternarize, model, group), repeats)
            patterns = "-"
            if group == 4:
                weight = torch.randn(count // PART // group, group)
                division = Division(tuple(weight.shape), (0, 1), len(weight), group, 1, group)
                assert torch.allclose(tried(weight, division), ternary_of(weight, division), atol=1e-6)
                patterns = f"{PART * seconds(partial(tried, weight, division), 1):.1f}s"
            times = f"{ours:8.2f}s{by_sort:8.2f}s{usual:10.2f}s{patterns:>10}{whole:11.2f}s"
            print(f"{name:10}{count / 1e6:9.1f}M{group:7}{times}", flush=True)


def steps(count: int) -> None:
    """Print the seconds of a training step, dense and straight through."""
    print(f"\nresnet18 of 10 classes, batch 32 of 32x32, median of {count} steps in turns")
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10

    def stepper(group: int | None) -> Callable[[], None]:
        torch.manual_seed(SEED)
        model: nn.Module = torchvision.models.resnet18(num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        participants = [] if group is None else [TernaryTraining(model, group, example_inputs=x)]
        handle = attach(optimizer, *participants, total_steps=count + 1, model=model) if participants else None

        def step() -> None:
            assert handle is None or handle.loop.running
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    runs = {"dense": stepper(None), **{f"groups of {n}": stepper(n) for n in (4, 16, 64)}}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for i, (name, run) in itertools.product(range(count + 1), runs.items()):
        took = seconds(run, 1)
        if i:
            spent[name].append(took)
    dense = statistics.median(spent["dense"])
    for name, times in spent.items():
        took = statistics.median(times)
        print(f"{name:14}{1000 * took:8.0f} ms{took / dense:7.2f}x")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network, fewer repeats and steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    whole_networks(["resnet18"] if quick else ["resnet18", "resnet50"], 1 if quick else 3)
    steps(3 if quick else 9)


if __name__ == "__main__":
    main()
