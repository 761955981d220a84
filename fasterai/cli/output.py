"""Run folder: the files that a command writes, and reads to resume."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from fasterai.cli.errors import UsageError
from fasterai.core.files import PART, write_file, write_saved, write_tensors
from fasterai.sparse.sparsifier import Sparsifier

__all__ = [
    "SMALL",
    "check_free",
    "check_new_folder",
    "file_of",
    "holds_run",
    "load_checkpoint",
    "load_report",
    "new_folder",
    "prepare_folder",
    "remove_checkpoint",
    "remove_parts",
    "told_unreadable",
    "save_checkpoint",
    "save_masks",
    "save_weights",
    "write_atomically",
    "write_report",
]

SMALL = "small"
CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
CHECKPOINT_KEYS = ("done", "stage", "state")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that an interruption leaves the old or the new one, never a part.

    Raises:
        UsageError: It cannot be written: the disk is full, the folder is gone or read-only.
    """
    with _told(path):
        write_file(path, write)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return UsageError(f"{path} cannot be written ({reason}); see that its folder is there and the disk not full")


def holds_run(folder: Path) -> bool:
    """Tell if a run, complete or not, has written to the folder."""
    return (folder / CHECKPOINT).exists() or (folder / REPORT).exists()


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a network's weights; `name` is `dense`, `sparse` or `small`."""
    return folder / f"{name}.safetensors"


def prepare_folder(folder: Path) -> None:
    """Make the folder if it is missing, and check that it can be written to.

    Raises:
        UsageError: There is a file of that name, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _no_place(folder, error) from error


def _no_place(folder: Path, error: OSError) -> UsageError:
    wanted = "a folder" if isinstance(error, FileExistsError | NotADirectoryError) else "a folder that can be written to"
    return UsageError(f"--output must be {wanted}, got {folder} ({error.strerror})")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds anything, or that cannot be made; none is made yet.

    Raises:
        UsageError: It is one, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output must be a folder, got {folder}, which is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--output must be a new folder, got {folder}, which is not empty; pass another one")
    above = next(place for place in folder.absolute().parents if place.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise _no_place(folder, error) from error


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything but what is left of a file half written.

    Raises:
        UsageError: It does.
    """
    left = set(_parts(folder))
    if any(path not in left for path in folder.iterdir()):
        raise UsageError(f"--output must be a new folder, got {folder}, which is not empty; pass another one")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write to; it gets its final name at a normal end, else it is removed.

    Raises:
        UsageError: It cannot be made or written to.
    """
    prepare_folder(folder.parent)
    with _told(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as place:
        part = Path(place) / "new"
        part.mkdir()
        yield part
        part.replace(folder)


def remove_parts(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for left in _parts(folder):
        with suppress(OSError):
            left.unlink()


def _parts(folder: Path) -> Iterator[Path]:
    return folder.glob(f".*.????????{PART}")


def save_checkpoint(content: Mapping[str, Any], folder: Path) -> None:
    """Write the state that resuming a run needs."""
    with _told(folder / CHECKPOINT):
        write_saved(folder / CHECKPOINT, dict(content))


@contextmanager
def told_unreadable(path: Path) -> Iterator[None]:
    """Tell in one line of a file that can be read, and holds something else than this program writes."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # what is not as expected can fail in any way
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    said = " ".join(str(error).split())[:80]
    return UsageError(f"cannot read {path} ({type(error).__name__}{f': {said}' if said else ''}); delete it to start again")


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state that an interrupted run left, on the CPU; None if there is none."""
    return _load(folder / CHECKPOINT, lambda path: torch.load(path, map_location="cpu", weights_only=True), *CHECKPOINT_KEYS)


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def save_weights(network: nn.Module, path: Path, classes: Sequence[str]) -> None:
    """Write the weights; the file's metadata names the classes in the order of the outputs."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    metadata = {"format": "pt", "classes": json.dumps(list(classes))}
    with _told(path):
        write_tensors(path, tensors, metadata)


def save_masks(sparsifier: Sparsifier, folder: Path) -> None:
    """Write the sparsifier's state."""
    with _told(folder / "sparsifier.pt"):
        write_saved(folder / "sparsifier.pt", sparsifier.state_dict())


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / REPORT, lambda file: file.write(f"{text}\n".encode()))


def load_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a complete run; None if there is none."""
    return _load(folder / REPORT, lambda path: json.loads(path.read_text(encoding="utf-8")), "command")


def _load(path: Path, read: Callable[[Path], dict[str, Any]], *keys: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = read(path)
    except Exception as error:  # a broken file can fail in any of zip, pickle, torch and json
        raise UsageError(f"cannot read {path} ({type(error).__name__}); delete it to start again") from error
    with told_unreadable(path):
        if not isinstance(found, dict) or not isinstance(found["arguments"], dict) or not set(keys) <= set(found):
            raise TypeError(f"it must hold {', '.join(('arguments', *keys))}")
    return found
