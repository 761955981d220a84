"""Notices about a model to its followers: parameters were cut to a smaller size, or masks on them moved.

A follower is any object with `after_cut` or `after_move`, such as a sparsifier. Optimizers of a model are noted here as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.types import Move
from fasterai.model.names import unwrap, walk_tensors

__all__ = [
    "Cut",
    "announce",
    "announce_move",
    "check_trains",
    "follow",
    "input_place",
    "kept_slices",
    "note_optimizer",
    "noted_optimizers",
    "sliced",
]

#: Parameter or buffer name and dimension -> the indices that stay, where not all do; of inputs by their `input_place`.
Cut = Mapping[tuple[str, int], np.ndarray[Any, np.dtype[np.int64]]]

INPUT = "input "  # what names of inputs begin with in a cut

#: Number of dimensions -> the memory format of images.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


_followers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()
_optimizers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def follow(model: nn.Module, follower: Any) -> None:
    """Register a follower for all later cuts and moves of a model; neither keeps the other alive.

    Args:
        model: The model, wrapped or not.
        follower: Has a method `after_cut(cut)`, `after_move(move)` or both; keeps what it has of the model's parameters in
            attributes that it replaces and does not change in place.
    """
    whole = unwrap(model) if "_modules" in vars(model) else model  # one that is being copied has nothing yet
    _followers.setdefault(whole, WeakSet()).add(follower)


def input_place(argument: str, dim: int) -> tuple[str, int]:
    """Return the place of an input's dimension in a cut."""
    return INPUT + argument, dim


def announce(model: nn.Module, cut: Cut, copies: Sequence[nn.Module] = ()) -> None:
    """Tell the followers of all models that hold one of the cut tensors, by every name that it has there.

    If one of them fails or is interrupted, all are as they were before.
    """
    parts = [part for one in (model, *copies) for part in _parts(one, cut)]
    before = [(follower, dict(vars(follower))) for follower, _ in parts]
    try:
        for follower, part in parts:
            if hasattr(follower, "after_cut"):
                follower.after_cut(part)
    except BaseException:
        for follower, state in before:
            vars(follower).update(state)
        raise


def announce_move(model: nn.Module, move: Move) -> None:
    """Tell the followers of a model, and of models that share parameters with it, that masks have moved."""
    own = {id(p) for p in unwrap(model).parameters()}
    for followed, followers in list(_followers.items()):
        if any(id(p) in own for p in followed.parameters()):
            for follower in list(followers):
                if hasattr(follower, "after_move"):
                    follower.after_move(move)


def _parts(model: nn.Module, cut: Cut) -> list[tuple[Any, Cut]]:
    """Find the followers that a cut of a model concerns, each with the cut under the names of its own model."""
    dims: dict[int, dict[int, Any]] = {}
    own = {name: tensor for name, _, _, tensor in walk_tensors(unwrap(model))}
    for (name, d), kept in cut.items():
        if name in own:
            dims.setdefault(id(own[name]), {})[d] = kept
    inputs = {place: kept for place, kept in cut.items() if place[0].startswith(INPUT) and place[0] not in own}
    parts: list[tuple[Any, Cut]] = []
    for followed, followers in list(_followers.items()) if dims else ():
        held = ((name, dims.get(id(tensor), {})) for name, _, _, tensor in walk_tensors(unwrap(followed)))
        part = {(name, d): kept for name, found in held for d, kept in found.items()}
        part |= inputs if part and unwrap(followed) is unwrap(model) else {}  # the inputs of its parts are others
        parts += [(follower, part) for follower in followers] if part else []
    return parts


def note_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Note an optimizer of a model, or several in a list, so that a later removal cuts its state; none is kept alive."""
    for one in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        if hasattr(one, "state") and hasattr(one, "__weakref__"):
            _optimizers.setdefault(unwrap(model), WeakSet()).add(one)


def noted_optimizers(model: nn.Module) -> list[Any]:
    """List the optimizers noted for a model or for one that shares parameters with it, such as its whole or a part."""
    own = {id(p) for p in unwrap(model).parameters()}
    related = [m for m in list(_optimizers) if any(id(p) in own for p in m.parameters())]
    return [one for m in related for one in _optimizers[m]]


def check_trains(optimizer: Any, parameters: Iterable[Tensor], whole: str, parts: str) -> None:
    """Refuse an optimizer, or several in a list, that trains none of some parameters.

    Args:
        optimizer: The optimizer; one without `param_groups` says nothing of what it trains, and passes.
        parameters: The parameters, one of which it has to hold.
        whole: The model's description in the message.
        parts: The parameters' description there.

    Raises:
        ValueError: It trains others only.
    """
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    trained = {id(p) for one in several for group in getattr(one, "param_groups", ()) for p in group["params"]}
    if trained and not any(id(p) in trained for p in parameters):
        raise ValueError(
            f"optimizer must train {whole}, got one that holds none of {parts}: make the optimizer anew after the model"
        )


def sliced(tensor: Tensor, cut: Cut, name: str) -> Tensor:
    """Return the kept slice of a tensor of a parameter's shape after a cut; the same tensor if all of it is kept."""
    return kept_slices(tensor, {d: cut[name, d] for d in range(tensor.dim()) if (name, d) in cut})


def kept_slices(tensor: Tensor, kept: Mapping[int, Any]) -> Tensor:
    """Return the kept slice of a tensor, in its memory format and without gradient; the same tensor if all of it is kept.

    Args:
        tensor: The tensor; not changed.
        kept: Dimension -> the indices that stay along it.
    """
    if not kept:
        return tensor
    result = tensor.detach()
    for d, indices in kept.items():
        result = result.index_select(d, torch.as_tensor(indices, device=tensor.device))
    layout = CHANNELS_LAST.get(tensor.dim())
    if layout is not None and tensor.stride() == _channels_last_strides(tensor.shape) != _contiguous_strides(tensor.shape):
        result = torch.empty_like(result, memory_format=layout).copy_(result)
    return result


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    n, *kernel, c = _contiguous_strides((shape[0], *shape[2:], shape[1]))
    return n, c, *kernel
