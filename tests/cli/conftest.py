from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeImages = Callable[..., Path]


@pytest.fixture(scope="package", autouse=True)
def short_timing() -> Iterator[None]:
    """What is tested is not how fast anything is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasterai.cli.small.RUN_TIME", 0.01)
        yield


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """A folder of images of noise: `make_images("data", {"cat": 3, "dog": 2}, size=(8, 8))`."""

    def make(name: str, classes: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
        noise = np.random.default_rng(len(name))
        for label, count in classes.items():
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def images(make_images: MakeImages) -> Path:
    return make_images("data", {"ant": 10, "bee": 10}, size=(32, 32))
