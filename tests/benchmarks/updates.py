"""Accuracy by the number of updates: `python tests/benchmarks/updates.py DATA [--quick]`.

DATA is a folder of images, `train/CLASS/` and `test/CLASS/`, of 32x32 (CIFAR-10). A small residual network trains on 20,000 of
them for 5 epochs of 312 steps, to 90 and 97 % of the weights (local, large_final, one_cycle with beta 5), with `max_updates` of
20, 50, 200, 1000 and one at every step; three seeds. Each run is a line of `--out`, and runs that stand there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as tvf

from fasterai.callbacks.plain import attach
from fasterai.core.schedules import OneCycle
from fasterai.sparse.sparsifier import Sparsifier

IMAGES, EPOCHS, BATCH = 20_000, 5, 64
UPDATES, SPARSITIES, SEEDS = (20, 50, 200, 1000, 10_000), (0.97, 0.9), (0, 1, 2)
MEAN, STD = (0.491, 0.482, 0.447), (0.245, 0.243, 0.261)
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is one of stride 1 where nothing changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.short(x))


def network() -> nn.Module:
    """A residual network of 77 thousand weights."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def load(folder: Path, most: int | None = None) -> Data:
    """Decode a folder of images, classes in turns, as normalised floats `(N, 3, 32, 32)` and classes `(N,)`."""
    samples = ImageFolder(str(folder)).samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:most]
    loader = ImageFolder(str(folder)).loader
    images = torch.stack([tvf.to_image(loader(samples[i][0])) for i in order]).float() / 255
    return tvf.normalize(images, MEAN, STD), torch.tensor([samples[i][1] for i in order])


def run(train: Data, test: Data, sparsity: float, max_updates: int, seed: int, epochs: int) -> dict[str, float]:
    """Train once; return the accuracy, the updates and the seconds."""
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)
    steps = epochs * (len(train[0]) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    schedule = OneCycle(beta=5)
    sparsifier = Sparsifier(model, sparsity=sparsity, schedule=schedule, max_updates=max_updates)
    start = time.perf_counter()
    with attach(optimizer, sparsifier, total_steps=steps):
        for _ in range(epochs):
            for batch in torch.randperm(len(train[0])).split(BATCH)[: len(train[0]) // BATCH]:
                x = train[0][batch].contiguous(memory_format=torch.channels_last)
                flip = torch.rand(len(x), 1, 1, 1) < 0.5
                optimizer.zero_grad()
                F.cross_entropy(model(torch.where(flip, x.flip(3), x)), train[1][batch]).backward()
                optimizer.step()
                rate.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(test[0].split(500), test[1].split(500), strict=True))
    return {
        "accuracy": right / len(test[1]),
        "moves": sparsifier.moves,
        "seconds": seconds,
        "reached": float(sparsifier.sparsity),
    }


def table(rows: list[dict[str, float]]) -> None:
    """Print mean and spread of the seeds."""
    print(f"\n{'sparsity':>10}{'max_updates':>13}{'updates':>9}{'accuracy':>10}{'seeds':>30}")
    for sparsity in sorted({r["sparsity"] for r in rows}):
        for most in sorted({r["max_updates"] for r in rows}):
            found = [r for r in rows if (r["sparsity"], r["max_updates"]) == (sparsity, most)]
            if found:
                values = [100 * r["accuracy"] for r in found]
                seeds = ", ".join(f"{v:.2f}" for v in values)
                print(f"{sparsity:>10.0%}{most:>13}{found[0]['moves']:>9.0f}{statistics.mean(values):>10.2f}{seeds:>30}")


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("updates.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few images and one epoch, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train = load(arguments.data / "train", 1280 if arguments.quick else IMAGES)
    test = load(arguments.data / "test", 500 if arguments.quick else None)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(r["sparsity"], r["max_updates"], r["seed"]) for r in rows}
    for case in [(s, m, seed) for seed in SEEDS for s in SPARSITIES for m in UPDATES]:
        if case not in done:
            row = {"sparsity": case[0], "max_updates": case[1], "seed": case[2]}
            rows.append({**row, **run(train, test, *case, epochs=1 if arguments.quick else EPOCHS)})
            with arguments.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    table(rows)


if __name__ == "__main__":
    main()
