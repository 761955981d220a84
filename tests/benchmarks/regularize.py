"""What a step with a penalty costs beside one without: `python tests/benchmarks/regularize.py [--quick]`.

A resnet18 with 10 classes on images of 32x32, one thread. The steps of a round come in turn, times are of the processor, and a
ratio is the median of the ratios within a round, so that what else the machine does falls out of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

from fasterai.callbacks.plain import attach
from fasterai.regularize.regularizer import Regularizer

CASES: dict[str, dict[str, Any]] = {
    "l1, weight, in the loss": {"granularity": "weight"},
    "l1, filter, in the loss": {"granularity": "filter"},
    "group lasso, filter, in the loss": {"granularity": "filter", "penalty": "group_lasso"},
    "group lasso, coupled, as a gradient": {"granularity": "coupled", "penalty": "group_lasso", "how": "gradient"},
    "group lasso, filter, proximal": {"granularity": "filter", "penalty": "group_lasso", "how": "proximal"},
    "group lasso, coupled, proximal": {"granularity": "coupled", "penalty": "group_lasso", "how": "proximal"},
    "slimming, filter, in the loss": {"granularity": "filter", "penalty": "slimming"},
}


def stepper(options: dict[str, Any] | None, batch: int) -> Callable[[], None]:
    """Return a step of training, with a penalty or without."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    made = [] if options is None else [Regularizer(network, weight=1e-4, example_inputs=x[:2], **options)]
    handle = attach(optimizer, *made, total_steps=10**6, model=network) if made else None  # no notes are due

    def step() -> None:
        outputs = network(x)
        loss = F.cross_entropy(outputs, y)
        if handle is not None:
            loss = handle.loss(loss, x, y, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    rounds = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    for batch in (32, 128):
        bare = stepper(None, batch)
        steps = {name: stepper(options, batch) for name, options in CASES.items()}
        ratios: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(rounds + 1):
            floor = timed(bare)
            for name, step in steps.items():
                ratio = timed(step) / floor
                ratios[name] += [ratio] if i else []  # the first round warms up
        print(f"batch {batch}")
        for name, found in ratios.items():
            print(f"  {name:40}{statistics.median(found):6.2f}x")


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of processor time of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
