"""Draws every picture of the docs again: `python docs/pictures.py` writes `docs/images/`, in about a minute.

The catalogues' pictures are those of `fasterai.analyze.catalogues`; the demo's are of a run of `fasterai demo`, whose times are
this machine's.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fasterai.analyze.catalogues import (
    plot_contexts,
    plot_criteria,
    plot_granularities,
    plot_schedules,
)
from fasterai.cli import main
from fasterai.display import save_figure
from PIL import Image

IMAGES = Path(__file__).parent / "images"
CATALOGUES = {
    "contexts": plot_contexts,
    "criteria": plot_criteria,
    "granularities": plot_granularities,
    "schedules": plot_schedules,
}


def draw_catalogues(folder: Path) -> None:
    """Draw the picture of each catalogue."""
    for name, plot in CATALOGUES.items():
        save_figure(plot(), folder / f"{name}.png")
        shrink(folder / f"{name}.png")


def draw_demo(folder: Path) -> None:
    """Run the demo, and take over two of its pictures."""
    with tempfile.TemporaryDirectory() as run:
        main(["demo", "-o", f"{run}/demo"])
        for name in ("small", "training"):
            shutil.copy(Path(run, "demo", f"{name}.png"), folder / f"demo-{name}.png")
            shrink(folder / f"demo-{name}.png")


def shrink(path: Path) -> None:
    """Write a picture with 64 colours, which is more than it shows: a third of the bytes."""
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    draw_catalogues(IMAGES)
    draw_demo(IMAGES)
