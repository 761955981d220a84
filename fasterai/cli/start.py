"""Trained weights that a run starts from: those of a file, or torchvision's own."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.cli.errors import UsageError
from fasterai.cli.networks import make_classifier
from fasterai.cli.runs import origin_of
from fasterai.cli.weights import Fitted, Weights, fit_weights, load_tensors, read_weights

__all__ = ["DEFAULT", "Start", "make_started", "read_start"]

#: The word for torchvision's own weights; a file of that name is ./DEFAULT.
DEFAULT = "DEFAULT"
ARGUMENT = "--weights"
#: Seconds without a byte after which a download is given up.
PATIENCE = 30
#: Networks that turn their inputs from ImageNet's mean and deviation to these by themselves, with torchvision's own weights.
HALVES = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Start:
    """Trained weights, before they are fitted to a network.

    Attributes:
        name: The file's path, or torchvision's name of the weights.
        weights: The tensors.
        mean: Per channel, that the images were normalised by which they were trained on; None if that is not known.
        std: The same.
    """

    name: str
    weights: Weights
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of all that a run takes over from the weights."""
        found = hashlib.sha256(repr((self.mean, self.std)).encode())
        for name, x in sorted(self.weights.tensors.items()):
            found.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def fit(self, arch: str, classes: tuple[str, ...], image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Choose the tensors for a network of so many classes.

        Returns:
            The tensors by name, without a head of another number of classes, and plain data for the report.

        Raises:
            UsageError: They are of another network.
        """
        fitted = fit_weights(arch, self.weights, image_size)
        fresh = fitted.heads if fitted.classes != len(classes) else ()
        tensors = {name: x for name, x in fitted.tensors.items() if name not in fresh}
        report = {
            "weights": self.name,
            "normalised_as_before": self.mean is not None,
            "left_as_initialised": list(fresh),
            "left_out": list(fitted.left_out),
            "notes": self._notes(fitted, fresh, classes),
        }
        return tensors, report

    def _notes(self, fitted: Fitted, fresh: tuple[str, ...], classes: tuple[str, ...]) -> list[str]:
        notes = [f"starts from {self.name}"]
        if fresh:
            notes.append(
                f"left as initialised: {', '.join(fresh)} ({fitted.classes:,} classes in {ARGUMENT}, {len(classes):,} in DATA)"
            )
        elif self.weights.classes not in (None, classes):
            pairs = zip(self.weights.classes or (), classes, strict=True)
            before, now = next(pair for pair in pairs if pair[0] != pair[1])
            notes.append(f"classes of other names: {before!r} in {ARGUMENT} is {now!r} in DATA; its output is kept")
        if fitted.left_out:
            notes.append(f"left out of {ARGUMENT}: {', '.join(sorted({name.split('.')[0] for name in fitted.left_out}))}")
        if self.mean is not None:
            notes.append(f"images are normalised as {ARGUMENT} were trained")
        return notes


def make_started(arch: str, class_count: int, image_size: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a network of torchvision, and load tensors into it; the others stay random."""
    network = make_classifier(arch, class_count, image_size)
    load_tensors(network, tensors)
    return network


def read_start(weights: Path | str | None, arch: str) -> Start | None:
    """Read the weights to start from: of a file, or torchvision's for `DEFAULT`; None for random ones.

    Raises:
        UsageError: There are no such weights.
    """
    if weights is None:
        return None
    if weights == DEFAULT:
        return _torchvision(arch)
    path = Path(weights)
    if not path.exists() and path.name.lower() == DEFAULT.lower():
        raise UsageError(f"{ARGUMENT} must be a file or {DEFAULT}, got {path}")
    origin = origin_of(path)
    found = read_weights(path, ARGUMENT)
    normalised = () if origin is None else (origin.mean, origin.std)
    return Start(str(path.resolve()), found, *normalised)


def _torchvision(arch: str) -> Start:
    import torchvision

    found = list(torchvision.models.get_model_weights(arch))
    if not found:
        raise UsageError(f"{ARGUMENT} must be a file for --arch {arch}, for which torchvision has no weights, got {DEFAULT}")
    entry = torchvision.models.get_model_weights(arch).DEFAULT
    with _told_of_download(entry.url):
        tensors = torchvision.models.get_model(arch, weights=entry).state_dict()
    preset = entry.transforms()
    mean, std = ((0.5,) * 3, (0.5,) * 3) if arch in HALVES else (tuple(preset.mean), tuple(preset.std))
    return Start(str(entry), Weights(Path(str(entry)), tensors, argument=ARGUMENT), mean, std)


@contextmanager
def _told_of_download(url: str) -> Iterator[None]:
    """Tell in one line of a download that fails, and of a file of an earlier one that cannot be read."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)
    was_there, before = place.exists(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    except Exception as error:  # of the network, the disk, the hash, and of torch.load
        said = f"{type(error).__name__}: {' '.join(str(getattr(error, 'reason', error)).split())[:120]}"
        if was_there:
            raise UsageError(f"cannot read {place} ({said}); delete it to download it again") from error
        raise UsageError(
            f"{ARGUMENT} {DEFAULT} cannot be downloaded ({said}); pass a file instead, or put {url} into {place.parent}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
