"""L8. Folders of images with one sub-folder for each class.

The walk is not torchvision's `ImageFolder`, which follows links in circles without end and takes hidden folders for classes.
Over 300 lines, since what may lie in a folder is one subject.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from fasterai.cli.data import Data, byte_sums, image_statistics, split_each_class
from fasterai.cli.errors import UsageError
from fasterai.core.checks import warn

__all__ = ["read_data", "read_folder"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Formats that are opened, whatever a file is called; for some others, such as PostScript, Pillow starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF")
VALIDATION_NAMES = ("valid", "val", "test")
CACHE_BYTES = 2 << 30
CHUNK = 64
SHARE = 0.2


@dataclass(frozen=True)
class _Decoded(Dataset[tuple[Tensor, ...]]):
    """Images that are decoded each time they are read."""

    paths: Sequence[str]
    labels: Tensor
    size: int
    workers: int

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images = []
        for row, found in zip(rows, self.decode(rows), strict=True):
            if isinstance(found, str):
                raise UsageError(f"image {self.paths[row]} was readable and is not any more ({found})")
            images.append(found)
        return torch.stack(images), self.labels[rows]

    def decode(self, rows: Sequence[int]) -> list[Tensor | str]:
        """Return for each image the pixels, uint8 `(3, size, size)`, or the reason why it cannot be read."""
        paths = [self.paths[row] for row in rows]
        if not self.workers:
            return [_decode(path, self.size) for path in paths]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(_decode, paths, repeat(self.size)))


def read_data(arguments: argparse.Namespace) -> Data:
    """Read the folder that a command's arguments name, with the options that they give."""
    return read_folder(
        arguments.data,
        image_size=arguments.image_size,
        seed=arguments.seed,
        skip_unreadable=arguments.skip_unreadable,
        workers=arguments.workers,
    )


def read_folder(
    root: Path,
    *,
    image_size: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    workers: int = 0,
    cache_bytes: int = CACHE_BYTES,
    at_most: tuple[int | None, int | None] = (None, None),
) -> Data:
    """Read a folder of images, every file once, so that unreadable ones are found before the training.

    Args:
        root: One sub-folder a class, or train/ and one of valid/, val/, test/ with one sub-folder a class each.
        image_size: The side that all images are cut and resized to; by default after the first image.
        seed: Of the split, if the folder has none.
        skip_unreadable: Leave unreadable files out instead of stopping.
        workers: Threads that decode, none for the caller's own.
        cache_bytes: Images are kept in memory if they fit into it, else decoded whenever they are needed.
        at_most: How many images to train and to validate on are read, drawn from `seed`; None for all. Of a folder without a
            validation part the sum of both is read.

    Raises:
        UsageError: The folder has no images, less than two classes, or an unreadable image.
    """
    train_root, valid_root = _find_parts(root)
    classes = _sub_folders(train_root)
    paths, labels, train_count = _draw(at_most, seed, *_list_images(train_root, valid_root, classes), split=valid_root is None)
    size = image_size or _default_size(paths[:train_count])
    images, sums, failures = _read(_Decoded(paths, labels, size, workers), cache_bytes)
    skipped = {_shown(paths[row]): reason for row, reason in failures.items()}
    if skipped and not skip_unreadable:
        path, reason = next(iter(skipped.items()))
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UsageError(f"unreadable image {path} ({reason}){more}; pass --skip-unreadable to leave such files out")
    rows = torch.tensor([row for row in range(len(paths)) if row not in failures], dtype=torch.int64)
    train, valid = rows[rows < train_count], rows[rows >= train_count]
    _check_counts(labels[train], classes, 2 if valid_root is None else 1)
    if valid_root is None:
        train, valid = (rows[picks] for picks in split_each_class(labels[rows], SHARE, seed))
    elif not len(valid):
        raise UsageError(f"no readable images in {valid_root}")
    _warn_of_shared(paths, train.tolist(), valid.tolist())
    mean, std = image_statistics(sums[train], size * size)
    validation = "a fifth of each class" if valid_root is None else f"folder {valid_root.name}/"
    parts = Subset(images, train.tolist()), Subset(images, valid.tolist())
    return Data(*parts, tuple(classes), mean, std, size, validation, skipped, _fingerprint(root, paths))


def _find_parts(root: Path) -> tuple[Path, Path | None]:
    """Find the folder of the training classes, and that of the validation classes or None."""
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UsageError(f"DATA must be a folder of images, got {root}, which {problem}")
    os.scandir(root).close()  # one that may not be read is named itself, not what would be in it
    train = root / "train"
    if _sub_folders(train):  # else it is a class called train
        for name in VALIDATION_NAMES:
            if _sub_folders(root / name):
                return train, root / name
        if _sub_folders(root) == ["train"]:
            return train, None
    return root, None


def _sub_folders(folder: Path) -> list[str]:
    return _visible(name for name in os.listdir(folder) if (folder / name).is_dir()) if folder.is_dir() else []


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _list_images(train: Path, valid: Path | None, classes: Sequence[str]) -> tuple[list[str], Tensor, int]:
    """List the images of all classes: paths, labels, and the number of training images, which come first."""
    roots = [train] if valid is None else [train, valid]
    images = _images_below([root / name for root in roots for name in _sub_folders(root)])
    if not any(images[train / name] for name in classes):
        raise UsageError(f"no images in {train}: DATA must hold one sub-folder of images ({', '.join(EXTENSIONS)}) a class")
    for folder, found in images.items():
        if folder.name not in classes:
            raise UsageError(f"{valid} must hold classes of the training part, got {folder.name!r}, which is none of them")
        if not found:
            raise UsageError(f"no images in {folder}: every sub-folder is a class with its own; take it away or fill it")
    if len(classes) < 2:
        raise UsageError(f"DATA must hold at least two classes, got only {classes[0]!r} in {train}")
    labels = [label for folder, found in images.items() for label in [classes.index(folder.name)] * len(found)]
    return list(chain(*images.values())), torch.tensor(labels), sum(len(images[train / name]) for name in classes)


def _draw(
    at_most: tuple[int | None, int | None], seed: int, paths: list[str], labels: Tensor, train_count: int, split: bool
) -> tuple[list[str], Tensor, int]:
    """Draw a part of the listed images, in their order: paths, labels, and the number of training images."""
    train, valid = at_most
    if split and train is not None and valid is not None:
        train += valid
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(len(paths), dtype=torch.bool)
    for most, where in ((train, slice(0, train_count)), (valid, slice(train_count, None))):
        kept[where] = torch.randperm(len(kept[where]), generator=generator) < (len(paths) if most is None else most)
    rows = kept.nonzero().flatten()
    return [paths[row] for row in rows], labels[rows], int(kept[:train_count].sum())


def _images_below(tops: Sequence[Path]) -> dict[Path, list[str]]:
    """Find the images in class folders, at any depth and through links.

    Links may lead in circles and into other classes, so each real folder is read once: first all that can be had without
    links, under their own names. A link to a folder above is not followed.
    """
    images: dict[Path, list[str]] = {top: [] for top in tops}
    taken: set[str] = set()
    queue = [(top, str(top)) for top in sorted(tops, key=os.path.islink)]
    for top, start in queue:  # which grows
        for folder, folders, files in os.walk(start, onerror=_fail):
            real = os.path.realpath(folder)
            if real in taken:
                folders.clear()
                continue
            taken.add(real)
            folders[:] = _visible(folders)
            images[top] += [os.path.join(folder, name) for name in _visible(files) if name.lower().endswith(EXTENSIONS)]
            links = (path for name in folders if os.path.islink(path := os.path.join(folder, name)))
            queue += [(top, link) for link in links if not Path(real).is_relative_to(os.path.realpath(link))]
    return {top: sorted(found, key=lambda path: (path.split(os.sep)[:-1], path)) for top, found in images.items()}


def _fail(error: OSError) -> NoReturn:
    raise error


def _check_counts(labels: Tensor, classes: Sequence[str], minimum: int) -> None:
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True):
        if count < minimum:
            raise UsageError(f"class {name!r} must hold at least {minimum} readable images, got {count}")


def _warn_of_shared(paths: Sequence[str], train: Sequence[int], valid: Sequence[int]) -> None:
    """Warn of validation images that are training images too, by a link of either kind; copies are not looked for."""
    files = {row: (found.st_dev, found.st_ino) for row in (*train, *valid) for found in [os.stat(paths[row])]}
    trained = {files[row]: row for row in train}
    shared = [(row, trained[files[row]]) for row in valid if files[row] in trained]
    if shared:
        here, there = (_shown(paths[row]) for row in shared[0])
        warn(
            f"{len(shared)} of {len(valid)} images to validate on are trained on as well, so that accuracy is too high: "
            f"{here} is the same file as {there}"
        )


def _default_size(paths: Sequence[str]) -> int:
    """Return the shorter side of the first image; if it is above 64, the nearest lower multiple of 32, at most 224."""
    for path in paths:
        try:
            with _open(path) as image:
                side = min(image.size)
        except Exception:  # the reading that follows names the file
            continue
        return max(8, side) if side <= 64 else min(224, side // 32 * 32)
    raise UsageError(f"none of the {len(paths)} training images is readable, such as {_shown(paths[0])}")


def _read(source: _Decoded, cache_bytes: int) -> tuple[Dataset[tuple[Tensor, ...]], Tensor, dict[int, str]]:
    """Decode every file once: the images, their `byte_sums`, and row -> the reason why it failed."""
    count, size = len(source.paths), source.size
    fits = count * 3 * size * size <= cache_bytes
    pixels = torch.zeros((count if fits else 0, 3, size, size), dtype=torch.uint8)
    sums = torch.zeros((count, 2, 3), dtype=torch.float64)
    failures: dict[int, str] = {}
    with tqdm(total=count, desc="reading images", unit="", file=sys.stderr, disable=None, leave=False) as bar:
        for rows in torch.split(torch.arange(count), CHUNK):
            found = dict(zip(rows.tolist(), source.decode(rows.tolist()), strict=True))
            failures |= {row: reason for row, reason in found.items() if isinstance(reason, str)}
            images = {row: image for row, image in found.items() if isinstance(image, Tensor)}
            if images:
                batch = torch.stack(list(images.values()))
                sums[list(images)] = byte_sums(batch)
                if fits:
                    pixels[list(images)] = batch
            bar.update(len(rows))
    return TensorDataset(pixels, source.labels) if fits else source, sums, failures


def _decode(path: str, size: int) -> Tensor | str:
    """Return the image, uint8 `(3, size, size)`, or the reason why it cannot be read."""
    try:
        with _open(path) as image:
            square = ImageOps.fit(_as_rgb(image), (size, size), Image.Resampling.BILINEAR)
            pixels: Tensor = pil_to_tensor(square)
    except OSError as error:
        return " ".join((error.strerror or str(error)).replace(repr(path), "").split())
    except Exception as error:  # decoders raise whatever they like on broken files
        return " ".join(str(error).replace(repr(path), "").split()) or type(error).__name__
    return pixels


def _open(path: str) -> Image.Image:
    if _shown(path) != path:
        raise ValueError("its name is not UTF-8; rename it")
    if not os.path.isfile(path):  # a pipe would be waited for without end
        raise ValueError("no regular file")
    known = Image.registered_extensions().values()  # an older Pillow has no AVIF
    return Image.open(path, formats=[name for name in FORMATS if name in known])


def _as_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":  # Pillow clips 16 and 32 bits to 8 instead of scaling them
        upright = Image.fromarray(_as_bytes(np.asarray(upright), upright.mode))
    return upright.convert("RGB")


def _as_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale an image of 16 bits, or of floats in [0, 1], to bytes.

    Values of 32 bits have no agreed range: they must lie in that of bytes.
    """
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        values = values >> 8
    elif not 0 <= low <= high <= 255:
        raise ValueError(f"its values of 32 bits lie from {low} to {high}, not in [0, 255]; save it with 8 or 16 bits")
    elif mode == "F" and high <= 1:
        values = np.rint(values * 255)
    return values.astype(np.uint8)


def _shown(path: str) -> str:
    """Return a path as text that can be printed and written, whatever bytes it has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _fingerprint(root: Path, paths: Sequence[str]) -> str:
    sizes = (os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths)
    lines = (f"{Path(path).relative_to(root).as_posix()} {size}" for path, size in zip(paths, sizes, strict=True))
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()
