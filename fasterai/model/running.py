"""Contexts for running a model without leaving traces in it, and the device that it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.model.attributes import attributes_kept
from fasterai.model.names import unwrap

__all__ = [
    "Narrowed",
    "at_rest",
    "copies",
    "device_name",
    "device_of",
    "evaluating",
    "in_mode",
    "undisturbed",
    "wait_for",
    "without_fast_path",
]


class Narrowed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, it notes if a tensor in float64 is cast to a narrower type, as norms that insist on float32 do.

    Attributes:
        dtype: The narrowest type that a tensor was cast to; float64 if none was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = torch.float64

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at its result if it casts."""
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and args[0].dtype is torch.float64 and result.dim():
            is_narrower = result.is_floating_point() and torch.finfo(result.dtype).bits < torch.finfo(self.dtype).bits
            self.dtype = result.dtype if is_narrower else self.dtype
        return result


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Put a model in eval mode for a while; every module gets its own mode back."""
    return in_mode(model, False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in training or eval mode for a while; every module gets its own mode back.

    In training mode some write into parameters, as a code book that follows an average: they get their values back.
    """
    modes = [(module, module.training) for module in model.modules()]
    kept = [(p, p.data, p.detach().clone()) for p in model.parameters() if training and not p.is_meta]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before
        for parameter, data, values in kept:
            _give_back(parameter, data, values)


@torch.no_grad()
def _give_back(parameter: nn.Parameter, data: Tensor, values: Tensor) -> None:
    """Give a parameter its memory and its values back, if others were put there."""
    if parameter.data_ptr() != data.data_ptr():
        parameter.data = data
    if not torch.equal(data, values):
        data.copy_(values)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the random generators of the CPU and the model's GPUs at the end, and the attributes of the model's modules."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]), attributes_kept(unwrap(model)):
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off torch's fused inference kernel of transformer layers for a while, since it sets padding to zero."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy inputs into memory of their own, for models that write into them."""
    result: tuple[Any, ...] = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    return result


def device_of(model: nn.Module, inputs: tuple[Any, ...]) -> torch.device:
    """Return the device of the model's first parameter; without one that of the first input, else the CPU."""
    first: Tensor | None = next(model.parameters(), None)  # the first alone: a large model has many
    if first is None:
        first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    return torch.device("cpu") if first is None else first.device


def device_name(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Return the name of the device that a model runs on."""
    device = device_of(model, inputs)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work; a CPU has no queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients for a while; modes, buffers and random generators are restored."""
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
