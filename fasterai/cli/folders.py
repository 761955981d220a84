"""Folders of images with one sub-folder a class."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from fasterai.cli.data import Data, Held, Images, Part, image_statistics, split_each_class
from fasterai.cli.errors import UsageError

__all__ = ["read_folder"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("valid", "val", "test")
CACHE_BYTES = 2 << 30
CHUNK = 256
SHARE = 0.2


@dataclass(frozen=True)
class _File:
    path: Path
    label: int


@dataclass(frozen=True)
class _Decoded:
    """Images that are decoded whenever they are asked for."""

    files: tuple[_File, ...]
    size: int
    workers: int

    def take(self, rows: Tensor) -> Tensor:
        paths = [self.files[row].path for row in rows.tolist()]
        return torch.stack([_checked(path, found) for path, found in zip(paths, _decode_all(paths, self), strict=True)])


def read_folder(
    root: Path,
    *,
    image_size: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    workers: int = 0,
    cache_bytes: int = CACHE_BYTES,
) -> Data:
    """Read a folder of images, every file once; what is unreadable is found before any training.

    Args:
        root: One sub-folder a class, or train/ and one of valid/, val/, test/ with one sub-folder a class each.
        image_size: The side that all images are cut and resized to; by default after the first image.
        seed: Of the split, if the folder has none.
        skip_unreadable: Leave unreadable files out instead of stopping.
        workers: Threads that decode, none for the caller's own.
        cache_bytes: Images are kept in memory if they fit into it, else decoded whenever they are needed.

    Raises:
        UsageError: The folder has no images, less than two classes, or an unreadable image.
    """
    train_root, valid_root = _find_parts(root)
    classes = _class_folders(train_root)
    train_files = _list_files(train_root, classes)
    valid_files = [] if valid_root is None else _list_validation(valid_root, classes)
    files = tuple(train_files + valid_files)
    size = image_size or _default_size(train_files)
    images, sums, squares, failures = _read(_Decoded(files, size, workers), cache_bytes)
    if failures and not skip_unreadable:
        path, reason = next(iter(failures.items()))
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise UsageError(f"unreadable image {path} ({reason}){more}; pass --skip-unreadable to leave such files out")
    readable = torch.tensor([str(file.path) not in failures for file in files])
    labels = torch.tensor([file.label for file in files])
    is_train = torch.arange(len(files)) < len(train_files)
    _check_counts(labels[is_train & readable], classes, 2 if valid_root is None else 1)
    if valid_root is None:
        rows = torch.nonzero(readable).flatten()
        train, valid = (rows[picks] for picks in split_each_class(labels[rows].tolist(), SHARE, seed))
    else:
        train, valid = (torch.nonzero(readable & side).flatten() for side in (is_train, ~is_train))
        if not len(valid):
            raise UsageError(f"no readable images in {valid_root}")
    mean, std = image_statistics(sums[train], squares[train], size * size)
    return Data(
        Part(images, train, labels[train]),
        Part(images, valid, labels[valid]),
        tuple(classes),
        mean,
        std,
        image_size=size,
        validation="a fifth of each class" if valid_root is None else f"folder {valid_root.name}/",
        skipped=failures,
        fingerprint=_fingerprint(root, files),
    )


def _find_parts(root: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and that of the validation classes if there is one."""
    if not root.exists():
        raise UsageError(f"DATA must be a folder of images, got {root}, which does not exist")
    if not root.is_dir():
        raise UsageError(f"DATA must be a folder of images, got {root}, which is a file")
    train = root / "train"
    if train.is_dir() and _sub_folders(train):  # else it is a class called train
        for name in VALIDATION_NAMES:
            if (root / name).is_dir() and _sub_folders(root / name):
                return train, root / name
        if _sub_folders(root) == ["train"]:
            return train, None
    return root, None


def _sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path) -> list[str]:
    names = _sub_folders(root)
    empty = _empty(root, names)
    if len(empty) == len(names):
        raise UsageError(f"no images in {root}: DATA must hold one sub-folder of images ({', '.join(EXTENSIONS)}) a class")
    _check_filled(root, empty)
    if len(names) < 2:
        raise UsageError(f"DATA must hold at least two classes, got only {names[0]!r} in {root}")
    return names


def _empty(root: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if next(_images_below(root / name), None) is None]


def _check_filled(root: Path, empty: Sequence[str]) -> None:
    if empty:
        raise UsageError(f"no images in {root / empty[0]}: every sub-folder is a class; take it away or fill it")


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(parent) / name


def _list_files(root: Path, classes: Sequence[str]) -> list[_File]:
    return [_File(path, label) for label, name in enumerate(classes) for path in _images_below(root / name)]


def _list_validation(root: Path, classes: Sequence[str]) -> list[_File]:
    strangers = sorted(set(_sub_folders(root)) - set(classes))
    if strangers:
        raise UsageError(f"{root} must hold classes of the training part, got {strangers[0]!r}, which is none of them")
    files = _list_files(root, classes)
    if not files:
        raise UsageError(f"no images in {root}")
    _check_filled(root, _empty(root, _sub_folders(root)))
    return files


def _check_counts(labels: Tensor, classes: Sequence[str], minimum: int) -> None:
    for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True):
        if count < minimum:
            raise UsageError(f"class {name!r} must hold at least {minimum} readable images, got {count}")


def _default_size(files: Sequence[_File]) -> int:
    """The first image's shorter side; above 64 a multiple of 32, at most 224."""
    for file in files:
        try:
            with Image.open(file.path) as image:
                side = min(image.size)
        except Exception:  # the reading that follows names the file
            continue
        return max(8, side) if side <= 64 else min(224, side // 32 * 32)
    raise UsageError(f"none of the {len(files)} training images is readable, such as {files[0].path}")


def _read(source: _Decoded, cache_bytes: int) -> tuple[Images, Tensor, Tensor, dict[str, str]]:
    """Decode every file once: the images, sums and sums of squares per image and channel, and path -> why it failed."""
    files, size = source.files, source.size
    fits = len(files) * 3 * size * size <= cache_bytes
    pixels = torch.zeros((len(files) if fits else 0, 3, size, size), dtype=torch.uint8)
    sums, squares = torch.zeros((2, len(files), 3), dtype=torch.float64)
    failures: dict[str, str] = {}
    with tqdm(total=len(files), desc="reading images", unit="", file=sys.stderr, disable=None, leave=False) as bar:
        for start in range(0, len(files), CHUNK):
            paths = [file.path for file in files[start : start + CHUNK]]
            for row, found in enumerate(_decode_all(paths, source), start):
                if isinstance(found, str):
                    failures[str(files[row].path)] = found
                    continue
                values = found.double()
                sums[row], squares[row] = values.sum((1, 2)), values.square().sum((1, 2))
                if fits:
                    pixels[row] = found
            bar.update(len(paths))
    return Held(pixels) if fits else source, sums, squares, failures


def _decode_all(paths: Sequence[Path], source: _Decoded) -> list[Tensor | str]:
    if not source.workers:
        return [_decode(path, source.size) for path in paths]
    with ThreadPoolExecutor(source.workers) as pool:
        return list(pool.map(lambda path: _decode(path, source.size), paths))


def _decode(path: Path, size: int) -> Tensor | str:
    """The image, uint8 `(3, size, size)`, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(_as_rgb(image), (size, size), Image.Resampling.BILINEAR)
            pixels: NDArray[np.uint8] = np.array(square)
    except Exception as error:  # decoders raise whatever they like on broken files
        return " ".join(str(error).replace(f"{str(path)!r}", "").split()) or type(error).__name__
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _as_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow clips 16 bits to 8 instead of scaling them
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _checked(path: Path, found: Tensor | str) -> Tensor:
    if isinstance(found, str):
        raise UsageError(f"image {path} was readable and is not any more ({found})")
    return found


def _fingerprint(root: Path, files: Sequence[_File]) -> str:
    lines = (f"{file.path.relative_to(root).as_posix()} {file.path.stat().st_size}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
