"""What a step of distillation costs in time and memory: `python tests/benchmarks/distill.py [--quick] [--peer FOLDER]`.

A step of the student alone, of it with the teacher's forward pass written by hand beside it, and of it with the distiller, take
turns within one run on one thread; times are of the processor, the median of the steps. Memory is what autograd keeps for the
backward pass, each storage once, without the parameters.

With `--peer`, the folder that holds the public fasterai 0.4.1 (`pip install --no-deps --target FOLDER fasterai==0.4.1`): its
callback in fastai, in a process of its own, beside a fastai step of the student alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

SEED = 0
#: Name -> networks of teacher and student, the input, layers of the teacher and of the student whose shapes differ, and such
#: that are of one size.
PAIRS = {
    "resnet34 -> resnet18, 8x3x64x64": (("resnet34", "resnet18"), (8, 3, 64, 64), ("layer3", "layer2"), ("layer3", "layer3")),
    "plain 64 -> plain 16, 32x3x32x32": (("plain64", "plain16"), (32, 3, 32, 32), ("3", "3"), ("3", "3")),
}
Layers = tuple[list[str], list[str]]


def network(name: str) -> nn.Module:
    """A network with ten classes and random weights."""
    if name.startswith("plain"):
        n = int(name.removeprefix("plain"))
        first, second = nn.Conv2d(3, n, 3, padding=1), nn.Conv2d(n, n, 3, stride=2, padding=1)
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10)]
        return nn.Sequential(first, nn.BatchNorm2d(n), nn.ReLU(), second, nn.BatchNorm2d(n), nn.ReLU(), *pool)
    return getattr(torchvision.models, name)(weights=None, num_classes=10)


def made(pair: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Layers, Layers]:
    """Teacher, student, batch, and layers, the student's first, that differ in shape and that are of one size."""
    (large, small), shape, unlike, alike = PAIRS[pair]
    torch.manual_seed(SEED)
    x, y = torch.randn(shape), torch.arange(shape[0]) % 10
    return network(large), network(small).train(), x, y, ([unlike[1]], [unlike[0]]), ([alike[1]], [alike[0]])


# --- time and memory -----------------------------------------------------------------------------------------------------


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Processor milliseconds of each step, in turns; two rounds before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if round_ > 1:
                times[name].append(1e3 * (time.process_time() - start))
    return times


@contextmanager
def kept(*models: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps in the block, beside the parameters: storages, each once."""
    own = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is given twice

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(x.detach())
        return x

    found = [0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield found
    found[0] = sum(storages.values())


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def stepper(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, loss: Loss, **rest: Any) -> Callable[[], int]:
    """A step of training with a loss of its own; it returns the bytes kept if `count` is set."""
    optimizer = rest.get("optimizer") or torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)

    def step(count: bool = False) -> int:
        optimizer.zero_grad()
        if not count:
            loss(student, x, y).backward()
            optimizer.step()
            return 0
        with kept(student, teacher) as found:
            value = loss(student, x, y)
        value.backward()
        return found[0]

    return step


def ours(pair: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Name -> (milliseconds, bytes kept) of each candidate."""
    from fasterai.callbacks.plain import attach
    from fasterai.distill.distiller import Distiller
    from fasterai.distill.losses.features import Attention, FitNet
    from fasterai.distill.losses.logits import DKD, SoftTarget

    teacher, student, x, y, unlike, alike = made(pair)
    teacher.eval()

    def alone(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(x)
        return F.cross_entropy(model(x), y)

    def distilled(loss: Any, *layers: list[str]) -> Callable[[], int]:
        model = copy.deepcopy(student)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        handle = attach(optimizer, Distiller(teacher, loss, *layers), total_steps=10**6, model=model)

        def of_batch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            outputs = model(x)
            return handle.loss(F.cross_entropy(outputs, y), x, y, outputs)

        step = stepper(model, teacher, x, y, of_batch, optimizer=optimizer)
        step.__dict__["handle"] = handle  # the run lasts as long as its step
        return step

    steps = {
        "student alone": stepper(copy.deepcopy(student), teacher, x, y, alone),
        "with the teacher's forward pass": stepper(copy.deepcopy(student), teacher, x, y, by_hand),
        "SoftTarget": distilled(SoftTarget()),
        "DKD": distilled(DKD()),
        "FitNet": distilled(FitNet(), *unlike),
        "Attention": distilled(Attention(), *alike),
    }
    with warnings.catch_warnings(action="ignore"):  # that the runs are not ended
        times = in_turns(steps, repeats)
        found = {name: (statistics.median(times[name]), float(step(count=True))) for name, step in steps.items()}  # type: ignore[call-arg]
        for step in steps.values():
            if "handle" in step.__dict__:
                step.__dict__["handle"].remove(completed=True)
    gc.collect()
    return found


# --- the public peer -----------------------------------------------------------------------------------------------------


def peer(pair: str, repeats: int) -> dict[str, tuple[float, float]]:
    """The same of the public fasterai's callback, in fastai, with the student alone beside it."""
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from fasterai.distill import all as public

    teacher, student, x, y, _, alike = made(pair)

    def learner(*callbacks: Any) -> Callable[[], int]:
        model = copy.deepcopy(student)
        learn = Learner(DataLoaders([(x, y)], [(x, y)]), model, F.cross_entropy, cbs=list(callbacks), default_cbs=False)
        learn.create_opt()
        learn.model.train()
        learn.n_epoch, learn.epoch, learn.dl, learn.training = 10**6, 0, learn.dls.train, True
        learn.pct_train, learn.train_iter, learn.n_iter, learn.iter = 0.0, 0, 1, 0
        for one in callbacks:
            one.learn = learn
            one.before_fit()

        def step(count: bool = False) -> int:
            if not count:
                learn.one_batch(0, (x, y))
                return 0
            learn.xb, learn.yb = (x,), (y,)
            with kept(model, teacher) as found:
                learn.pred = model(x)
                learn.loss_grad = F.cross_entropy(learn.pred, y)
                learn("after_loss")
            return found[0]

        return step

    def callback(loss: Any, *layers: list[str]) -> Any:
        return public.KnowledgeDistillationCallback(teacher, loss, *layers)

    steps = {
        "student alone": learner(),
        "SoftTarget": learner(callback(public.SoftTarget)),
        "Attention": learner(callback(public.Attention, *alike)),
    }
    times = in_turns(steps, repeats)
    return {name: (statistics.median(times[name]), float(step(count=True))) for name, step in steps.items()}  # type: ignore[call-arg]


def peer_apart(folder: str, pair: str, repeats: int) -> dict[str, tuple[float, float]]:
    """The peer in a process that reads its fasterai, and none of this library."""
    environment = {**os.environ, "PYTHONPATH": str(Path(folder).absolute()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, "--one-peer", pair, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer has failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(title: str, found: Mapping[str, tuple[float, float]]) -> None:
    """Print a table in Markdown."""
    alone, kept_alone = found["student alone"]
    hand = found.get("with the teacher's forward pass", (0.0, 0.0))[0]
    print(
        f"\n{title}\n\n| a step | ms | to the student alone | to the sum by hand | kept for backward | to the student alone |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    for name, (spent, size) in found.items():
        by_hand = f"{spent / hand:.3f}x" if hand and name != "student alone" else ""
        cells = [name, f"{spent:.1f}", f"{spent / alone:.2f}x", by_hand, f"{size / 2**20:.1f} MiB", f"{size / kept_alone:.3f}x"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a table for each pair of networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    parser.add_argument("--peer", metavar="FOLDER", help="the public fasterai 0.4.1, to be measured too")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--one-peer", metavar="PAIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    repeats = arguments.repeats or (3 if arguments.quick else 41)
    torch.set_num_threads(1)
    if arguments.one_peer:
        print(json.dumps(peer(arguments.one_peer, repeats)))
        return
    print(f"torch {torch.__version__}, one thread, median of {repeats} steps in turns")
    for pair in PAIRS:
        show(f"{pair}: this library", ours(pair, repeats))
        if arguments.peer:
            show(f"{pair}: public fasterai 0.4.1, in fastai", peer_apart(arguments.peer, pair, repeats))


if __name__ == "__main__":
    main()
