"""Selection of features in tensors, arrays and tables, and its way back; `prune/features/selector.py` says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Where", "check_width", "scattered", "select", "select_in"]

#: Where the features are in an item or a batch: a position, a key, or a path of such.
Where = int | str | tuple[int | str, ...]


def select(x: Any, keep: Sequence[int], size: int, dim: int, names: Sequence[str] | None = None) -> Any:
    """Select features of a tensor, an array, a sparse matrix or a data frame; the result is of the same kind.

    Args:
        x: The data, with `size` features along `dim`. A data frame is read by names, if there are some.
        keep: The indices to keep, ascending.
        size: The number of features that there are.
        dim: The dimension of the features.
        names: Their names.

    Raises:
        ValueError: It has another number of features, or none of a name.
    """
    if _is_frame(x):
        return _select_columns(x, keep, size, names)
    x = x if isinstance(x, Tensor) or hasattr(x, "tocsc") else np.asarray(x)
    check_width(x, size, dim, len(keep))
    if isinstance(x, Tensor):
        return x.index_select(dim, torch.as_tensor(keep, device=x.device))
    return x.tocsc()[:, list(keep)].asformat(x.format) if hasattr(x, "tocsc") else np.take(x, keep, axis=dim)


def check_width(x: Any, size: int, dim: int, kept: int) -> None:
    """Refuse data of another number of features.

    Raises:
        ValueError: It has another, or no such dimension.
    """
    shape = tuple(x.shape)
    if not 0 <= dim < len(shape):
        raise ValueError(f"x must have features in dimension {dim}, got the shape {shape}")
    if shape[dim] != size:
        repair = "; it seems to be selected already" if shape[dim] == kept else ""
        raise ValueError(f"x must have {size} features in dimension {dim}, got {shape[dim]} (shape {shape}){repair}")


def _is_frame(x: Any) -> bool:
    return hasattr(x, "iloc") and hasattr(x, "columns")


def _select_columns(frame: Any, keep: Sequence[int], size: int, names: Sequence[str] | None) -> Any:
    if names is None:
        check_width(frame, size, 1, len(keep))
        return frame.iloc[:, list(keep)]
    wanted = [names[i] for i in keep]
    if missing := [name for name in wanted if name not in frame.columns]:
        raise ValueError(f"x must have the columns {', '.join(wanted[:5])}, got none of the name {missing[0]!r}")
    return frame[wanted]


def scattered(x: Any, keep: Sequence[int], size: int, dim: int, names: Sequence[str] | None = None) -> Any:
    """Put kept features back to their places, with zeros at all others; the way back from `select`.

    Raises:
        ValueError: It has not as many features as were kept.
    """
    if _is_frame(x):
        values = scattered(x.to_numpy(), keep, size, 1)
        return type(x)(values, index=x.index, columns=None if names is None else list(names))
    if hasattr(x, "tocsc"):
        raise TypeError(f"x must be a tensor, an array or a data frame, got {type(x).__name__}; pass x.toarray()")
    x = x if isinstance(x, Tensor) else np.asarray(x)
    check_width(x, len(keep), dim, -1)
    shape = [size if d == dim else n for d, n in enumerate(x.shape)]
    if isinstance(x, Tensor):
        return x.new_zeros(shape).index_copy(dim, torch.as_tensor(keep, device=x.device), x)
    whole = np.zeros(shape, x.dtype)
    whole[(slice(None),) * dim + (list(keep),)] = x
    return whole


def select_in(item: Any, where: Where, change: Any) -> Any:
    """Return an item or a batch with one of its parts changed; the given one stays as it is.

    Args:
        item: A tensor, which is changed itself where it stands alone; a tuple, a list or a mapping.
        where: The position or key of the part, or a path.
        change: The function of the part.

    Raises:
        ValueError: There is no such part.
    """
    first, *others = where if isinstance(where, tuple) else (where,)
    if not isinstance(item, tuple | list | Mapping):
        if first == 0 and not others:
            return change(item)
        raise ValueError(f"argument must be a place in what the data gives, got {where!r} and a {type(item).__name__}")
    known: Any = item if isinstance(item, Mapping) else range(len(item))
    if first not in known:
        found = ", ".join(map(repr, known))
        raise ValueError(f"argument must be a place in what the data gives, one of {found}, got {first!r}")
    inner: Any = item
    part = change(inner[first]) if not others else select_in(inner[first], tuple(others), change)
    if isinstance(item, Mapping):
        return _mapping(item, {key: part if key == first else value for key, value in item.items()})
    parts = [part if i == first else value for i, value in enumerate(item)]
    return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)


def _mapping(like: Any, values: dict[Any, Any]) -> Any:
    """Return a mapping of the kind of another one, such as a tokenizer's batch; a plain dict where it is made otherwise."""
    try:
        return type(like)(values)
    except TypeError:
        return values
