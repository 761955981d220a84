"""The scripts of docs/: from-sparse-to-small.md on a folder of made images, many-machines.md in two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"


def script(page: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return block


def make_images(folder: Path) -> None:
    """Two classes that differ in brightness."""
    dice = np.random.default_rng(0)
    for split, count in (("train", 128), ("test", 8)):
        for name, level in (("dark", 60), ("light", 190)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = dice.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_the_script_makes_a_small_network_of_images(tmp_path):
    pytest.importorskip("fastai.vision.all")
    pytest.importorskip("onnxruntime")
    make_images(tmp_path / "images")
    (tmp_path / "small.py").write_text(script("from-sparse-to-small.md"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "small.py", "images", "1"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    masked, small = re.search(r"accuracy: (\S+) masked, (\S+) small", run.stdout).groups()
    assert masked == small
    before, after = (int(n.replace(",", "")) for n in re.search(r"parameters: (\S+) -> (\S+)", run.stdout).groups())
    # resnet18 with 2 classes has 11,177,538 parameters
    assert before == 11_177_538
    assert after < 0.26 * before
    assert re.search(r"onnxruntime: \d+ of 16 images right", run.stdout)
    assert (tmp_path / "small.onnx").stat().st_size + (tmp_path / "small.safetensors").stat().st_size < 30e6


def test_the_script_for_several_processes_ends_with_equal_weights(tmp_path):
    (tmp_path / "train.py").write_text(script("many-machines.md"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "sparsity 0.80, equal weights: True"
