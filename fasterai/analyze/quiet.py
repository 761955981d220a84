"""L3. Running a model to measure it, so that nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.undisturbed import evaluating, undisturbed

__all__ = ["at_rest", "check_model", "copies", "device_name", "device_of", "positional", "wait_for"]


def check_model(name: str, model: object) -> nn.Module:
    """A model whose parameters hold values.

    Raises:
        TypeError: It is no module.
        ValueError: A parameter has no values: it is on the meta device, or a lazy module has not been run yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
    for key, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} must be initialised, got {key} without a shape; run the model once on its inputs")
        if parameter.is_meta:
            raise ValueError(f"{name} must hold its weights, got {key} on the meta device")
    return model


def positional(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as positional arguments: a tuple or list as it is, anything else alone."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs in memory of their own, for models that write into them."""
    result: tuple[Any, ...] = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    return result


def device_of(model: nn.Module, inputs: tuple[Any, ...]) -> torch.device:
    """Where a model runs: where its first parameter is, or else its first input."""
    tensors = [*model.parameters(), *(x for x in tree_leaves(inputs) if isinstance(x, Tensor))]
    return tensors[0].device if tensors else torch.device("cpu")


def device_name(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """The same in words."""
    device = device_of(model, inputs)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wait_for(device: torch.device) -> None:
    """Until an accelerator is done, which works on while Python goes on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and random generators are afterwards as they were, whatever was run."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(b): b.detach().clone() for _, buffers in held for b in buffers.values() if b is not None}
    torch.clear_autocast_cache()  # it holds casts of the weights as they were
    with undisturbed(model), evaluating(model), torch.no_grad():
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            for module, buffers in held:
                if {n: id(b) for n, b in module._buffers.items()} != {n: id(b) for n, b in buffers.items()}:
                    module._buffers.clear()
                    module._buffers.update(buffers)
                for buffer in buffers.values():
                    if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                        buffer.copy_(values[id(buffer)])
