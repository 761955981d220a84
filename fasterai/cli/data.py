"""L8. Labelled images, read into tensors for training, from any source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.transforms.v2.functional import normalize

__all__ = ["Data", "Part", "byte_sums", "digits", "image_statistics", "split_each_class"]

#: Part of a data set that a list of numbers picks a batch of: images, uint8 `(B, C, N, N)`, and classes, int64 `(B,)`.
Part = Subset[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Data:
    """Data set, ready for training.

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

    def batches(self, part: Part, picks: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Give normalised images and their classes; each tensor of row numbers makes one batch."""
        for numbers in picks:
            pixels, labels = part[numbers.tolist()]
            # not `to_dtype`, which multiplies by 1/255: one bit else, and a resumed run would not be the same
            images = normalize(pixels.to(device).float() / 255, list(self.mean), list(self.std))
            yield images, labels.to(device)

    def examples(self, count: int, device: torch.device) -> Tensor:
        """Return the first training images, normalised; they repeat if there are too few."""
        return next(self.batches(self.train, [torch.arange(count) % len(self.train)], device))[0]

    def summary(self) -> dict[str, object]:
        """Return plain data for the report."""
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


def split_each_class(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows into training and validation, with the same share of every class and at least one image on both sides.

    Args:
        labels: The class of each row, int64 `(n,)`; every class has two rows at least.
        share: Share of each class for validation, in (0, 1).
        seed: Of the choice.

    Returns:
        Two int64 tensors, in rising order.
    """
    generator = torch.Generator().manual_seed(seed)
    is_valid = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        rows = torch.nonzero(labels == label).flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        is_valid[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return torch.nonzero(~is_valid).flatten(), torch.nonzero(is_valid).flatten()


def byte_sums(pixels: Tensor) -> Tensor:
    """Return the sum of the bytes and of their squares, for each image and channel, float64 `(B, 2, C)`; the sums are exact."""
    values = pixels.flatten(2).double()
    return torch.stack([values.sum(2), values.square().sum(2)], 1)


def image_statistics(sums: Tensor, pixel_count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, of values in [0, 1].

    Args:
        sums: The images' `byte_sums`, float64 `(n, 2, C)`.
        pixel_count: Pixels in an image.
    """
    mean, square = sums.sum(0) / (len(sums) * pixel_count)
    std = (square - mean.square()).clamp(min=1.0).sqrt()  # a constant channel must not divide by zero
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def digits(seed: int) -> Data:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth of each class is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (torch.as_tensor(found.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    labels = torch.as_tensor(found.target)
    train, valid = split_each_class(labels, 0.2, seed)
    images, classes = TensorDataset(pixels, labels), tuple(str(name) for name in found.target_names)
    parts = Subset(images, train.tolist()), Subset(images, valid.tolist())
    mean, std = image_statistics(byte_sums(pixels[train]), 64)
    return Data(*parts, classes, mean, std, image_size=8, validation="a fifth of each class")
