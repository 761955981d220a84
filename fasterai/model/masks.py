"""The one place that multiplies masks into weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["apply_masks_", "like"]

PIECE = 1 << 18  # 1 MiB of float32, which stays in the second-level cache


@torch.no_grad()
def apply_masks_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply each mask into its tensor, in place.

    Args:
        pairs: (tensor, mask); the mask is bool, True = keep, and broadcasts against the tensor.
    """
    scratch: np.ndarray | None = None
    for tensor, mask in pairs:
        tensor = tensor.detach()
        if tensor.device.type != "cpu" or tensor.dtype is not torch.float32 or mask.shape != tensor.shape:
            tensor.mul_(mask if mask.shape == tensor.shape else mask.to(tensor.dtype))
        elif (flat := _flat(tensor)) is None or (bits := _flat(mask)) is None or mask.stride() != tensor.stride():
            tensor.mul_(mask)
        else:
            scratch = np.empty(PIECE, np.float32) if scratch is None else scratch
            _multiply_(flat.numpy(), bits.numpy(), scratch)


def _multiply_(x: np.ndarray, mask: np.ndarray, scratch: np.ndarray) -> None:
    # torch's product with a bool mask costs three times that with a float mask; widened in the cache it costs little more.
    for i in range(0, x.size, PIECE):
        part = x[i : i + PIECE]
        floats = scratch[: part.size]
        np.copyto(floats, mask[i : i + PIECE])
        np.multiply(part, floats, out=part)


def _flat(x: Tensor) -> Tensor | None:
    """All elements of a dense tensor in the order of its memory, without a copy; None if it is not dense."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


def like(weight: Tensor, mask: Tensor) -> Tensor:
    """A mask of the weight's shape in the weight's memory format, so that the two are read in the same order."""
    if mask.shape != weight.shape or mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)
