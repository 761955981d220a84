"""Time of a training step with a cached teacher: `python tests/benchmarks/cached_teacher.py [--quick] [--wall]`.

Steps of the student alone, with the teacher in the loop and with the cache take turns on the same batches, one of each in a
round, in an order by chance. Images are random numbers, since only times and sizes are measured. One thread; processor time
unless `--wall` is given. A time is the median of its steps, a ratio the median over the rounds of two steps that stand beside
each other. What the distiller and the cache add to a step is also measured alone, on outputs without a network.
"""

from __future__ import annotations

import argparse
import copy
import random
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
from fasterai.distill.cache.cached import CachedTeacher
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.cache.keys import SampleKeys
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.study.data import Data
from fasterai.study.workbench import make_residual

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


def measure(name: str, rounds: int, folder: Path, clock: Callable[[], float]) -> list[list[str]]:
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
    for _ in range(rounds + 1):
        rows = torch.randperm(count)[:size]
        for mode in random.sample(list(steps), len(steps)):
            times[mode].append(timed(lambda step=steps[mode], rows=rows: step(x[rows], y[rows]), clock))
    alone = times["student alone"][1:]
    base = statistics.median(alone)
    found = {}
    for mode, taken in times.items():
        ratio = statistics.median(one / other for one, other in zip(taken[1:], alone, strict=True))
        found[mode] = statistics.median(taken[1:]), ratio
    time_of, ratio = found["cached, second epoch on"]
    found["cached, first epoch"] = time_of + first, ratio + first / base
    keys, batch = SampleKeys(), Batch((x[:size],))
    for name_of, call in (("added, alone", added(cached, x[:size], y[:size])), ("the keys of it", lambda: keys(batch))):
        value = statistics.median(timed(call, clock) for _ in range(100))
        found[name_of] = value, value / base
    return [[name, mode, short_time(value), f"{ratio:.3f}"] for mode, (value, ratio) in found.items()]


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the time of a call."""
    start = clock()
    call()
    return clock() - start


def added(cached: CachedTeacher, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return what a step has besides with a cache: answer, loss and its gradients."""
    student = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    handle = attach(optimizer, Distiller(cached, SoftTarget(T=4)), total_steps=1_000_000, model=student)
    outputs = torch.randn(len(x), *cached.file.form.shape, requires_grad=True)
    task = torch.zeros(())

    def call() -> None:
        handle.loss(task, x, y, outputs).backward()

    return call


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
    random.seed(0)
    clock = time.perf_counter if arguments.wall else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, rounds in zip(CASES, (3, 3) if arguments.quick else (50, 150), strict=True):
            rows += measure(name, rounds, Path(folder), clock)
        print("\n".join(table(["networks", "step", "time", "of the student alone"], rows, left=2)))
        print()
        print(
            "\n".join(
                table(["dtype", "top_k", "5,000 samples of 1,000 classes", "bytes a sample"], sizes(Path(folder)), left=2)
            )
        )


if __name__ == "__main__":
    main()
