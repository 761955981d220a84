"""Features as users name them: by index, by name, or by flags for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fasterai.core.checks import unknown

__all__ = ["read_features", "read_names"]


def read_names(names: Iterable[str] | None, size: int) -> tuple[str, ...] | None:
    """Return the names of features, or refuse them.

    Raises:
        TypeError: They are no list of texts.
        ValueError: They are fewer or more than the features, or one is there twice.
    """
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got {names!r}")
    found = tuple(map(str, names))
    if len(found) != size:
        raise ValueError(f"names must be as many as the features, {size}, got {len(found)}")
    if twice := [name for i, name in enumerate(found) if name in found[:i]]:
        raise ValueError(f"names must be different ones, got {twice[0]!r} twice")
    return found


def read_features(argument: str, features: Any, size: int, names: Sequence[str] | None) -> tuple[int, ...]:
    """Return the indices of features, ascending, given as indices, as names, or as flags for all of them.

    Raises:
        TypeError: It is none of these.
        ValueError: There is no such feature, or one is there twice.
    """
    if isinstance(features, str | int) or not isinstance(features, Iterable):
        raise TypeError(f"{argument} must be a list of indices or names, got {features!r}")
    given = features.tolist() if isinstance(features, Tensor | np.ndarray) else list(features)
    if given and all(isinstance(one, bool | np.bool_) for one in given):
        if len(given) != size:
            raise ValueError(f"{argument} must be indices, or flags of all {size} features, got {len(given)} flags")
        return tuple(i for i, is_kept in enumerate(given) if is_kept)
    found = sorted(_index(argument, one, size, names) for one in given)
    if twice := [i for i, after in itertools.pairwise(found) if i == after]:
        raise ValueError(f"{argument} must hold each feature once, got {twice[0]} twice")
    return tuple(found)


def _index(argument: str, one: Any, size: int, names: Sequence[str] | None) -> int:
    if isinstance(one, str):
        if names is None:
            raise ValueError(f"{argument} must hold indices where the features have no names, got {one!r}; pass names=")
        if one not in names:
            raise unknown(argument, one, names)
        return names.index(one)
    if isinstance(one, bool) or not isinstance(one, int | np.integer):
        raise TypeError(f"{argument} must hold indices or names, got {one!r} ({type(one).__name__})")
    if not 0 <= one < size:
        raise ValueError(f"{argument} must hold indices of the {size} features, 0 to {size - 1}, got {one}")
    return int(one)
