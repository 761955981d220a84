"""Names of a model's parameters, whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["plain_name", "unwrap", "walk_parameters"]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_name(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def walk_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, attribute, parameter) of every parameter under every one of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield plain_name(f"{prefix}.{attribute}" if prefix else attribute), module, attribute, parameter
