"""Folders of images with all that may lie in them, made by chance; what may be read of them is known from how they were made.

Each image has one colour of its own, so that none is read twice or stands on both sides of the split. What is unreadable is
named, and left out on request. Nothing hangs, and no program is started.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import EpsImagePlugin, Image

from fasterai.cli import folders
from fasterai.cli.folders import read_folder
from tests.attack import oracles
from tests.attack.trials import REFUSED, SURVIVED

COUNT, SECONDS = 250, 20
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


class Tree:
    """A folder that is made bit by bit, and what must be found in it."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.draw = root, draw
        self.classes = [f"class{i}" for i in range(draw.randint(2, 4))]
        self.good: dict[int, str] = {}  # colour -> class
        self.bad: list[str] = []
        for name in self.classes:
            (root / name).mkdir(parents=True)
            for _ in range(draw.randint(3, 6)):
                self.image(root / name)

    def place(self) -> Path:
        """A folder of some class, or one below it."""
        folder = self.root / self.draw.choice(self.classes)
        if self.draw.random() < 0.4:
            folder /= self.draw.choice(("sub", "deep/er", "ümläut", "with space"))
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def name(self, kind: str) -> str:
        """A name that is not taken."""
        return f"{self.draw.randrange(1 << 40)}.{kind}"

    def picture(self, mode: str = "RGB") -> Image.Image:
        """An image of a colour that no other one has."""
        colour = len(self.good) + 1
        return Image.new("RGB", (12, 9), (colour % 256, colour // 256, 7)).convert(mode)

    def image(self, folder: Path, kind: str = "png") -> Path:
        """An image that can be read."""
        path = folder / self.name(kind)
        self.picture().save(path)
        self.good[len(self.good) + 1] = path.relative_to(self.root).parts[0]
        return path

    def unreadable(self, content: bytes, kind: str = "png") -> None:
        """A file that no image can be read from."""
        path = self.place() / self.name(kind)
        path.write_bytes(content)
        self.bad.append(str(path))


def readable(tree: Tree) -> None:
    """One more image, in a format without loss."""
    tree.image(tree.place(), tree.draw.choice(("png", "bmp", "tif", "ppm", "PNG")))


def truncated(tree: Tree) -> None:
    """An image that ends too early."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    content = file.getvalue()
    tree.unreadable(content[: tree.draw.randrange(len(content) - 60)])


def noise(tree: Tree) -> None:
    """Bytes that are no image."""
    tree.unreadable(
        tree.draw.randbytes(tree.draw.choice((0, 1, 100, 5000))), tree.draw.choice(("png", "jpg", "gif", "tif", "webp"))
    )


def postscript(tree: Tree) -> None:
    """A program, called an image."""
    tree.unreadable(POSTSCRIPT.encode(), tree.draw.choice(("png", "jpg", "tiff")))


def text(tree: Tree) -> None:
    """What does not count as an image by its name."""
    (tree.place() / tree.name(tree.draw.choice(("txt", "json", "db", "pdf", "eps")))).write_bytes(tree.draw.randbytes(20))


def hidden(tree: Tree) -> None:
    """Hidden files and folders, which do not count."""
    folder = tree.place() / ".cache"
    folder.mkdir(exist_ok=True)
    tree.picture().save(folder / tree.name("png"))
    tree.picture().save(tree.place() / f".{tree.name('png')}")


def pipe(tree: Tree) -> None:
    """A pipe that nobody writes to."""
    path = tree.place() / tree.name("png")
    os.mkfifo(path)
    tree.bad.append(str(path))


def folder_called_image(tree: Tree) -> None:
    """A folder with the name of an image; what lies in it counts."""
    folder = tree.place() / tree.name("png")
    folder.mkdir()
    tree.image(folder)


def loop(tree: Tree) -> None:
    """A link to a folder above, or to its own."""
    place = tree.place()
    (place / tree.name("d")).symlink_to(tree.draw.choice((".", "..", str(tree.root), str(place))))


def across(tree: Tree) -> None:
    """A link into another class."""
    (tree.place() / tree.name("d")).symlink_to(tree.root / tree.draw.choice(tree.classes))


def dangling(tree: Tree) -> None:
    """A link to nowhere, or to itself."""
    path = tree.place() / tree.name("png")
    path.symlink_to(tree.draw.choice(("nowhere.png", path.name)))
    tree.bad.append(str(path))


def floats(tree: Tree) -> None:
    """A TIFF of floats in [0, 1], which is scaled."""
    colour = len(tree.good) + 1
    path = tree.place() / tree.name("tif")
    Image.fromarray(np.full((9, 12), colour / 255, dtype=np.float32)).save(path)
    tree.good[colour] = f"grey {path.relative_to(tree.root).parts[0]}"


def wide(tree: Tree) -> None:
    """A TIFF of 32 bits out of the range of bytes."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), tree.draw.choice((-3, 70000, 1 << 30)), dtype=np.int32)).save(file, "TIFF")
    tree.unreadable(file.getvalue(), "tif")


def no_text(tree: Tree) -> None:
    """A name that is not UTF-8."""
    path = bytes(tree.place()) + b"/\xff" + tree.name("png").encode()
    tree.picture().save(io.BytesIO(), "PNG")
    with open(path, "wb") as file:
        tree.picture().save(file, "PNG")
    tree.bad.append(os.fsencode(path).decode(errors="backslashreplace"))


def bomb(tree: Tree) -> None:
    """A header that says more pixels than any memory has."""
    tree.unreadable(b"P6 200000 200000 255\n" + bytes(100), "ppm")


def socket(tree: Tree) -> None:
    """A character device behind a link."""
    path = tree.place() / tree.name("png")
    path.symlink_to("/dev/zero")
    tree.bad.append(str(path))


NASTY: tuple[Callable[[Tree], None], ...] = (
    *(readable, truncated, noise, postscript, text, hidden, pipe, folder_called_image, loop, across, dangling, floats, wide),
    *(no_text, bomb, socket),
)


def attack(draw: random.Random, folder: Path) -> str:
    """Read a folder by chance."""
    tree = Tree(folder / "data", draw)
    for _ in range(draw.randint(1, 8)):
        draw.choice(NASTY)(tree)
    ran = _watch(folder)
    said = oracles.refusal(lambda: read_folder(tree.root, seed=1))
    assert bool(said) == bool(tree.bad), f"refused: {said}, unreadable: {tree.bad}"
    assert said is None or any(path in said for path in tree.bad), f"{said} names none of {tree.bad}"
    workers, cache = draw.choice((0, 3)), draw.choice((0, 1 << 30))
    data = read_folder(tree.root, seed=1, skip_unreadable=True, workers=workers, cache_bytes=cache)
    assert set(data.skipped) == set(tree.bad), f"left out {sorted(data.skipped)}, unreadable {sorted(tree.bad)}"
    assert data.classes == tuple(tree.classes)
    found = [*_colours(data.train), *_colours(data.valid)]
    assert len(found) == len(tree.good), f"read {len(found)} images of {len(tree.good)}"
    for colour, label, is_grey in found:
        expected = f"grey class{label}" if is_grey else f"class{label}"
        assert tree.good.pop(colour, None) == expected, f"colour {colour} of {expected} is read twice or wrongly"
    assert not ran.exists(), "a program was started"
    return REFUSED if said else SURVIVED


def _watch(folder: Path) -> Path:
    """Put a program of PostScript's into the path that says that it ran."""
    ran, program = folder / "ran", folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    EpsImagePlugin.gs_binary = str(program)
    return ran


def _colours(part: folders.Subset) -> list[tuple[int, int, bool]]:
    pixels, labels = part[list(range(len(part)))]
    first = pixels[:, :, 0, 0].tolist()
    return [
        (rgb[0] if (grey := rgb[0] == rgb[1] == rgb[2]) else rgb[0] + 256 * rgb[1], label, grey)
        for rgb, label in zip(first, labels.tolist(), strict=True)
    ]
