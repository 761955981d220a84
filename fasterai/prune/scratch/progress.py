"""Progress of the learning of gates, kept in a folder after each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasterai.core.checks import check_number
from fasterai.core.files import write_saved
from fasterai.core.saved import check_parts, equal_to, finite_tensors, list_of, mapping_of, tensor, text, whole
from fasterai.display import Brief
from fasterai.model.progress import UNREADABLE, check_same_call, keep_random_state, put_random_state_, random_state
from fasterai.model.snapshots import sum_of

__all__ = ["TENSORS", "Progress", "read_progress", "write_progress"]

#: The gates, the sums of them over the steps, and Adam's state.
TENSORS = ("gates", "sums", "step", "exp_avg", "exp_avg_sq")
NAME, GATES_FORMAT = "gates.pt", "fasterai-gates-1"


@dataclass(frozen=True, repr=False)
class Progress(Brief):
    """Progress after some epochs.

    Attributes:
        tensors: Those of `TENSORS`.
        losses: The mean loss of the task in each epoch.
        means: The mean of the gates after each epoch.
        steps: The number of steps taken.
        weights: The network's tensors; its buffers have changed.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    steps: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def write_progress(folder: Path, words: Mapping[str, str], start: Mapping[str, Tensor], progress: Progress) -> None:
    """Write the progress and the random generators' states into a folder, whole or not at all."""
    own = {"format": GATES_FORMAT, "settings": dict(words), "start": sum_of(start), "random": keep_random_state()}
    figures = {"losses": list(progress.losses), "means": list(progress.means), "steps": progress.steps}
    write_saved(folder / NAME, {**own, **figures, "tensors": dict(progress.tensors), "weights": dict(progress.weights)})


def read_progress(folder: Path | None, words: Mapping[str, str], start: Mapping[str, Tensor]) -> Progress:
    """Return the progress that a folder holds, and put the random generators to where they were then.

    Args:
        folder: The folder, which is made if it is not there; None for none.
        words: The settings of this call.
        start: The network's tensors at the beginning of this call.

    Raises:
        ValueError: The folder is of a call with other settings or another network, or its file is none of these.
    """
    if folder is None:
        return Progress()
    folder.mkdir(parents=True, exist_ok=True)
    if not (path := folder / NAME).exists():
        return Progress()
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        parts = {"format": equal_to(GATES_FORMAT), "settings": mapping_of(text), "start": text, "random": random_state}
        figures = {"losses": list_of(_number), "means": list_of(_number), "steps": whole, "tensors": _tensors}
        check_parts(state, "search_from_scratch", {**parts, **figures, "weights": mapping_of(tensor)})
    except UNREADABLE as error:
        raise ValueError(f"folder must hold what search_from_scratch wrote, got {path}, which is none: {error}") from error
    check_same_call(folder, state, words, start, ("gates of a network", "the search"))
    put_random_state_(state["random"])
    return Progress(state["tensors"], tuple(state["losses"]), tuple(state["means"]), state["steps"], state["weights"])


def _number(what: str, value: Any) -> None:
    check_number(what, value)


def _tensors(what: str, value: Any) -> None:
    finite_tensors(what, value)
    if set(value) != set(TENSORS):
        raise ValueError(f"{what} must be {', '.join(TENSORS)}, got {', '.join(value)}")
