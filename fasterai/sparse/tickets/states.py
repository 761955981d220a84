"""Progress of a search for a ticket, kept after each round."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import warn
from fasterai.core.files import write_saved
from fasterai.core.saved import check_parts, equal_to, mapping_of, tensor, text
from fasterai.model.snapshots import sum_of
from fasterai.sparse.states import check_state

__all__ = ["Progress", "keep_random_state", "put_random_state_", "read_progress", "write_progress"]

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


def keep_random_state() -> dict[str, Any]:
    """Return the states of the global generators of torch, numpy and Python, as plain data."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }


def put_random_state_(state: Mapping[str, Any]) -> None:
    """Set the global generators to states that `keep_random_state` returned; an empty one changes nothing."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))


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
    except (ValueError, TypeError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"folder must hold what find_ticket has written, got {path}, which is none: {error}") from error
    _check_same(folder, state, words, start)
    return Progress(state["weights"], state["masks"], tuple(state["results"]), state["random"])


def _check(state: Any) -> None:
    parts = {"format": equal_to(ROUNDS_FORMAT), "settings": mapping_of(text), "start": text, "weights": mapping_of(tensor)}
    check_parts(state, "find_ticket", {**parts, "masks": _masks, "results": _results, "random": _random})


def _masks(what: str, value: Any) -> None:
    check_state(value)


def _results(what: str, value: Any) -> None:
    if not isinstance(value, list) or not all(one is None or isinstance(one, float) for one in value):
        raise TypeError(f"{what} must be a list of numbers, got {value!r}")


def _random(what: str, value: Any) -> None:
    if not isinstance(value, Mapping) or set(value) != {"torch", "cuda", "numpy", "python"}:
        raise TypeError(f"{what} must be states of generators, got {type(value).__name__}")


def _check_same(folder: Path, state: Mapping[str, Any], words: Mapping[str, str], start: Mapping[str, Tensor]) -> None:
    before = state["settings"]
    differing = [f"{n} was {before.get(n)} and is {words.get(n)}" for n in {**before, **words} if before.get(n) != words.get(n)]
    shapes = [{name: tuple(x.shape) for name, x in tensors.items()} for tensors in (state["weights"], start)]
    if shapes[0] != shapes[1]:
        name = next(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        differing.append(f"{name} was {shapes[0].get(name, 'missing')} and is {shapes[1].get(name, 'missing')}")
    if differing:
        raise ValueError(f"folder must be of the same call, got {folder}, where {'; '.join(differing)}; pass another folder")
    if state["start"] != sum_of(start):
        warn(f"{folder} holds rounds of a model with other first weights: the search goes on with those, not with the model's")
