"""Labelled images: what the training reads, whatever they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Data", "Held", "Images", "Part", "digits", "image_statistics", "split_each_class"]


class Images(Protocol):
    """Images by number."""

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows, uint8 `(B, C, N, N)`."""
        ...


@dataclass(frozen=True)
class Held:
    """Images in memory, uint8 `(rows, C, N, N)`."""

    pixels: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows."""
        return self.pixels[rows]


@dataclass(frozen=True)
class Part:
    """The training or the validation part.

    Attributes:
        images: All images.
        rows: Which of them belong to this part, int64 `(n,)`.
        labels: Their classes, int64 `(n,)`.
    """

    images: Images
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of some of the part: picks from 0 to its length."""
        return self.images.take(self.rows[picks]), self.labels[picks]


@dataclass(frozen=True)
class Data:
    """A data set, ready for training.

    Attributes:
        train: The training part.
        valid: The part that accuracy is measured on.
        classes: The classes' names, in the order of the labels.
        mean: Per channel over the training part, of values in [0, 1].
        std: The same.
        image_size: The side of the square images.
        validation: Where the validation part comes from, in words.
        skipped: Path -> reason, for images that were left out.
        fingerprint: Two data sets of the same files and sizes have the same.
    """

    train: Part
    valid: Part
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    validation: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def normalize(self, pixels: Tensor) -> Tensor:
        """Bytes to floats of mean 0 and deviation 1 over the training part."""
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(x, device=pixels.device).view(shape) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def summary(self) -> dict[str, object]:
        """Plain data for the report."""
        return {
            "classes": list(self.classes),
            "training_images": len(self.train),
            "validation_images": len(self.valid),
            "validation": self.validation,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped.items()],
        }


def split_each_class(labels: Sequence[int], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and for validation: the same share of every class, at least one image on both sides.

    Args:
        labels: The class of each row; every class has two rows at least.
        share: How much of each class goes to validation, in (0, 1).
        seed: Of the choice.

    Returns:
        Two int64 tensors, in rising order.
    """
    all_labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    train, valid = [], []
    for label in torch.unique(all_labels):
        rows = torch.nonzero(all_labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        valid.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train).sort().values, torch.cat(valid).sort().values


def image_statistics(sums: Tensor, squares: Tensor, pixel_count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, of values in [0, 1].

    Args:
        sums: Sum of the bytes of each image and channel, float64 `(n, C)`.
        squares: Sum of their squares, the same shape.
        pixel_count: Pixels in an image.
    """
    total = sums.shape[0] * pixel_count
    mean = sums.sum(0) / total
    variance = (squares.sum(0) / total - mean.square()).clamp(min=1.0)  # a constant channel must not divide by zero
    return tuple((mean / 255).tolist()), tuple((variance.sqrt() / 255).tolist())


def digits(seed: int) -> Data:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles; a fifth of each class for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (torch.as_tensor(found.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    labels = torch.as_tensor(found.target)
    train, valid = split_each_class(labels.tolist(), 0.2, seed)
    values = pixels[train].double()
    mean, std = image_statistics(values.sum((2, 3)), values.square().sum((2, 3)), 64)
    held = Held(pixels)
    return Data(
        Part(held, train, labels[train]),
        Part(held, valid, labels[valid]),
        tuple(str(name) for name in found.target_names),
        mean,
        std,
        image_size=8,
        validation="a fifth of each class",
    )
