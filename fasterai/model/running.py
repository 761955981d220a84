"""Running a model without leaving traces in it, and on which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
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


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode, and every module back in its own mode afterwards."""
    return in_mode(model, False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The random generators go on afterwards as if nothing had been drawn."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Transformer layers run module by module, not as one of torch's fused inference kernels, which zero what is padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
