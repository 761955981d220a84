"""L1. Who keeps something of a model's parameters, and hears that they get smaller: followers, and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.targets import plain_name, unwrap

__all__ = ["Cut", "Follower", "announce", "follow", "note_optimizer", "noted_optimizers", "sliced"]

#: Parameter or buffer name and dimension -> the indices that stay, where not all do.
Cut = Mapping[tuple[str, int], np.ndarray[Any, np.dtype[np.int64]]]


class Follower(Protocol):
    """Keeps something of a model's parameters."""

    def after_cut(self, cut: Cut) -> None:
        """The model's parameters are smaller now."""


_followers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()
_optimizers: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def follow(model: nn.Module, follower: Follower) -> None:
    """Let a follower know of all later cuts of a model; neither is kept alive by it."""
    _followers.setdefault(unwrap(model), WeakSet()).add(follower)


def announce(model: nn.Module, cut: Cut) -> None:
    """Tell the followers of a model, of its parts, and of what it is a part of, by the names that each of them uses."""
    if not cut:
        return
    inner = {id(m): plain_name(name) for name, m in unwrap(model).named_modules()}
    for followed, followers in list(_followers.items()):
        if id(followed) in inner:
            part = _within(cut, inner[id(followed)])
        else:
            names = [plain_name(n) for n, m in followed.named_modules() if m is unwrap(model)]
            part = {(f"{names[0]}.{n}", d): kept for (n, d), kept in cut.items()} if names else {}
        for follower in list(followers) if part else ():
            follower.after_cut(part)


def note_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Remember who trains a model, or several in a list, so that a later removal cuts its state alike; nobody is kept alive."""
    for one in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        if hasattr(one, "state") and hasattr(one, "__weakref__"):
            _optimizers.setdefault(unwrap(model), WeakSet()).add(one)


def noted_optimizers(model: nn.Module) -> list[Any]:
    """Who was noted for a model, for parts of it, or for what it is a part of."""
    whole = unwrap(model)
    inner = {id(m) for m in whole.modules()}
    related = [m for m in list(_optimizers) if id(m) in inner or any(part is whole for part in m.modules())]
    return [one for m in related for one in _optimizers[m]]


def _within(cut: Cut, prefix: str) -> Cut:
    """What of a cut is inside of a module, by the names there."""
    dotted = f"{prefix}." if prefix else ""
    return {(n.removeprefix(dotted), d): kept for (n, d), kept in cut.items() if n.startswith(dotted)}


def sliced(tensor: Tensor, cut: Cut, name: str) -> Tensor:
    """What stays of a tensor of a parameter's shape; the same tensor if all does."""
    for d in range(tensor.dim()):
        if (name, d) in cut:
            tensor = tensor.index_select(d, torch.as_tensor(cut[name, d], device=tensor.device))
    return tensor
