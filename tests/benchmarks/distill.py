"""What a step of distillation costs in time and memory: `python tests/benchmarks/distill.py [--quick] [--peer FOLDER]`.

Each step with the distiller is held against two floors: the student's step and the teacher's forward pass under `no_grad`,
with no loss between them, and a step that does all that by hand, with the same loss in torch and nothing of this library.
In all of them the student runs first, then the teacher, as the distiller has it. The steps of a round come in an order by
chance, on one thread; times are of the processor, the median over the rounds, and a ratio is the median of the ratios within a
round, so that what else the machine does falls out of it. Memory is what autograd keeps for the backward pass, each storage
once, without the parameters.

With `--peer`, the folder that holds the public fasterai 0.4.1 (`pip install --no-deps --target FOLDER fasterai==0.4.1`): its
callback in fastai, in a process of its own, beside a fastai step of the student alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
ALONE, FLOOR, HAND = "student alone", "student + teacher's forward pass", ", by hand"


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
    """Processor milliseconds of each step in each round, in an order by chance; three rounds before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, chance = list(steps), random.Random(SEED)
    for round_ in range(repeats + 3):
        chance.shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            if round_ > 2:
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


@dataclass(frozen=True)
class Cost:
    """What the steps of one kind cost.

    Attributes:
        times: Milliseconds of each round.
        size: Bytes kept for the backward pass.
    """

    times: list[float]
    size: float

    def to(self, other: Cost) -> str:
        """How many times as long as others, in the same rounds."""
        return f"{statistics.median(a / b for a, b in zip(self.times, other.times, strict=True)):.3f}x"


def costs(steps: Mapping[str, Callable[..., int]], repeats: int) -> dict[str, Cost]:
    """Name -> what it costs."""
    times = in_turns(steps, repeats)
    return {name: Cost(times[name], step(count=True)) for name, step in steps.items()}


def stepper(student: nn.Module, teacher: nn.Module, loss: Callable[[], Tensor], optimizer: Any) -> Callable[..., int]:
    """A step of training with a loss of its own; it returns the bytes kept if `count` is set."""

    def step(count: bool = False) -> int:
        optimizer.zero_grad()
        if not count:
            loss().backward()
            optimizer.step()
            return 0
        with kept(student, teacher) as found:
            value = loss()
        value.backward()
        return found[0]

    return step


# --- the losses by hand --------------------------------------------------------------------------------------------------


def soft_target(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """`SoftTarget()` as one writes it."""
    return 25 * F.kl_div(F.log_softmax(student / 5, 1), F.softmax(teacher / 5, 1), reduction="batchmean")


def decoupled(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """`DKD()` as its authors' code has it."""
    right = F.one_hot(y, student.shape[1])
    own, other = (F.softmax(x / 4, 1) for x in (student, teacher))
    own, other = (torch.stack([(x * right).sum(1), (x * (1 - right)).sum(1)], 1) for x in (own, other))
    tckd = F.kl_div(own.log(), other, reduction="batchmean")
    rest = F.log_softmax(student / 4 - 1000 * right, 1), F.softmax(teacher / 4 - 1000 * right, 1)
    return 16 * (tckd + 8 * F.kl_div(*rest, reduction="batchmean"))


def fitnet(student: Tensor, teacher: Tensor, layer: nn.Module) -> Tensor:
    """`FitNet()`, with the convolution that projects; maps of a larger student are averaged."""
    if student.shape[2:] != teacher.shape[2:]:
        student = F.adaptive_avg_pool2d(student, teacher.shape[2:])
    return F.mse_loss(layer(student), teacher)


def attention(student: Tensor, teacher: Tensor, layer: nn.Module) -> Tensor:
    """`Attention()` as its authors' code has it."""
    own, other = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher))
    return (own - other).pow(2).mean()


def by_hand(loss: Callable[..., Tensor] | None, pair: str, layers: Layers | None) -> Callable[..., int]:
    """A step without this library; a loss of features has hooks on the layers, and a convolution that trains."""
    teacher, student, x, y, *_ = made(pair)
    teacher.eval()
    found: list[Tensor] = []
    projects, parameters = nn.Identity(), list(student.parameters())
    if layers is not None:
        for model, (name,) in zip((student, teacher), layers, strict=True):
            model.get_submodule(name).register_forward_hook(lambda _, __, outputs: found.append(outputs))
        with torch.no_grad():
            student(x), teacher(x)
        if loss is fitnet:
            projects = nn.Conv2d(found[0].shape[1], found[1].shape[1], 1)  # type: ignore[assignment]
            parameters += projects.parameters()

    def of_batch() -> Tensor:
        found.clear()
        own = student(x)
        with torch.no_grad():
            other = teacher(x)
        task = F.cross_entropy(own, y)
        if loss is None:
            return task
        return 0.5 * task + 0.5 * (loss(own, other, y) if layers is None else loss(*found, projects))

    return stepper(student, teacher, of_batch, torch.optim.SGD(parameters, 0.01, momentum=0.9))


def alone(pair: str) -> Callable[..., int]:
    """A step of the student alone."""
    teacher, student, x, y, *_ = made(pair)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    return stepper(student, teacher, lambda: F.cross_entropy(student(x), y), optimizer)


# --- the distiller -------------------------------------------------------------------------------------------------------


def distilled(loss: Any, pair: str, layers: Layers | None) -> Callable[..., int]:
    """A step with the distiller, in a loop of one's own."""
    from fasterai.callbacks.plain import attach
    from fasterai.distill.distiller import Distiller

    teacher, student, x, y, *_ = made(pair)
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
    handle = attach(optimizer, Distiller(teacher, loss, *layers or ()), total_steps=10**6, model=student)

    def of_batch() -> Tensor:
        outputs = student(x)
        return handle.loss(F.cross_entropy(outputs, y), x, y, outputs)

    step = stepper(student, teacher, of_batch, optimizer)
    step.__dict__["handle"] = handle  # the run lasts as long as its step
    return step


def ours(pair: str, repeats: int) -> dict[str, Cost]:
    """Name -> what it costs; for each loss by hand first."""
    from fasterai.distill.losses.features import Attention, FitNet
    from fasterai.distill.losses.logits import DKD, SoftTarget

    unlike, alike = made(pair)[4:]
    cases: list[tuple[Any, Any, Layers | None]] = [
        (SoftTarget(), soft_target, None),
        (DKD(), decoupled, None),
        (FitNet(), fitnet, unlike),
        (Attention(), attention, alike),
    ]
    steps = {ALONE: alone(pair), FLOOR: by_hand(None, pair, None)}
    for loss, hand, layers in cases:
        name = type(loss).__name__
        steps |= {f"{name}{HAND}": by_hand(hand, pair, layers), name: distilled(loss, pair, layers)}
    with warnings.catch_warnings(action="ignore"):  # that the runs are not ended
        found = costs(steps, repeats)
        for step in steps.values():
            if "handle" in step.__dict__:
                step.__dict__["handle"].remove(completed=True)
    gc.collect()
    return found


# --- the public peer -----------------------------------------------------------------------------------------------------


def peer(pair: str, repeats: int) -> dict[str, Cost]:
    """The same of the public fasterai's callback, in fastai, with the student alone beside it."""
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    from fasterai.distill import all as public

    teacher, student, x, y, _, alike = made(pair)

    def learner(*callbacks: Any) -> Callable[..., int]:
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
        ALONE: learner(),
        "SoftTarget": learner(callback(public.SoftTarget)),
        "Attention": learner(callback(public.Attention, *alike)),
    }
    return costs(steps, repeats)


def peer_apart(folder: str, pair: str, repeats: int) -> dict[str, Cost]:
    """The peer in a process that reads its fasterai, and none of this library."""
    environment = {**os.environ, "PYTHONPATH": str(Path(folder).absolute()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, "--one-peer", pair, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer has failed: {done.stderr.strip().splitlines()[-1]}")
    return {name: Cost(**found) for name, found in json.loads(done.stdout.strip().splitlines()[-1]).items()}


COLUMNS = ("a step", "ms", *("to " + x for x in ("the student alone", "student + teacher", "by hand")))
MEMORY = ("kept for backward", "to the student alone")


def show(title: str, found: Mapping[str, Cost]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(COLUMNS + MEMORY)} |\n|---|{'--:|' * 6}")
    for name, one in found.items():
        floor = one.to(found[FLOOR]) if FLOOR in found and name != ALONE else ""
        hand = one.to(found[name + HAND]) if name + HAND in found else ""
        times = [f"{statistics.median(one.times):.1f}", one.to(found[ALONE]), floor, hand]
        cells = [name, *times, f"{one.size / 2**20:.1f} MiB", f"{one.size / found[ALONE].size:.3f}x"]
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
        print(json.dumps({name: asdict(found) for name, found in peer(arguments.one_peer, repeats).items()}))
        return
    print(f"torch {torch.__version__}, one thread, processor time, medians of {repeats} rounds")
    for pair in PAIRS:
        show(f"{pair}: this library", ours(pair, repeats))
        if arguments.peer:
            show(f"{pair}: public fasterai 0.4.1, in fastai", peer_apart(arguments.peer, pair, repeats))


if __name__ == "__main__":
    main()
