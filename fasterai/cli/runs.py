"""Settings of the run that a file of weights comes from, read from the report beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasterai.cli.output import REPORT, load_report, told_unreadable

__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """Settings that a network was trained with.

    Attributes:
        image_size: The side of the images.
        mean: Per channel, that images were normalised by.
        std: The same.
        classes: The classes' names, in the order of the outputs.
        seed: Of the split of the data.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    seed: int


def origin_of(weights: Path) -> Origin | None:
    """Return the settings of the run that wrote a file of weights; None if there is no report of one beside it.

    Raises:
        UsageError: The report beside it is not readable.
    """
    if weights.suffix != ".safetensors":
        return None
    report = load_report(weights.parent)
    if report is None or report["command"] != "sparsify":
        return None
    with told_unreadable(weights.parent / REPORT):
        return _read(report["data"], report["arguments"])


def _read(data: Mapping[str, Any], arguments: Mapping[str, Any]) -> Origin:
    mean, std = (tuple(map(float, data[name])) for name in ("mean", "std"))
    classes = tuple(map(str, data["classes"]))
    size, seed = data["image_size"], arguments["seed"]
    if not (isinstance(size, int) and size > 0 and isinstance(seed, int) and len(mean) == len(std) and min(std) > 0):
        raise ValueError(f"image_size, mean, std and seed must be numbers, got {size!r}, {mean}, {std}, {seed!r}")
    return Origin(size, mean, std, classes, seed)
