"""Checks of saved states: what is no state of a sparsifier, or of another model, is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fasterai.core.granularities import Granularity
from fasterai.core.types import Target
from fasterai.units.pool import Pool

__all__ = ["FORMAT", "check_masks", "check_state"]

FORMAT = 1


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what is no sparsifier's state.

    Raises:
        ValueError: Something is missing, the format is another, or earlier weights are of other shapes.
    """
    own = ("format", "granularity", "shapes", "keep", "noted", "initial", "previous", "asked", "share")
    missing = [key for key in own if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"state must be what Sparsifier.state_dict() returned, got one without {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise ValueError(f"state's format must be {FORMAT}, got {state['format']!r}")
    for part in ("initial", "previous"):
        for name, weight in state[part].items():
            if list(weight.shape) != state["shapes"].get(name):
                raise ValueError(f"state's {part} weights must be of its targets' shapes, got {tuple(weight.shape)} for {name}")


def check_masks(state: Mapping[str, Any], granularity: Granularity, targets: Sequence[Target], pools: Sequence[Pool]) -> None:
    """Refuse a state of another granularity, of other targets, or with decisions of other units.

    Raises:
        ValueError: It is one; what differs is named.
    """
    if state["granularity"] != repr(granularity):
        raise ValueError(f"state must be of granularity {granularity!r}, got {state['granularity']!r}")
    own, theirs = {t.name: list(t.parameter.shape) for t in targets}, state["shapes"]
    differences = [f"{n} is missing" for n in own if n not in theirs]
    differences += [f"{n} is not a target here" for n in theirs if n not in own]
    differences += [f"{n} is {tuple(theirs[n])}, here {tuple(own[n])}" for n in own if list(theirs.get(n, own[n])) != own[n]]
    if differences:
        raise ValueError(f"state must be of the same model and targets, got one where {'; '.join(differences[:5])}")
    units = {p.name: p.shape for p in pools}
    for name, keep in state["keep"].items():
        if keep.dtype is not torch.bool or tuple(keep.shape) != units.get(name):
            wanted = f"bool of shape {units[name]}" if name in units else f"of {', '.join(units)}"
            raise ValueError(f"state's keep must be {wanted}, got {name}: {keep.dtype} of shape {tuple(keep.shape)}")
