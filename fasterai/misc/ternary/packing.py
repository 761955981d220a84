"""Packing of ternary weights: two bits for each of them, and a scale for each group; what is read back is equal."""

from __future__ import annotations

import torch
from torch import Tensor

from fasterai.misc.ternary.groups import Division

__all__ = ["SCALE_TYPES", "is_ternary", "pack", "packed_bytes", "scales_of", "unpack"]

#: Types that scales are kept in: the first one that holds all of them exactly.
SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Weights in a byte.
PER_BYTE = 4


def packed_bytes(weights: int, groups: int, dtype: torch.dtype) -> int:
    """Return the bytes of packed weights and their scales.

    >>> packed_bytes(weights=64, groups=16, dtype=torch.float32)
    80
    """
    return -(-weights // PER_BYTE) + groups * dtype.itemsize


def scales_of(ternary: Tensor, division: Division) -> Tensor:
    """Return the scales of ternary weights, `(A, M, B)`, in the narrowest type that holds them exactly."""
    scales = division.split(ternary).abs().amax(2)
    for dtype in SCALE_TYPES[:-1]:
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales


def is_ternary(weight: Tensor, division: Division) -> bool:
    """Tell if the weights of each group are -a, 0 or a."""
    sizes = division.split(weight).abs()
    return bool(((sizes == 0) | (sizes == sizes.amax(2, keepdim=True))).all())


def pack(ternary: Tensor, division: Division) -> tuple[Tensor, Tensor]:
    """Return ternary weights as codes and scales.

    Args:
        ternary: The weights.
        division: Their groups.

    Returns:
        Codes, uint8 `(ceil(n / 4),)`, in the weights' order, the first in the lowest two bits: 0 for -a, 1 for 0, 2 for a. And
        the scales `(A, M, B)`.
    """
    codes = (ternary.detach().sign().to(torch.int8) + 1).to(torch.uint8).flatten()
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % PER_BYTE), value=1).view(-1, PER_BYTE)
    shifts = 2 * torch.arange(PER_BYTE, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(1, dtype=torch.uint8), scales_of(ternary, division)


def unpack(codes: Tensor, scales: Tensor, division: Division, shape: torch.Size) -> Tensor:
    """Return the weights that `pack` has packed, in the type of the scales.

    Raises:
        ValueError: The codes or scales are too few or too many, a code is none, or a scale is negative or not finite.
    """
    if codes.dtype != torch.uint8 or codes.shape != (-(-shape.numel() // PER_BYTE),):
        raise ValueError(f"codes must be {-(-shape.numel() // PER_BYTE)} bytes, got {tuple(codes.shape)} of {codes.dtype}")
    wanted = (division.rows, division.along, division.columns)
    if scales.shape != wanted or scales.dtype not in SCALE_TYPES:
        raise ValueError(f"scales must be of shape {wanted}, got {tuple(scales.shape)} of {scales.dtype}")
    if not (scales.isfinite().all() and (scales >= 0).all()):
        raise ValueError("scales must be finite and at least 0, got others")
    shifts = 2 * torch.arange(PER_BYTE, dtype=torch.uint8, device=codes.device)
    values = ((codes[:, None] >> shifts) & 3).flatten()[: shape.numel()]
    if (values == 3).any():
        raise ValueError("codes must be 0, 1 or 2, got 3")
    signs = division.split((values.to(torch.int8) - 1).view(shape)).to(scales.dtype)
    return division.join(signs * scales.unsqueeze(2) + 0.0, shape)
