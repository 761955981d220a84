"""A folder that becomes full, read-only, removed or a file while a resumed run is under way: in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.beside import Beside, waits_for

#: In which way the folder is spoiled, and before which function.
CASES = [
    ("full", "output.save_checkpoint"), ("full", "output.write_report"), ("read-only", ""), ("read-only", "output.save_masks"),
    ("removed", "output.save_weights"), ("a file", "output.save_checkpoint"),
]  # fmt: skip
#: Where the folder is mended after it, and the run goes on.
MENDED = [CASES[0], CASES[3]]
SCRIPT = """
import ctypes, json, os, resource, shutil, sys
from pathlib import Path
import torch
import matplotlib.pyplot
from fasterai.cli import experiment, main, output, pictures, small, training
from fasterai.graph.channels import channel_graph
torch.set_num_threads(1)
small.RUN_TIME = 0.01
images, place, cases, mended = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])

def spoil(way, folder):
    if way == "full":  # as a full disk tells it: no file may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    elif way == "read-only":
        folder.chmod(0o555)
        if os.geteuid() == 0:  # what root may do all the same
            assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    else:
        shutil.rmtree(folder)
        if way == "a file":
            folder.write_text("")

def replace(name, before):
    module, function = (globals()[name.split(".")[0]], name.split(".")[1])
    whole = getattr(module, function)
    def replaced(*arguments, **options):
        before()
        return whole(*arguments, **options)
    setattr(module, function, replaced)

def sparsify(folder, *more):
    return main(["sparsify", images, "--arch", "squeezenet1_1", "--epochs", "2", "--batch-size", "8", "--granularity",
        "weight", "--context", "local", "--sparsity", "0.5", "--no-dense", "-o", str(folder), *more])

def run(folder, *more, before=lambda: None):
    # The status, and what was said, of a run in a process of its own. It is said into a pipe, which cannot be full.
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            before()
            status = sparsify(folder, *more)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.WEXITSTATUS(os.waitpid(child, 0)[1]), said

steps = 0
def interrupt():
    global steps
    steps += 1
    if steps == 3:  # 2 steps an epoch
        raise KeyboardInterrupt

def weights(folder):
    return (folder / "sparse.safetensors").read_bytes()

channel_graph(torch.nn.Linear(2, 2), torch.ones(1, 2))  # imports what an export needs; no backward before a fork
assert run(place / "whole")[0] == 0
assert run(place / "broken", before=lambda: replace("training.augment", interrupt))[0] == 130
results = []
for way, function in cases:
    folder = place / f"{way} {function}"
    shutil.copytree(place / "broken", folder)
    done = []
    def once():
        if not done:
            done.append(True)
            spoil(way, folder)
    status, said = run(folder, "--resume", before=lambda: replace(function, once) if function else once())
    found = {"status": status, "said": said}
    if [way, function] in mended:
        folder.chmod(0o755)
        found["left"] = sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))
        found["again"] = run(folder, "--resume")[0]
        found["same"] = weights(folder) == weights(place / "whole")
    results.append(found)
print(json.dumps(results))
"""


def spoiled(place: Path, environment: Mapping[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    noise = np.random.default_rng(0)
    for label in ("ant", "bee"):
        (place / "data" / label).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / "data" / label / f"{i}.png")
    arguments = [place / "data", place, json.dumps(CASES), json.dumps(MENDED)]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


pytestmark = [waits_for(spoiled)]


@pytest.fixture
def results(beside: Beside) -> dict[tuple[str, str], dict[str, Any]]:
    return beside(spoiled)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_folder_that_is_spoiled_is_told_in_one_line(results, case: tuple[str, str]) -> None:
    found = results[case]
    said = [line for line in found["said"].splitlines() if line.startswith("fasterai: ")]
    assert "Traceback" not in found["said"]
    assert (found["status"], len(said)) == (2, 1)
    assert said[0].startswith("fasterai: error: ")
    assert " ".join(case) in said[0]  # the folder's name


@pytest.mark.parametrize("case", MENDED, ids=" ".join)
def test_in_a_mended_folder_the_run_goes_on_to_the_same_weights(results, case: tuple[str, str]) -> None:
    found = results[case]
    assert (found["left"], found["again"], found["same"]) == ([], 0, True)
