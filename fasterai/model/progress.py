"""Progress of long work in a folder: states of random generators, and the check that a folder is of the same call."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import warn
from fasterai.model.snapshots import sum_of

__all__ = ["UNREADABLE", "check_same_call", "keep_random_state", "put_random_state_", "random_state"]

#: The errors of `torch.load` and of checks for a file that is torn, or is none of ours.
UNREADABLE = (ValueError, TypeError, LookupError, EOFError, RuntimeError, pickle.UnpicklingError)


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


def random_state(what: str, value: Any) -> None:
    """Refuse what is no state that `keep_random_state` returned."""
    if not isinstance(value, Mapping) or set(value) != {"torch", "cuda", "numpy", "python"}:
        raise TypeError(f"{what} must be states of generators, got {type(value).__name__}")


def check_same_call(
    folder: Path, state: Mapping[str, Any], words: Mapping[str, str], start: Mapping[str, Tensor], kept: tuple[str, str]
) -> None:
    """Refuse a folder of a call with other settings or another model; warn of one with other first weights.

    Args:
        folder: The folder.
        state: What it holds: its `settings`, some `weights`, and `start`, the sum of the first weights.
        words: The settings of this call.
        start: The model's tensors at the beginning of this call.
        kept: What the folder keeps, and what goes on with it, in words.

    Raises:
        ValueError: Settings, names or shapes differ.
    """
    before = state["settings"]
    differing = [f"{n} was {before.get(n)} and is {words.get(n)}" for n in {**before, **words} if before.get(n) != words.get(n)]
    shapes = [{name: tuple(x.shape) for name, x in tensors.items()} for tensors in (state["weights"], start)]
    if shapes[0] != shapes[1]:
        name = next(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        differing.append(f"{name} was {shapes[0].get(name, 'missing')} and is {shapes[1].get(name, 'missing')}")
    if differing:
        raise ValueError(f"folder must be of the same call, got {folder}, where {'; '.join(differing)}; pass another folder")
    if state["start"] != sum_of(start):
        warn(f"{folder} holds {kept[0]} with other first weights: {kept[1]} goes on with those")
