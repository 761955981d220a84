"""Time of a training step with a cached teacher: `python tests/benchmarks/cached_teacher.py [--quick] [--wall]`.

Three steps take turns on the same batches, in blocks of five, the first of which is left out: the student alone, with the
teacher in the loop, and with the cache. Images are random numbers, since only times and sizes are measured. One thread;
processor time unless `--wall` is given. Times are medians of steps; ratios are medians over blocks, in each of which the three
stand beside each other.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.batch import Batch
from fasterai.display import short_bytes, short_time, table
from fasterai.distill.cache_keys import SampleKeys
from fasterai.distill.cached import CachedTeacher
from fasterai.distill.caching import cache_teacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.logits import SoftTarget
from fasterai.study.data import Data
from fasterai.study.workbench import make_residual

BLOCK = 5
Step = Callable[[Tensor, Tensor], None]


def small(width: int) -> nn.Module:
    """A residual network for images of 32x32, as the studies train it."""
    empty = torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long)
    classes = tuple("0123456789")
    return make_residual(Data(empty, empty, classes, flip=False, name="", fingerprint=""), width).to(
        memory_format=torch.contiguous_format
    )


#: Name -> student, teacher, side of the images, samples in a batch.
CASES = {
    "resnet18 <- resnet34, 3x64x64": (torchvision.models.resnet18, torchvision.models.resnet34, 64, 32),
    "77 k <- 307 k weights, 3x32x32": (lambda: small(16), lambda: small(32), 32, 64),
}


def step_of(student: nn.Module, teacher: nn.Module | CachedTeacher | None) -> Step:
    """Return a training step, with a distiller if there is a teacher."""
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    handle = None
    if teacher is not None:
        handle = attach(optimizer, Distiller(teacher, SoftTarget(T=4)), total_steps=1_000_000, model=student)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        outputs = student(x)
        loss = F.cross_entropy(outputs, y)
        if handle is not None:
            loss = handle.loss(loss, x, y, outputs)
        loss.backward()
        optimizer.step()

    return step


def measure(name: str, blocks: int, folder: Path, clock: Callable[[], float]) -> list[list[str]]:
    """Return the rows of a case."""
    make_student, make_teacher, side, size = CASES[name]
    torch.manual_seed(0)
    student, teacher = make_student(), make_teacher().eval()
    count = 8 * size
    x, y = torch.randn(count, 3, side, side), torch.randint(0, 10, (count,))
    start = clock()
    cached = cache_teacher(teacher, (x, y), folder / f"{side}.safetensors", batch_size=size)
    first = (clock() - start) / (count // size)
    steps = {"student alone": step_of(student, None), "teacher in the loop": step_of(student, teacher)}
    steps["cached, second epoch on"] = step_of(student, cached)
    times: dict[str, list[float]] = {mode: [] for mode in steps}
    for block in range(blocks):
        for mode in list(steps)[block % 3 :] + list(steps)[: block % 3]:
            for i in range(BLOCK):
                rows = torch.randperm(count)[:size]
                start = clock()
                steps[mode](x[rows], y[rows])
                times[mode] += [clock() - start] * (i > 0)
    medians = {mode: statistics.median(found) for mode, found in times.items()}
    base, each = medians["student alone"], BLOCK - 1
    ratios = {mode: statistics.median(_ratios(found, times["student alone"], each)) for mode, found in times.items()}
    medians["cached, first epoch"] = medians["cached, second epoch on"] + first
    ratios["cached, first epoch"] = ratios["cached, second epoch on"] + first / base
    keys, batch = SampleKeys(), Batch((x[:size],))
    alone = []
    for _ in range(50):
        start = clock()
        keys(batch)
        alone.append(clock() - start)
    medians["the samples' keys"] = statistics.median(alone)
    ratios["the samples' keys"] = medians["the samples' keys"] / base
    return [[name, mode, short_time(value), f"{ratios[mode]:.3f}"] for mode, value in medians.items()]


def _ratios(found: list[float], base: list[float], each: int) -> list[float]:
    """Return the ratio of sums in each block."""
    return [sum(found[i : i + each]) / sum(base[i : i + each]) for i in range(0, len(base), each)]


def sizes(folder: Path, count: int = 5000, classes: int = 1000) -> list[list[str]]:
    """Return the sizes of files for a number of samples and classes."""
    x = torch.randn(count, 8)
    network = nn.Linear(8, classes)
    rows = []
    for dtype, top_k in ((torch.float32, None), (torch.float16, None), (torch.float16, 50), (torch.float16, 10)):
        path = folder / f"{dtype}{top_k}.safetensors"
        cache_teacher(network, x, path, dtype=dtype, top_k=top_k, batch_size=500)
        size = path.stat().st_size
        rows.append([str(dtype).removeprefix("torch."), str(top_k), short_bytes(size), f"{size / count:,.0f}"])
    return rows


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--wall", action="store_true", help="time on the wall, on a machine that does nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if arguments.wall else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, blocks in zip(CASES, (2, 2) if arguments.quick else (9, 40), strict=True):
            rows += measure(name, blocks, Path(folder), clock)
        print("\n".join(table(["networks", "step", "time", "of the student alone"], rows, left=2)))
        print()
        print(
            "\n".join(
                table(["dtype", "top_k", "5,000 samples of 1,000 classes", "bytes a sample"], sizes(Path(folder)), left=2)
            )
        )


if __name__ == "__main__":
    main()
