"""Snapshots of a model: every tensor that it has at a moment, to go back to later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.model.names import plain_name, unwrap, walk_tensors

__all__ = ["clear_states_", "find_differences", "put_back_", "sum_of", "take_snapshot"]


def take_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers of a model, those that its state dict leaves out included.

    Args:
        model: The model, wrapped or not; its wrappers add nothing to the names. A tied tensor is there once, under its first
            name.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, _, _, tensor in walk_tensors(unwrap(model)):
        found.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach().clone() for name, tensor in found.values()}


@torch.no_grad()
def put_back_(model: nn.Module, snapshot: Mapping[str, Tensor]) -> None:
    """Write a snapshot's values into a model; tensors that it does not know are unchanged.

    A buffer that has got another shape since is replaced by one of the snapshot's.
    """
    for name, module, attribute, tensor in walk_tensors(unwrap(model)):
        value = snapshot.get(name)
        if value is None:
            continue
        if value.shape != tensor.shape and attribute in module._buffers:
            module._buffers[attribute] = value.to(tensor.device, copy=True)
        elif attribute not in module._buffers or not torch.equal(value.to(tensor), tensor):  # a buffer may overlap itself
            tensor.detach().copy_(value)


def find_differences(model: nn.Module, snapshot: Mapping[str, Tensor]) -> list[str]:
    """Return in words what keeps a snapshot from being one of this model: names and shapes; empty if it fits."""
    own = {name: tensor for name, _, _, tensor in walk_tensors(unwrap(model))}
    kept_in_files = {plain_name(name) for name in unwrap(model).state_dict()}
    known = {id(own[name]) for name in snapshot if name in own}
    found = [f"{name} is missing" for name in snapshot if name not in own]
    found += [f"{name} is there besides" for name, x in own.items() if name in kept_in_files and id(x) not in known]
    for name, value in snapshot.items():
        if name in own and own[name].shape != value.shape:
            found.append(f"{name} is {tuple(own[name].shape)} here and {tuple(value.shape)} there")
    return found


def clear_states_(optimizers: Iterable[Any]) -> None:
    """Drop the state of optimizers, such as momentum; their settings are unchanged."""
    for optimizer in optimizers:
        if hasattr(optimizer, "clear_state"):  # fastai's
            optimizer.clear_state()
        else:
            optimizer.state.clear()


def sum_of(tensors: Mapping[str, Tensor], more: object = None) -> str:
    """Return a SHA-256 sum of the names, kinds, shapes and values of tensors; equal for equal ones.

    Args:
        tensors: The tensors, on any device.
        more: Plain data to go into the sum.
    """
    total = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        total.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        if x.numel():
            total.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
