"""Images of a study as tensors in memory: a folder of images, or scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fasterai.cli.data import Data as Parts
from fasterai.cli.data import Part, digits
from fasterai.cli.errors import UsageError
from fasterai.cli.folders import read_folder
from fasterai.display import Brief
from fasterai.study.sizes import Size

__all__ = ["Data", "load_data"]


@dataclass(frozen=True, repr=False, eq=False)
class Data(Brief):
    """Normalised images and their classes.

    Attributes:
        train: Images `(N, C, S, S)` and classes `(N,)` to train on.
        test: The same, to measure on.
        classes: The classes' names.
        flip: True if a mirrored image is of the same class.
        name: What it is, in a few words.
        fingerprint: Equal for equal files, of equal numbers.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    flip: bool
    name: str
    fingerprint: str

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train[0].shape[1]

    @property
    def side(self) -> int:
        """Side of the square images."""
        return self.train[0].shape[2]

    def to(self, device: str) -> Data:
        """Return the same data on a device."""
        train, test = ((images.to(device), labels.to(device)) for images, labels in (self.train, self.test))
        return replace(self, train=(train[0], train[1]), test=(test[0], test[1]))


def load_data(folder: Path | None, size: Size) -> Data:
    """Read as many images as a size asks for, the same ones each time.

    Args:
        folder: One sub-folder a class, or train/ and one of valid/, val/, test/; None for scikit-learn's digits of 8x8 pixels.
        size: How many images, and of which side.

    Raises:
        ValueError: It is no folder of images, or one of them is unreadable.
    """
    if folder is None:
        return _tensors(digits(0), size, flip=False, name="digits", fingerprint="digits")
    try:
        found = read_folder(folder, image_size=size.side, at_most=(size.images, size.test_images))
    except UsageError as error:
        raise ValueError(str(error).replace("DATA must", "data must").split("; pass --skip")[0]) from error
    return _tensors(found, size, flip=True, name=folder.resolve().name, fingerprint=found.fingerprint)


def _tensors(parts: Parts, size: Size, *, flip: bool, name: str, fingerprint: str) -> Data:
    train, test = _tensor(parts, parts.train, size.images), _tensor(parts, parts.valid, size.test_images)
    what = f"{name} ({len(train[1]):,} + {len(test[1]):,} images of {parts.image_size}x{parts.image_size})"
    return Data(train, test, parts.classes, flip, what, fingerprint).to(size.device)


def _tensor(parts: Parts, part: Part, most: int | None) -> tuple[Tensor, Tensor]:
    count = len(part) if most is None else min(most, len(part))
    rows = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
    images, labels = next(parts.batches(part, [rows], torch.device("cpu")))
    return images.contiguous(memory_format=torch.channels_last), labels
