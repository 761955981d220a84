"""Full disks, folders that are read-only, gone or of another kind: whoever writes says so, and the old file is as it was.

The limit on the length of files is set in the child process of the trials alone, and lifted at once; so is the change of user,
since no folder is read-only to root.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.export.all import export_onnx, export_program
from fasterai.prune.all import save_small
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from tests.attack import commands, oracles
from tests.attack.files import workplace
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 80, 180
NOBODY = 65534


def network() -> nn.Module:
    """A network of some kilobytes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))


def ticket(path: Path) -> None:
    """Let a lottery ticket save itself in a training of two steps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, sparsity=0.5, schedule="one_shot")
    with attach(optimizer, sparsifier, LotteryTicket(sparsifier, save_tickets=path.parent), total_steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 40)).sum().backward()
            optimizer.step()


WRITERS: dict[str, Callable[[Path], object]] = {
    "model.pt": lambda path: Sparsifier(network()).save_model(path),
    "small.safetensors": lambda path: save_small(path, network()),
    "winning_ticket_0.5000.pt": ticket,
    "network.onnx": lambda path: export_onnx(network(), torch.zeros(2, 40), path),
    "network.pt2": lambda path: export_program(network(), torch.zeros(2, 40), path),
}


def attack(draw: random.Random, folder: Path) -> str:
    """Stand in the way of one who writes."""
    return command(draw, folder) if draw.random() < 0.2 else writer(draw, folder)


def writer(draw: random.Random, folder: Path) -> str:
    """One of the library's functions that write."""
    rare = ("network.onnx", "network.pt2")
    name = draw.choice([n for n in WRITERS if n not in rare] * 4 + list(rare))
    warmed(name)
    place = folder / "place"
    place.mkdir()
    path = place / name
    WRITERS[name](path)
    before, size = path.read_bytes(), path.stat().st_size
    hindrance = draw.choice(tuple(HINDRANCES))
    with HINDRANCES[hindrance](draw, path, size):
        said = oracles.refusal(lambda: WRITERS[name](path), OSError)
    if hindrance in ("full", "read-only"):
        assert said or hindrance == "full", f"{hindrance}: {name} is said to be written"
        assert path.read_bytes() == before or not said, (
            f"{hindrance}: {name}: refused ({said}), but the old file is another one"
        )
        assert [p.name for p in place.iterdir()] == [name], (
            f"{hindrance}: {name}: there are {[p.name for p in place.iterdir()]}"
        )
    elif hindrance == "a folder":
        assert said and path.is_dir(), f"{name} has taken the place of a folder"
    return REFUSED if said else SURVIVED


_warmed: set[str] = set()


def warmed(name: str) -> None:
    """Write once elsewhere, so that all is imported before the user changes."""
    if name not in _warmed:
        with tempfile.TemporaryDirectory() as place:
            WRITERS[name](Path(place) / name)
        _warmed.add(name)


@contextmanager
def full(draw: random.Random, path: Path, size: int) -> Iterator[None]:
    """No file may get longer than some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.choice((0, 1, size // 2, size - 1, draw.randrange(size))), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def read_only(draw: random.Random, path: Path, size: int) -> Iterator[None]:
    """Nobody may write to the folder; as root, somebody else tries."""
    path.parent.parent.chmod(0o755)
    path.parent.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.parent.chmod(0o755)


@contextmanager
def gone(draw: random.Random, path: Path, size: int) -> Iterator[None]:
    """The folder has been removed."""
    shutil.rmtree(path.parent)
    yield


@contextmanager
def folder_there(draw: random.Random, path: Path, size: int) -> Iterator[None]:
    """There is a folder of the file's name."""
    path.unlink()
    path.mkdir()
    yield


HINDRANCES = {"full": full, "full ": full, "read-only": read_only, "gone": gone, "a folder": folder_there}


def command(draw: random.Random, folder: Path) -> str:
    """The command line: it ends with one line of error, and goes on when there is room again."""
    run = folder / "run"
    shutil.copytree(workplace() / "broken", run)
    argv = [*commands.training(workplace() / "data", run), "--resume"]
    if draw.random() < 0.4:
        source = workplace() / "whole" / "sparse.safetensors"
        run = folder / "small"
        argv = ["prune", source, "--arch", "squeezenet1_1", "--sparsity", 0.3, "--image-size", 32, "-o", run]
    size = draw.choice((0, 1000, 100_000, 1 << 20, 1 << 21))
    with full(random.Random(0), run / "x", 1) if size == 0 else limited(size):
        status, _ = commands.call(*argv)
    assert argv[0] != "prune" or run.exists() == (status == 0)
    if argv[0] == "sparsify":
        commands.call(*argv)
        assert (run / "report.json").exists(), "it does not go on when there is room again"
    return REFUSED if status else SURVIVED


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may get longer than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
