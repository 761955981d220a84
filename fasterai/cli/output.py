"""L6. The run folder and what is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasterai.cli.errors import UsageError
from fasterai.sparse.sparsifier import Sparsifier

__all__ = [
    "epoch_line",
    "holds_run",
    "load_checkpoint",
    "load_report",
    "prepare_folder",
    "remove_checkpoint",
    "result_table",
    "save_checkpoint",
    "save_masks",
    "save_weights",
    "write_atomically",
    "write_report",
]

CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that an interruption leaves the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def holds_run(folder: Path) -> bool:
    """Whether a run, complete or not, has written there."""
    return (folder / CHECKPOINT).exists() or (folder / REPORT).exists()


def prepare_folder(folder: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        UsageError: There is a file of that name, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output must be a folder, got {folder} ({error.strerror})") from error


def save_checkpoint(content: Mapping[str, Any], folder: Path) -> None:
    """Write what a run needs to go on."""
    write_atomically(folder / CHECKPOINT, lambda path: torch.save(dict(content), path))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What an interrupted run left, on the CPU; None if there is nothing."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any of zip, pickle and torch
        raise UsageError(f"cannot read {path} ({type(error).__name__}); take it away to begin anew") from error
    return found


def remove_checkpoint(folder: Path) -> None:
    """Take the checkpoint away."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def save_weights(network: nn.Module, path: Path, classes: Sequence[str]) -> None:
    """Write the weights; the file's metadata names the classes in the order of the outputs."""
    from safetensors.torch import save

    tensors = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    metadata = {"format": "pt", "classes": json.dumps(list(classes))}
    content = save(tensors, metadata)
    write_atomically(path, lambda part: part.write_bytes(content))


def save_masks(sparsifier: Sparsifier, folder: Path) -> None:
    """Write the sparsifier's state."""
    write_atomically(folder / "sparsifier.pt", lambda path: torch.save(sparsifier.state_dict(), path))


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / REPORT, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load_report(folder: Path) -> dict[str, Any] | None:
    """The report of a complete run, None if there is none."""
    path = folder / REPORT
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"cannot read {path} ({error}); take it away to begin anew") from error
    return found


def epoch_line(stage: str, epoch: Mapping[str, float], epochs: int, seconds: float) -> str:
    """One epoch in one line."""
    line = f"{stage:6}  epoch {epoch['epoch']:>{len(str(epochs))}}/{epochs}  loss {epoch['loss']:.4f}"
    return f"{line}  accuracy {epoch['accuracy']:7.2%}  sparsity {epoch['sparsity']:6.1%}  {seconds:7.1f} s"


def result_table(report: Mapping[str, Any]) -> str:
    """Dense and sparse side by side: accuracy, zeros per layer and overall, time."""
    results = report["results"]
    stages = list(results)
    rows = [["", "weights", *(f"{stage} zeros" for stage in stages)]]
    for layer in report["layers"]:
        zeros = [_share(layer["zeros"][stage], layer["weights"]) for stage in stages]
        rows.append([layer["name"], f"{layer['weights']:,}", *zeros])
    targets = [sum(layer["zeros"][stage] for layer in report["layers"]) for stage in stages]
    size = sum(layer["weights"] for layer in report["layers"])
    rows.append(["all of these", f"{size:,}", *(_share(zeros, size) for zeros in targets)])
    weights = next(iter(results.values()))["weights"]
    whole = [_share(results[stage]["zeros"], weights) for stage in stages]
    rows.append(["whole network", f"{weights:,}", *whole])
    rows.append(["", "", *stages])
    rows.append(["accuracy", "", *(f"{results[stage]['accuracy']:.2%}" for stage in stages)])
    rows.append(["time", "", *(f"{results[stage]['seconds']:.1f} s" for stage in stages)])
    return _table(rows, rules=(1, len(rows) - 5, len(rows) - 3, len(rows) - 2))


def _share(zeros: int, weights: int) -> str:
    return f"{zeros:,}  {zeros / max(1, weights):7.2%}"


def _table(rows: Sequence[Sequence[str]], rules: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        if i in rules:
            lines.append("-" * (sum(widths) + 3 * (len(widths) - 1)))
        cells = (cell.ljust(w) if j == 0 else cell.rjust(w) for j, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)
