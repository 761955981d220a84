"""Parameters and buffers by name, in models that may be wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["own_tensors", "owner", "plain_name", "unwrap", "walk_parameters", "walk_tensors"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that `torch.compile` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def owner(name: str) -> str:
    """Return the name of the module that a parameter belongs to, from its name; empty for the model itself.

    >>> owner("head.weight"), owner("head.parametrizations.weight.original0")
    ('head', 'head')
    """
    return f".{name.rpartition('.')[0]}".partition(".parametrizations.")[0].removeprefix(".")


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walk over the parameters, then the buffers, of a module itself: (attribute, tensor)."""
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield attribute, tensor


def walk_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Walk over every parameter and buffer under every one of its names: (name, module, attribute, tensor)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in own_tensors(module):
            yield plain_name(f"{prefix}.{attribute}" if prefix else attribute), module, attribute, tensor


def walk_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Walk over every parameter under every one of its names: (name, module, attribute, parameter)."""
    for name, module, attribute, _ in walk_tensors(model):
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            yield name, module, attribute, parameter
