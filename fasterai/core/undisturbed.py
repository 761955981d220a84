"""L1. Running a model without leaving traces in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "in_mode", "undisturbed", "without_fast_path"]


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
