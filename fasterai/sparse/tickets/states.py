"""Progress of a search for a ticket, kept after each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasterai.core.files import write_saved
from fasterai.core.saved import check_parts, equal_to, mapping_of, tensor, text
from fasterai.model.progress import UNREADABLE, check_same_call, random_state
from fasterai.model.snapshots import sum_of
from fasterai.sparse.states import check_state

__all__ = ["Progress", "read_progress", "write_progress"]

NAME, ROUNDS_FORMAT = "rounds.pt", "fasterai-rounds-1"


@dataclass(frozen=True)
class Progress:
    """Progress of a search after some rounds.

    Attributes:
        weights: The tensors of the moment that is gone back to; empty before the first round.
        masks: The sparsifier's state.
        results: What `train` has returned in each round; None for what is no number.
        random: The states of the random generators.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[float | None, ...] = ()
    random: Mapping[str, Any] = field(default_factory=dict)


def write_progress(folder: Path, words: Mapping[str, str], start: Mapping[str, Tensor], progress: Progress) -> None:
    """Write the progress into its folder, whole or not at all."""
    content = {name: getattr(progress, name) for name in ("weights", "masks", "results", "random")}
    own = {"format": ROUNDS_FORMAT, "settings": dict(words), "start": sum_of(start), "results": list(progress.results)}
    write_saved(folder / NAME, {**content, **own})


def read_progress(folder: Path | None, words: Mapping[str, str], start: Mapping[str, Tensor]) -> Progress:
    """Return the progress that a folder holds; nothing done if it holds none.

    Args:
        folder: The folder, which is made if it is not there; None for none.
        words: The settings of this call.
        start: The model's tensors at the beginning of this call.

    Raises:
        ValueError: The folder is of a call with other settings or another model, or its file is none of these.
    """
    if folder is None:
        return Progress()
    folder.mkdir(parents=True, exist_ok=True)
    if not (path := folder / NAME).exists():
        return Progress()
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        _check(state)
    except UNREADABLE as error:
        raise ValueError(f"folder must hold what find_ticket has written, got {path}, which is none: {error}") from error
    check_same_call(folder, state, words, start, ("rounds of a model", "the search"))
    return Progress(state["weights"], state["masks"], tuple(state["results"]), state["random"])


def _check(state: Any) -> None:
    parts = {"format": equal_to(ROUNDS_FORMAT), "settings": mapping_of(text), "start": text, "weights": mapping_of(tensor)}
    check_parts(state, "find_ticket", {**parts, "masks": _masks, "results": _results, "random": random_state})


def _masks(what: str, value: Any) -> None:
    check_state(value)


def _results(what: str, value: Any) -> None:
    if not isinstance(value, list) or not all(one is None or isinstance(one, float) for one in value):
        raise TypeError(f"{what} must be a list of numbers, got {value!r}")
