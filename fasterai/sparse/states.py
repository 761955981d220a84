"""Checks of saved states: what is no state of a sparsifier, or of another model, is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasterai.core.granularities import Granularity
from fasterai.core.saved import (
    Check,
    check_parts,
    counts,
    equal_to,
    finite_tensors,
    flag,
    fraction,
    mapping_of,
    tensor,
    text,
    texts,
    whole,
)
from fasterai.core.types import Target
from fasterai.units.looks import check_looks
from fasterai.units.pool import Pool

__all__ = ["FORMAT", "check_masks", "check_noted", "check_shapes", "check_state"]

FORMAT = 1


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what is no sparsifier's state.

    Raises:
        ValueError: Something is missing or out of range, the format is another, or earlier weights are of other shapes.
        TypeError: A part is of the wrong type.
    """
    later = {
        "trained": texts,
        "finished": flag,
        "moves": whole,
        "regrown": flag,
        "settings": mapping_of(text),
        "looks": check_looks,
    }
    check_parts(state, "Sparsifier", PARTS, later)
    for part in ("initial", "previous"):
        check_shapes(f"state's {part} weights", state[part], state["shapes"])


def check_shapes(what: str, weights: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
    """Refuse weights of some targets that are of other shapes, and, unless there are none at all, those that lack a target.

    Raises:
        ValueError: They are; one is named.
    """
    for name, weight in weights.items():
        if list(weight.shape) != list(shapes.get(name, [None])):
            raise ValueError(f"{what} must be of its targets' shapes, got {tuple(weight.shape)} for {name}")
    if missing := [name for name in shapes if name not in weights] if weights else []:
        raise ValueError(f"{what} must be those of all targets or of none, got them without {missing[0]}")


def _asked(what: str, value: Any) -> None:
    for entry in value if isinstance(value, list | tuple) else [None]:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            raise TypeError(f"{what} must be a list of names and numbers, got {value!r}")


PARTS: Mapping[str, Check] = {
    "format": equal_to(FORMAT),
    "granularity": text,
    "shapes": mapping_of(counts),
    "keep": mapping_of(tensor),
    "noted": finite_tensors,
    "initial": finite_tensors,
    "previous": finite_tensors,
    "asked": _asked,
    "share": fraction,
}


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


def check_noted(noted: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """Refuse values of biases and norms that are of other shapes than these; what is no such vector here is left alone.

    Raises:
        ValueError: They are; one is named.
    """
    for name, values in noted.items():
        if name in vectors and values.shape != vectors[name].shape:
            wanted = tuple(vectors[name].shape)
            raise ValueError(f"state's noted must be of shape {wanted} for {name}, got {tuple(values.shape)}")
