"""The command line inside of this process, on small networks and images of its own."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from fasterai.cli import main, output, small

CLASSES = ("cat", "dog")


def call(*argv: object) -> tuple[int, str]:
    """Run a command: its exit status, and what it writes to stderr. A usage error must be one line."""
    small.RUN_TIME = 0.002  # how fast anything is does not matter here
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(part) for part in argv])
    said = err.getvalue()
    if status == 2:
        lines = [line for line in said.splitlines() if line.startswith("fasterai: error: ") and len(line.split()) > 5]
        assert len(lines) == 1 and said.splitlines()[-1] == lines[0], f"not one line of error: {said[-300:]!r}"
    assert status in (0, 2, 130), f"exit status {status}"
    return status, said


def images(folder: Path, count: int = 4, seed: int = 0, size: int = 32) -> Path:
    """A folder of images, with two classes."""
    noise = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def training(data: Path, run: Path, draw: random.Random | None = None) -> list[object]:
    """The arguments of a short training."""
    more = [] if draw is None else ["--granularity", draw.choice(("weight", "coupled"))]
    return ["sparsify", data, "--arch", "squeezenet1_1", "--epochs", 2, "--batch-size", 4, "--sparsity", 0.5, "-o", run, *more]


def interrupted(data: Path, run: Path, after: int) -> Path:
    """A training that was broken off right after so many of its checkpoints."""
    save, written = output.save_checkpoint, [0]

    def counting(content: object, folder: Path) -> None:
        save(content, folder)  # type: ignore[arg-type]
        written[0] += 1
        if written[0] == after:
            raise KeyboardInterrupt

    output.save_checkpoint = counting
    try:
        assert call(*training(data, run))[0] == 130
    finally:
        output.save_checkpoint = save
    return run
