"""Mutated files: everything that the library reads, with its bits flipped, cut, or one value of its inside another one.

A file is refused in words, and then nothing has changed; or it is read, and then what comes of it is whole. A header whose
tensors are untouched gives the outputs that were saved, or none.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from fasterai.prune.all import Pruner, load_small, save_small
from tests.attack import commands, oracles
from tests.attack.looks import Snapshot
from tests.attack.mutations import mutated, mutated_bytes, mutated_header
from tests.attack.networks import random_net
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 160, 180


def attack(draw: random.Random, folder: Path) -> str:
    """Change one file of one kind, and read it."""
    kind = draw.choice((*[small] * 8, weights, weights, resumed, finished))
    return kind(draw, folder)


def small(draw: random.Random, folder: Path) -> str:
    """A small network's file, read by `load_small` into a fresh one."""
    net, path = random_net(draw), folder / "small.safetensors"
    model, dense, x = net.model(), net.model(), net.batch(1)[0]
    try:
        Pruner(model, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model()
    except ValueError as error:
        oracles.check_clear(error)  # nothing to take out: a file all the same
    save_small(path, model)
    content = path.read_bytes()
    is_header = draw.random() < 0.75
    if is_header:
        changed, _, words = mutated_header(draw, content)
    else:
        changed, words = mutated_bytes(draw, content)
    path.write_bytes(changed)
    before = Snapshot(dense)
    said = oracles.refusal(lambda: load_small(path, dense))
    if said:
        differences = before.differences(dense)
        assert not differences, f"{net.kind}: {words}: refused, but {differences[:3]}"
        return REFUSED
    with torch.no_grad():
        found, expected = dense.eval()(x), model.eval()(x)
    if is_header:
        try:
            oracles.close(expected, found, 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{net.kind}: {words}: accepted, and {error}") from error
    dense.train()
    net.loss(dense, 3).backward()
    return SURVIVED


@functools.cache
def workplace() -> Path:
    """A folder for this process, with images, a broken off run and a complete one."""
    place = Path(tempfile.mkdtemp(prefix="attack-files-"))
    data = commands.images(place / "data")
    commands.interrupted(data, place / "broken", 3)
    assert commands.call(*commands.training(data, place / "whole"))[0] == 0
    return place


def weights(draw: random.Random, folder: Path) -> str:
    """Weights for `fasterai prune`: of safetensors, or of torch.save."""
    source = workplace() / "whole" / "sparse.safetensors"
    if draw.random() < 0.5:
        path = folder / "weights.safetensors"
        content, words = (
            mutated_bytes(draw, source.read_bytes()) if draw.random() < 0.4 else mutated_header(draw, source.read_bytes())[::2]
        )
        path.write_bytes(content)
    else:
        path, (content, words) = folder / "weights.pt", saved(draw, _state(source))
        path.write_bytes(content)
    out = folder / "small"
    return told(words, out, "prune", path, "--arch", "squeezenet1_1", "--sparsity", 0.3, "--image-size", 32, "-o", out)


def _state(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {"state_dict": load_file(path), "epoch": 3}


def saved(draw: random.Random, state: Any) -> tuple[bytes, str]:
    """A file of torch.save, changed in its bytes or before it was written."""
    import io

    file, words = io.BytesIO(), ""
    is_outside = draw.random() < 0.4
    if not is_outside:
        state, _, words = mutated(draw, state)
    torch.save(state, file)
    return mutated_bytes(draw, file.getvalue()) if is_outside else (file.getvalue(), words)


def told(words: str, out: Path, *argv: object) -> str:
    """Run a command; after an error it must have written nothing new."""
    try:
        status, _ = commands.call(*argv)
    except BaseException as error:
        raise AssertionError(f"{argv[0]}: {words}: {type(error).__name__}: {error}") from error
    if status == 0:
        assert json.loads((out / "report.json").read_text())["command"] == argv[0]
        return SURVIVED
    assert argv[0] != "prune" or not out.exists(), f"{argv[0]}: {words}: refused, but {out.name}/ is there"
    return REFUSED


def resumed(draw: random.Random, folder: Path) -> str:
    """The checkpoint of a broken off run, or weights beside it, then `--resume`."""
    run = shutil.copytree(workplace() / "broken", folder / "run")
    name = draw.choice(["checkpoint.pt"] * 3 + ["dense.safetensors"])
    path = run / name
    if name == "checkpoint.pt":
        state = torch.load(path, weights_only=True)
        content, words = saved(draw, state)
    else:
        content, words = mutated_bytes(draw, path.read_bytes())
    path.write_bytes(content)
    return told(f"{name}: {words}", run, *commands.training(workplace() / "data", run), "--resume")


def finished(draw: random.Random, folder: Path) -> str:
    """The report of a complete run, then `--resume`."""
    run = shutil.copytree(workplace() / "whole", folder / "run")
    path = run / "report.json"
    if draw.random() < 0.3:
        content, words = mutated_bytes(draw, path.read_bytes())
    else:
        report, _, words = mutated(draw, json.loads(path.read_text()), plain=True)
        content = json.dumps(report).encode()
    path.write_bytes(content)
    try:
        status, _ = commands.call(*commands.training(workplace() / "data", run), "--resume")
    except BaseException as error:
        raise AssertionError(f"report.json: {words}: {type(error).__name__}: {error}") from error
    return REFUSED if status else SURVIVED
