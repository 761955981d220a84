from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fasterai.cli import pictures
from fasterai.cli.pictures import write_all, write_removal, write_small, write_sparsity, write_training
from fasterai.prune.removal import remove


def report(stages: tuple[str, ...] = ("dense", "sparse"), epochs: int = 3, sparsity: float = 0.9, layers: int = 3) -> dict:
    history = [{"epoch": i + 1, "accuracy": 0.5 + 0.1 * i} for i in range(epochs)]
    names = {"granularity": "weight", "context": "global", "criteria": "large_final", "schedule": "one_cycle"}
    return {
        "arguments": {"arch": "tiny", "sparsity": sparsity, **names},
        "granularity": "weight",
        "results": dict.fromkeys(stages),
        "history": dict.fromkeys(stages, history),
        "schedule": [[0.0, 0.0], [epochs, sparsity]],
        "layers": [
            {"name": f"layer{i}.weight", "units": 100, "pruned": int(100 * sparsity), "weights": 100, "zeros": {"sparse": 90}}
            for i in range(layers)
        ],
    }


ORANGE, BLUE = (0xD9, 0x48, 0x0F), (0x1C, 0x72, 0x93)


def orange_pixels(path: Path) -> int:
    """Pixels in the colour of what is sparse."""
    return pixels_of(path, ORANGE)


def pixels_of(path: Path, color: tuple[int, int, int]) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - color).max(2) < 8).sum())


def with_small(share: float, stages: tuple[str, ...] = ("dense", "sparse")) -> dict:
    """A report whose small network has a share of everything."""
    names = [*stages, "small"]
    shares = {name: share if name == "small" else 1.0 for name in names}
    seconds, as_fast = {n: 0.01 * s for n, s in shares.items()}, {n: 1 / s for n, s in shares.items()}
    batches = [
        {"images": size, "seconds": seconds, "as_fast": dict(as_fast), "quartiles": {n: [f, f] for n, f in as_fast.items()}}
        for size in (1, 32)
    ]
    costs = {
        n: {"parameters": int(1000 * s), "nonzero": 100, "macs": 1000 * s, "file_bytes": 1000 * s} for n, s in shares.items()
    }
    small = {
        "why_not": "",
        "accuracy": 0.9,
        "costs": costs,
        "times": {"device": "cpu", "threads": 1, "batches": batches},
    }
    return {**report(stages), "results": {stage: {"accuracy": 0.9} for stage in stages}, "small": small}


@pytest.mark.parametrize("case", [
    {}, {"stages": ("sparse",)}, {"epochs": 1}, {"epochs": 40}, {"sparsity": 0.0}, {"sparsity": 1.0}, {"layers": 1},
    {"layers": 60},
])  # fmt: skip
def test_pictures_are_drawn(tmp_path: Path, case: dict) -> None:
    write_training(report(**case), tmp_path / "training.png")
    write_sparsity(report(**case), tmp_path / "sparsity.png")
    assert orange_pixels(tmp_path / "training.png") > 500
    for name in ("training", "sparsity"):
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert width == 1200
        assert height > 200
    assert {path.name for path in tmp_path.iterdir()} == {"training.png", "sparsity.png"}


def test_bars_are_as_long_as_the_sparsity(tmp_path: Path) -> None:
    areas = []
    for sparsity in (0.25, 0.5, 1.0):
        write_sparsity(report(sparsity=sparsity), tmp_path / "sparsity.png")
        areas.append(orange_pixels(tmp_path / "sparsity.png"))
    # The white numbers and the line across take some of it.
    assert areas[1] / areas[2] == pytest.approx(0.5, abs=0.03)
    assert areas[0] / areas[2] == pytest.approx(0.25, abs=0.03)


def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from fasterai.cli.pictures import write_sparsity, write_training;"
        "report = json.loads(sys.argv[1]); path = Path(sys.argv[2]);"
        "write_training(report, path); write_sparsity(report, path); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(report()), str(tmp_path / "picture.png")], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("stages", [("dense", "sparse"), ("sparse",)])
def test_the_small_networks_bars_are_as_long_as_its_shares(tmp_path: Path, stages: tuple[str, ...]) -> None:
    areas = {}
    for share in (0.25, 0.5, 1.0):
        write_small(with_small(share, stages), tmp_path / "small.png")
        areas[share] = pixels_of(tmp_path / "small.png", BLUE)
    # The figures beside the bars are of the same colour.
    assert areas[0.5] / areas[1.0] == pytest.approx(0.5, abs=0.05)
    assert areas[0.25] / areas[1.0] == pytest.approx(0.25, abs=0.05)
    assert orange_pixels(tmp_path / "small.png") == pytest.approx(areas[1.0], rel=0.05)


@pytest.mark.parametrize(
    ("ratio", "quartiles", "words"),
    [(1.04, [1.0, 1.08], "same"), (16.23, [1.39, 21.39], "5% to 72%"), (2.0, [1.9, 2.1], "50%")],
)
def test_times_are_told_as_in_the_table(ratio: float, quartiles: list[float], words: str) -> None:
    found = with_small(0.5)
    batch = found["small"]["times"]["batches"][0]
    batch["as_fast"]["small"], batch["quartiles"]["small"] = ratio, quartiles
    (_, bars) = pictures._shares(found)[-len(found["small"]["times"]["batches"])]
    assert bars["small"][2] == words


@pytest.mark.parametrize(("small", "names"), [
    ({}, {"training.png", "sparsity.png"}),
    ({"small": None}, {"training.png", "sparsity.png"}),
    ({"small": {"why_not": "no removable channel is silent"}}, {"training.png", "sparsity.png"}),
    (None, {"training.png", "sparsity.png", "small.png"}),
])  # fmt: skip
def test_all_pictures_that_there_are_figures_for(tmp_path: Path, small: dict | None, names: set[str]) -> None:
    write_all(with_small(0.5) if small is None else {**report(), **small}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_picture_of_a_removal_leaves_no_figure_open(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    with torch.no_grad():
        network[0].weight[2:], network[0].bias[2:] = 0, 0
    write_removal(remove(network, torch.randn(1, 1, 8, 8), measure=False), tmp_path / "small.png")
    assert plt.get_fignums() == before
    assert pixels_of(tmp_path / "small.png", BLUE) > 500
