from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasterai.cli.pictures import write_sparsity, write_training


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


def orange_pixels(path: Path) -> int:
    """Pixels in the colour of what is sparse."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - [0xD9, 0x48, 0x0F]).max(2) < 8).sum())


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
