"""Ranks: two or three processes of gloo, with DDP or without, on data of their own.

After every step all have the same masks and the same weights, whatever the criterion reads; none waits for ever.
"""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.callbacks.plain import attach
from fasterai.core import criteria
from fasterai.sparse.sparsifier import Sparsifier
from tests.attack import oracles
from tests.attack.networks import random_net
from tests.attack.trials import REFUSED, SURVIVED, start

COUNT, OUTSIDE = 30, True
WAIT = 30  # seconds of gloo; a process that is alone longer ends with an error


def attack(draw: random.Random, folder: Path) -> str:
    """Train in several processes with settings by chance."""
    world, seed = draw.choice((2, 2, 3)), draw.randrange(1 << 30)
    processes = [start(work, folder, rank, world, seed) for rank in range(world)]
    for process in processes:
        process.join(2 * WAIT)
    waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()  # each of them alone
        process.join()
    settings = plan(seed)
    assert not waiting, f"{settings}: processes {waiting} of {world} wait for ever"
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    errors = [one["error"] for one in found]
    if any(errors):
        assert all(one["is clear"] for one in found), f"{settings}: {errors}"
        return REFUSED
    steps = [one["steps"] for one in found]
    for i in range(max(map(len, steps))):
        there = {one[i] for one in steps if i < len(one)}
        assert len(there) == 1, f"{settings}: after step {i + 1} the processes differ"
    assert len({one["end"] for one in found}) == 1, f"{settings}: the processes end differently"
    return SURVIVED


def plan(seed: int) -> dict[str, Any]:
    """The settings of a training, the same in each process."""
    draw = random.Random(seed)
    is_wrapped = draw.random() < 0.7
    return {
        "criterion": draw.choice((*criteria.__all__, "drawn", "wanda", "taylor")),
        "granularity": draw.choice(("weight", "row", "coupled", "layer")),
        "context": draw.choice(("local", "global", "lamp")),
        "schedule": draw.choice(("agp", "one_cycle", "iterative", "dsd")),
        "wrap": is_wrapped,
        "join": is_wrapped and draw.random() < 0.35,
        "skip": draw.random() < 0.25,
        "net": draw.randrange(1 << 30),
    }


def drawn(weight: torch.Tensor) -> torch.Tensor:
    """Scores that differ from process to process."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(distributed.get_rank()))


def work(folder: Path, rank: int, world: int, seed: int) -> None:
    """Train as one of the processes, and write down what came of it."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=WAIT)
    )
    found: dict[str, Any] = {"error": "", "is clear": True, "steps": [], "end": ""}
    try:
        train(plan(seed), rank, world, found)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        try:
            oracles.check_clear(error)
        except AssertionError:
            found["is clear"] = False
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # threads of gloo now and then abort an interpreter that shuts down


def train(settings: dict[str, Any], rank: int, world: int, found: dict[str, Any]) -> None:
    """Train some steps, more of them in some processes if they may join."""
    net = (
        random_net(random.Random(settings["net"]), "perceptron", "residual")
        if not settings["join"]
        else random_net(random.Random(settings["net"]), "perceptron")
    )
    model = net.model()
    whole: nn.Module = DistributedDataParallel(model) if settings["wrap"] else model
    data = [net.batch(100 * rank + i) for i in range(6)]
    criterion = drawn if settings["criterion"] == "drawn" else settings["criterion"]
    axes = (settings["granularity"], settings["context"], criterion)
    sparsifier = Sparsifier(
        whole, *axes, sparsity=0.5, schedule=settings["schedule"], data=data[:1], loss=F.cross_entropy,
        example_inputs=net.batch(99)[0], round_to=1,
    )  # fmt: skip
    optimizer = torch.optim.SGD(whole.parameters(), 0.05, momentum=0.9)
    steps = 6 - rank if settings["join"] else 6
    handle = attach(optimizer, sparsifier, total_steps=6, loss=F.cross_entropy)
    with ExitStack() as stack:
        stack.enter_context(whole.join() if settings["join"] else nullcontext())
        for x, y in data[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            for p in () if settings["wrap"] else model.parameters():
                distributed.all_reduce(p.grad)
                p.grad /= world
            if settings["skip"] and handle.loop.step == 2 and "skipped" not in found:
                found["skipped"] = True  # what a GradScaler does at an overflow, in all processes
            else:
                optimizer.step()
            if not settings["join"]:
                found["steps"].append(mark(model, sparsifier))
    handle.remove(completed=True)
    found["end"] = mark(model, sparsifier)
    oracles.zeros(model, sparsifier.masks)


def mark(model: nn.Module, sparsifier: Sparsifier) -> str:
    """A number that tells masks and weights from all others."""
    parts = [oracles.bytes_of(x) for x in (*model.parameters(), *sparsifier.masks.values())]
    return hashlib.sha256(b"".join(parts)).hexdigest()
