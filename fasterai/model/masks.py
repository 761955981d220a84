"""The one place that multiplies masks into weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["apply_masks_", "like"]

PIECE = 1 << 17  # half a MiB of float32, which stays in the second-level cache with what is made of the mask
PATTERN = 64  # decisions on a kernel, at most, that are spread over its weights by a product of matrices
Array = np.ndarray[Any, np.dtype[Any]]


@torch.no_grad()
def apply_masks_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply each mask into its tensor, in place.

    Args:
        pairs: (tensor, mask); the mask is bool, True = keep, and broadcasts against the tensor.
    """
    scratch = np.empty(PIECE, np.float32)
    for tensor, mask in pairs:
        tensor = tensor.detach()
        if tensor.device.type != "cpu" or tensor.dtype is not torch.float32:
            tensor.mul_(mask if mask.shape == tensor.shape else mask.to(tensor.dtype))
        elif mask.shape != tensor.shape:
            _multiply_shared_(tensor, mask, scratch)
        elif (flat := _flat(tensor)) is None or (bits := _flat(mask)) is None or mask.stride() != tensor.stride():
            tensor.mul_(mask)
        else:
            _multiply_(flat.numpy(), bits.numpy(), scratch)


def _multiply_(x: Array, mask: Array, scratch: Array) -> None:
    # torch's product with a bool mask costs three times that with a float mask; widened in the cache it costs little more.
    for i in range(0, x.size, PIECE):
        part = x[i : i + PIECE]
        floats = scratch[: part.size]
        np.copyto(floats, mask[i : i + PIECE])
        np.multiply(part, floats, out=part)


def _multiply_shared_(tensor: Tensor, mask: Tensor, scratch: Array) -> None:
    """Multiply a mask in which one decision stands for several weights into a tensor.

    A product that broadcasts along a dimension of 3 costs up to ten times a product of equal shapes. So the decisions are first
    copied to the shape of the weights.
    """
    shape = tensor.shape
    lead = next(d for d, n in enumerate(shape) if mask.shape[d] != n)
    while lead and math.prod(shape[lead - 1 :]) <= PATTERN:
        lead -= 1  # a row of a kernel: the pattern of the whole kernel is quicker than that of a row
    units, size = math.prod(mask.shape[lead:]), math.prod(shape[lead:])
    if tensor.is_contiguous() and not lead and 0 < math.prod(shape[1:]) <= PIECE:
        tensor.mul_(mask.to(tensor.dtype).expand(-1, *shape[1:]).contiguous())
    elif tensor.is_contiguous() and 0 < size <= PIECE and 1 < units <= PATTERN:
        pattern = torch.eye(units).view(units, *mask.shape[lead:]).expand(units, *shape[lead:]).reshape(units, size)
        _multiply_rows_(tensor.view(-1, size), mask.reshape(-1, units), pattern, scratch)
    else:
        tensor.mul_(mask.to(tensor.dtype))


def _multiply_rows_(rows: Tensor, keep: Tensor, pattern: Tensor, scratch: Array) -> None:
    """Multiply each row's decisions `(n, units)`, spread by a pattern `(units, size)` of ones and zeros, into rows `(n, size)`.

    By hand: a kernel of 2 x 2 whose first column goes has the decisions `[0 1]`; times `[[1 0 1 0], [0 1 0 1]]` that is
    `[0 1 0 1]`. Each product adds up one factor and zeros, so it is exact.
    """
    units, size = pattern.shape
    step = PIECE // size
    floats, spread = np.empty(min(step, len(rows)) * units, np.float32), torch.from_numpy(scratch)
    weights, flags = rows.numpy(), keep.numpy()
    for i in range(0, len(rows), step):
        part = weights[i : i + step]
        decisions = floats[: len(part) * units].reshape(-1, units)
        np.copyto(decisions, flags[i : i + step])
        masks = spread[: part.size].view(-1, size)
        torch.mm(torch.from_numpy(decisions), pattern, out=masks)
        np.multiply(part, masks.numpy(), out=part)


def _flat(x: Tensor) -> Tensor | None:
    """Return a view of all elements of a dense tensor in the order of its memory; None if it is not dense."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


def like(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the mask in the weight's memory format, so that both are read in the same order; other shapes as they are."""
    if mask.shape != weight.shape or mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)
