"""Kills: SIGKILL in the midst of a training with checkpoints, of the command line, and of each function that writes a file.

What is run again ends with the same bits as what was never killed; a file is the old one or the new one, never a part.
Half of the kills come at a moment by the clock, the others at one of the process's own accesses to files, which a seed repeats.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tests.attack import commands, oracles
from tests.attack.networks import random_net
from tests.attack.settings import OPTIMIZERS, Run
from tests.attack.trials import SURVIVED, start

COUNT, OUTSIDE = 40, True
PATIENCE = 120


def attack(draw: random.Random, folder: Path) -> str:
    """Kill one of these."""
    return draw.choice((*[loop] * 5, *[writer] * 4, *[sparsify] * 2, prune, demo))(draw, folder)


def finished(function: Callable[..., object], *arguments: Any) -> float:
    """Run a function in a process to its end, and tell the seconds that it took."""
    begin = time.perf_counter()
    process = start(function, *arguments)
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}: {_noted(arguments)}"
    return time.perf_counter() - begin


def _noted(arguments: tuple[Any, ...]) -> str:
    path = Path(str(arguments[0])) / "error.txt"
    return path.read_text()[-400:] if path.exists() else ""


def killed(draw: random.Random, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    """Run a function in a process that is killed: at a moment by the clock, or at an access to a file."""
    if draw.random() < 0.5:
        process = start(_dying, draw.randint(1, 60), function, *arguments)
        process.join(PATIENCE)
    else:
        process = start(function, *arguments)
        process.join(draw.random() * seconds)
    if process.exitcode is None:
        process.kill()  # this process alone
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"ended with {process.exitcode}: {_noted(arguments)}"


def _dying(events: int, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function, and die at one of its changes of files."""
    left = [events]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and (details[1] is None or set("wax+") & set(str(details[1])))
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    function(*arguments)


def noted(function: Callable[[], object], folder: Path) -> None:
    """Call a function; what goes wrong stands in a file."""
    try:
        function()
    except BaseException as error:
        import traceback

        (folder / "error.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from error


# --- a plain loop --------------------------------------------------------------------------------------------------------


def loop(draw: random.Random, folder: Path) -> str:
    """A training that saves itself every few steps, and goes on from there."""
    seed, result = draw.randrange(1 << 30), folder / "result.pt"
    whole = folder / "whole"
    whole.mkdir()
    seconds = finished(train, whole, seed)
    killed_one = folder / "killed"
    killed_one.mkdir()
    for _ in range(draw.randint(1, 3)):
        killed(draw, seconds, train, killed_one, seed)
    finished(train, killed_one, seed)
    result = [torch.load(one / "result.pt", weights_only=True) for one in (whole, killed_one)]
    assert oracles.equal(*result), "a killed training ended with other bits"
    return SURVIVED


def train(folder: Path, seed: int) -> None:
    """Train with checkpoints in a folder, from the last one there."""
    draw = random.Random(seed)
    net, steps, every = random_net(draw), draw.randint(6, 14), draw.randint(1, 3)
    axes = {
        "granularity": draw.choice(("weight", "row", "coupled")),
        "context": draw.choice(("local", "global")),
        "criteria": draw.choice(("large_final", "movement", "updating_movement", "snip", "random", "wanda")),
        "schedule": draw.choice(("agp", "one_cycle", "iterative", "dsd")),
        "sparsity": 0.5,
    }
    optimizer = draw.choice(tuple(OPTIMIZERS))

    def go() -> None:
        run, checkpoint = Run(net, axes, optimizer, steps), folder / "checkpoint.pt"
        if checkpoint.exists():
            run.load(checkpoint.read_bytes())
        while run.handle.loop.step < steps:
            run.go(min(steps, run.handle.loop.step + every))
            part = folder / "part"
            part.write_bytes(run.saved())
            part.replace(checkpoint)
        run.handle.remove()
        torch.save([run.model.state_dict(), run.sparsifier.masks], folder / "result.pt")

    noted(go, folder)


# --- writers of files ----------------------------------------------------------------------------------------------------


def wide(value: float) -> nn.Module:
    """A network of 5 MB, whose weights tell which one it is."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 300))
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def write(kind: str, path: Path, value: float) -> None:
    """Write a file in one of the library's ways."""
    from fasterai.export.all import export_onnx, export_program
    from fasterai.prune.all import save_small
    from fasterai.sparse.sparsifier import Sparsifier

    model, x = wide(value), torch.zeros(2, 1000)
    if kind == "model":
        Sparsifier(model).save_model(path)
    elif kind == "small":
        save_small(path, model)
    elif kind == "onnx":
        export_onnx(model, x, path)
    elif kind == "program":
        export_program(model, x, path)
    else:
        from fasterai.cli import output

        output.save_weights(model, path, ("a", "b"))


def read(kind: str, path: Path) -> float:
    """Read such a file, all of it, and tell which one it is."""
    if kind == "onnx":
        from onnx import load, numpy_helper

        found = [torch.tensor(numpy_helper.to_array(one)) for one in load(str(path)).graph.initializer]
        found = [x for x in found if x.is_floating_point() and x.dim() == 2]
    elif kind == "program":
        found = list(torch.export.load(path).state_dict.values())
    else:
        found = list((torch.load(path, weights_only=True) if kind == "model" else load_file(path)).values())
    assert sum(x.numel() for x in found) > 1_200_000
    values = {float(v) for x in found for v in (x.min(), x.max())}
    assert len(values) == 1, f"the file holds {sorted(values)}"
    return values.pop()


ENDINGS = {"model": "pt", "onnx": "onnx", "program": "pt2"}


def writer(draw: random.Random, folder: Path) -> str:
    """A file that is written again and again, by turns of two networks."""
    kind = draw.choice(
        ("model", "model", "small", "small", "weights", "weights", *(["onnx", "program"] if draw.random() < 0.3 else []))
    )
    path = folder / f"file.{ENDINGS.get(kind, 'safetensors')}"
    process = start(rewrite, folder, kind, path)
    limit = time.perf_counter() + PATIENCE
    while not (folder / "ready").exists() and process.is_alive() and time.perf_counter() < limit:
        time.sleep(0.005)
    time.sleep(draw.random() * (2.0 if kind in ("onnx", "program") else 0.2))
    assert process.is_alive(), f"writing {kind} ended: {_noted((folder,))}"
    process.kill()
    process.join()
    assert read(kind, path) in (1.0, 2.0, 3.0)
    left = [p.name for p in folder.iterdir() if p.name not in ("ready", path.name)]
    assert len(left) <= 1 and not any(name.endswith(path.suffix) and not name.startswith(".") for name in left), left
    finished(write, kind, path, 4.0)
    assert read(kind, path) == 4.0
    return SURVIVED


def rewrite(folder: Path, kind: str, path: Path) -> None:
    """Write a file until the end of this process."""

    def go() -> None:
        write(kind, path, 1.0)
        (folder / "ready").touch()
        for i in range(100_000):
            write(kind, path, 2.0 + i % 2)

    noted(go, folder)


# --- the command line ----------------------------------------------------------------------------------------------------


def command(folder: Path, argv: list[object], statuses: tuple[int, ...] = (0,)) -> None:
    """Run a command; another exit status than these is written down."""

    def go() -> None:
        status, said = commands.call(*argv)
        assert status in statuses, f"exit status {status}: {said}"

    folder.mkdir(exist_ok=True)
    noted(go, folder)


@functools.cache
def place() -> tuple[Path, dict[str, float]]:
    """Images, and complete runs on them with the seconds that they took."""
    root = Path(tempfile.mkdtemp(prefix="attack-kills-"))
    data = commands.images(root / "data")
    seconds = {}
    for granularity in ("weight", "coupled"):
        run = root / granularity
        seconds[granularity] = finished(command, root / "notes", [*commands.training(data, run), "--granularity", granularity])
    seconds["demo"] = finished(command, root / "notes", ["demo", "-o", root / "demo"])
    return root, seconds


def sparsify(draw: random.Random, folder: Path) -> str:
    """`fasterai sparsify`, killed up to three times and gone on with."""
    root, seconds = place()
    granularity = draw.choice(("weight", "coupled"))
    run, notes = folder / "run", folder / "notes"
    argv = [*commands.training(root / "data", run), "--granularity", granularity]
    for i in range(draw.randint(1, 3)):
        killed(draw, seconds[granularity], command, notes, [*argv, *(["--resume"] if i else [])])
    finished(command, notes, [*argv, "--resume"])
    compare(root / granularity, run)
    return SURVIVED


def demo(draw: random.Random, folder: Path) -> str:
    """`fasterai demo`, killed and begun again in the same folder."""
    root, seconds = place()
    killed(draw, seconds["demo"], command, folder / "notes", ["demo", "-o", folder / "run"])
    finished(command, folder / "notes", ["demo", "-o", folder / "run"])
    compare(root / "demo", folder / "run")
    return SURVIVED


def prune(draw: random.Random, folder: Path) -> str:
    """`fasterai prune`, killed: there is no folder, or all of it."""
    root, seconds = place()
    out = folder / "small"
    argv = ["prune", root / "weight" / "sparse.safetensors", "--arch", "squeezenet1_1", "--sparsity", 0.3]
    argv += ["--image-size", 32, "-o", out]
    killed(draw, seconds["weight"], command, folder / "notes", argv)
    if out.exists():
        assert {p.name for p in out.iterdir()} == {"small.safetensors", "small.png", "report.json"}
        json.loads((out / "report.json").read_text())
        load_file(out / "small.safetensors")
        shutil.rmtree(out)
    finished(command, folder / "notes", argv)
    return SURVIVED


def compare(whole: Path, run: Path) -> None:
    """Fail if two complete folders differ in anything but times."""
    names = {p.name for p in run.iterdir()}
    left = names - {p.name for p in whole.iterdir()}
    assert not {name for name in left if not name.endswith(".part")}, f"left: {sorted(left)}"
    for name in names:
        if name.endswith(".safetensors"):
            assert oracles.equal(load_file(whole / name), load_file(run / name)), f"{name} has other bits"
    a, b = (torch.load(one / "sparsifier.pt", weights_only=True) for one in (whole, run))
    assert oracles.equal(a, b), "sparsifier.pt has other bits"
    a, b = (json.loads((one / "report.json").read_text()) for one in (whole, run))
    for key in ("layers", "schedule", "left_out"):
        assert a[key] == b[key], f"report.json differs in {key}"
    for stage, history in a["history"].items():
        without = [
            [{k: v for k, v in epoch.items() if "second" not in k} for epoch in one] for one in (history, b["history"][stage])
        ]
        assert without[0] == without[1], f"report.json differs in the history of {stage}"
