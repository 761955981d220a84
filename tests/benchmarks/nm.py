"""Cost of N:M in a training step: `python tests/benchmarks/nm.py [--rounds 15] [--pattern 2:4]`.

One step of torchvision's resnet18 (10 classes) on 32 images of 32x32, SGD with momentum, one thread, dense and with SR-STE in
turns. Times are those that the thread computed (`time.thread_time`), so that other processes take little part in them; each row
is the median over the rounds. The parts of SR-STE are what it does at each event; `added` is their sum, and the ratio is that
of the dense step with it to the dense step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision

from fasterai.core.loop import Fit
from fasterai.display import table
from fasterai.sparse.nm.srste import SRSTE

STEPS = 10_000  # of the run that the measured steps begin; 50 of these have a look at the masks for `sad`


def measure(rounds: int, n: int, m: int) -> dict[str, float]:
    """Return the median milliseconds of each part of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense, sparse = (torchvision.models.resnet18(num_classes=10) for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4) for model in (dense, sparse)]
    training = SRSTE(sparse, n, m)
    training.on_fit_start(Fit(total_steps=STEPS, model=sparse, optimizer=optimizers[1]))
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.thread_time()
        call()
        seconds.setdefault(name, []).append(time.thread_time() - start)

    def gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    for i in range(rounds):
        timed("dense: forward, backward", lambda: gradients(dense, optimizers[0]))
        timed("dense: optimizer", optimizers[0].step)
        timed("sparse: forward, backward", lambda: gradients(sparse, optimizers[1]))
        timed("SR-STE: decay", training.after_backward)
        timed("SR-STE: hidden weights back", lambda at=(i + 1) / STEPS: training.before_step(at))
        timed("sparse: optimizer", optimizers[1].step)
        timed("SR-STE: masks anew", lambda at=(i + 1) / STEPS: training.after_step(at))
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pattern", default="2:4")
    given = parser.parse_args()
    found = measure(given.rounds, *map(int, given.pattern.split(":")))
    dense = sum(v for name, v in found.items() if name.startswith("dense"))
    added = sum(v for name, v in found.items() if name.startswith("SR-STE"))
    whole = sum(v for name, v in found.items() if not name.startswith("dense"))
    rows = [(name, f"{value:.1f}") for name, value in found.items()]
    rows += [("dense step", f"{dense:.1f}"), ("added", f"{added:.1f}"), ("ratio (dense + added)", f"{1 + added / dense:.3f}")]
    rows += [("ratio (steps as measured)", f"{whole / dense:.3f}")]
    print("\n".join(table(("part", "ms"), rows)))


if __name__ == "__main__":
    main()
