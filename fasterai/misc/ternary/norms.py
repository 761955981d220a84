"""Statistics of batch norms, measured anew after the weights before them have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.model.inputs import as_batch
from fasterai.model.running import evaluating, undisturbed

__all__ = ["check_batches", "measure_norms_"]


@torch.no_grad()
def measure_norms_(model: nn.Module, data: Iterable[Any]) -> None:
    """Measure mean and variance of every batch norm anew: the averages over the batches, each weighing the same.

    All other modules are in eval mode meanwhile, so that nothing is dropped. Modes, momenta, counts and random generators stay
    as they were. Norms without statistics of their own, and those that no batch reaches, stay as well.

    Args:
        model: The model.
        data: Batches, each `x`, `(x, y)`, `((x1, x2), y)` or a dict of keywords, on the model's device.

    Raises:
        TypeError: `data` is no iterable of batches.
        ValueError: There is no batch, or the model does not run on one. The statistics are as before then.
    """
    data = check_batches(data)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(norm, norm.momentum, {n: b.clone() for n, b in norm.named_buffers()}) for norm in norms]
    is_done = False
    try:
        with undisturbed(model), evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average
                norm.training = True
            _run(model, data)
        is_done = True
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            is_measured = is_done and bool(norm.num_batches_tracked)
            for name, buffer in norm.named_buffers():
                if not is_measured or name == "num_batches_tracked":
                    buffer.copy_(buffers[name])


def check_batches(data: Any) -> Iterable[Any]:
    """Return batches that can be read, or refuse them.

    Raises:
        TypeError: They are no iterable, or a batch of keywords alone.
    """
    if isinstance(data, str | Mapping) or not hasattr(data, "__iter__"):
        raise TypeError(f"data must be batches, got {type(data).__name__}; pass a DataLoader or a list of batches")
    found: Iterable[Any] = data
    return found


def _run(model: nn.Module, data: Iterable[Any]) -> None:
    is_empty = True
    for item in data:
        is_empty = False
        batch = as_batch(item)
        try:
            model(*batch.inputs, **batch.keywords)
        except Exception as error:
            raise ValueError(f"data must hold batches that the model runs on, got an error: {error}") from error
    if is_empty:
        raise ValueError("data must hold at least one batch, got none")
