"""Notices of a model: its parameters get smaller, or masks on them move. Followers hear of both, optimizers are noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.types import Move
from fasterai.model.names import plain_name, unwrap

__all__ = ["Cut", "announce", "announce_move", "follow", "note_optimizer", "noted_optimizers", "sliced"]

#: Parameter or buffer name and dimension -> the indices that stay, where not all do.
Cut = Mapping[tuple[str, int], np.ndarray[Any, np.dtype[np.int64]]]


_followers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()
_optimizers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def follow(model: nn.Module, follower: Any) -> None:
    """Let a follower know of all later cuts and moves of a model; neither is kept alive by it.

    Args:
        model: The model, wrapped or not.
        follower: Has a method `after_cut(cut)`, `after_move(move)` or both; keeps what it has of the model's parameters in
            attributes that it replaces and does not change in place.
    """
    whole = unwrap(model) if "_modules" in vars(model) else model  # one that is being copied has nothing yet
    _followers.setdefault(whole, WeakSet()).add(follower)


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
    """The followers that a cut of a model concerns, and how it is called there."""
    dims: dict[int, dict[int, Any]] = {}
    own = dict(_tensors(model))
    for (name, d), kept in cut.items():
        if name in own:
            dims.setdefault(id(own[name]), {})[d] = kept
    parts: list[tuple[Any, Cut]] = []
    for followed, followers in list(_followers.items()) if dims else ():
        part = {(name, d): kept for name, tensor in _tensors(followed) for d, kept in dims.get(id(tensor), {}).items()}
        parts += [(follower, part) for follower in followers] if part else []
    return parts


def note_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Remember who trains a model, or several in a list, so that a later removal cuts its state alike; nobody is kept alive."""
    for one in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        if hasattr(one, "state") and hasattr(one, "__weakref__"):
            _optimizers.setdefault(unwrap(model), WeakSet()).add(one)


def noted_optimizers(model: nn.Module) -> list[Any]:
    """Who was noted for a model, or for another that shares parameters with it, as a part does, and what it is a part of."""
    own = {id(p) for p in unwrap(model).parameters()}
    related = [m for m in list(_optimizers) if any(id(p) in own for p in m.parameters())]
    return [one for m in related for one in _optimizers[m]]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model, tied ones under each of their names."""
    for found in (unwrap(model).named_parameters, unwrap(model).named_buffers):
        for name, tensor in found(remove_duplicate=False):
            yield plain_name(name), tensor


def sliced(tensor: Tensor, cut: Cut, name: str) -> Tensor:
    """What stays of a tensor of a parameter's shape; the same tensor if all does."""
    for d in range(tensor.dim()):
        if (name, d) in cut:
            tensor = tensor.index_select(d, torch.as_tensor(cut[name, d], device=tensor.device))
    return tensor
