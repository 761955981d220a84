"""Sizes of a study: how much one run of it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fasterai.core.checks import check_count
from fasterai.display import Brief

__all__ = ["HALF", "SIZES", "Size"]


@dataclass(frozen=True, repr=False)
class Size(Brief):
    """Amount that is trained in one run of a study.

    Attributes:
        name: `tiny`, `small` or `full`.
        images: Training images at most; None for all.
        test_images: Images that the accuracy is measured on, at most; None for all.
        side: Their side in pixels; None for that of the files.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        lr: The highest learning rate.
        device: Where the network is, as torch names it.
    """

    name: str
    images: int | None
    test_images: int | None
    side: int | None
    epochs: int
    batch_size: int = 64
    lr: float = 0.1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("images", "test_images", "side"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size, 2)
        if not (isinstance(self.lr, int | float) and math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be above 0, got {self.lr!r}")


#: `tiny` shows that a study runs; `small` takes two CPU cores under half an hour; `full` is for an accelerator.
SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size("tiny", 160, 80, 8, epochs=1, batch_size=32),
        "small": Size("small", 6_000, 2_000, 16, epochs=4),
        "full": Size("full", None, None, 32, epochs=30, batch_size=128),
    }
)
#: For studies of many settings: `small` has half the steps.
HALF: Mapping[str, Size] = MappingProxyType({**SIZES, "small": replace(SIZES["small"], images=4_000, epochs=3)})
