"""Comparison of outputs: the distance between two, and the distance that is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Movement", "check_same", "movement", "tolerance"]

#: How far an output may move, as a share of its scale, by what was done to the model. All of it is rounding.
#:              float64, float32, float16, bfloat16 and narrower, whole numbers
TOLERANCES = {
    "removal": (1e-9, 1e-5, 1e-2, 1e-2, 0.0),  # the same sums in another order
    "doubtful": (0.0, 1e-2, 1.0, 1.0, 0.0),  # the same where numbers cancel: that may be rounding, float64 shows it
    "fold": (1e-12, 1e-5, 1e-2, 5e-2, 0.0),  # weights worked out in float64, and rounded once
    "program": (1e-5, 1e-5, 1e-5, 1e-5, 1e-5),  # the same operations, called from a file
    "onnx": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4),  # another runtime's operations
}
COLUMNS = {torch.float64: 0, torch.float32: 1, torch.float16: 2}
#: A number that stays the same and is so many times as large as all that moves may be a filler.
FILLER = 1e3


def tolerance(change: str, dtype: torch.dtype) -> float:
    """Return how far an output of a dtype may move after a kind of change (`TOLERANCES`), as a share of its scale."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    return TOLERANCES[change][COLUMNS.get(dtype, 3) if dtype.is_floating_point else 4]


class Movement(NamedTuple):
    """Change of an output.

    Attributes:
        difference: The largest difference; NaN where one of them is no number.
        scale: The largest magnitude before, less fillers.
    """

    difference: float
    scale: float

    @property
    def share(self) -> float:
        """Difference as a share of the scale; infinite if an output is NaN or infinite."""
        return math.inf if math.isnan(self.difference) else self.difference / max(self.scale, 1e-30)


def movement(before: Tensor, after: Tensor) -> Movement:
    """Measure the change between two outputs of the same shape.

    A number that stands several times, stays the same, and is far larger than all that differs has no say: a filler for what
    is masked would hide all else.
    """
    common = torch.promote_types(before.dtype, after.dtype)
    common = common if common.is_floating_point or common.is_complex else torch.float64
    a, b = before.detach().to(common), after.detach().to(before.device, common)
    if a.numel() == 0:
        return Movement(0.0, 0.0)
    size = a.abs().where(a.isfinite(), 0)
    differs = a != b  # equal infinities, as in masked scores, are equal; a NaN equals nothing
    if not differs.any():
        return Movement(0.0, float(size.max()))
    largest = torch.maximum(size, b.abs()).where(differs, 0).max()
    is_filler = (size == size.max()) & (size > FILLER * largest)
    scale = float(size.where(~is_filler, 0).max() if is_filler.sum() > 1 else size.max())
    return Movement(float((a - b).abs().where(differs, 0).max()), scale)


def check_same(expected: Sequence[Tensor], got: Sequence[Tensor], change: str, what: str) -> None:
    """Refuse outputs that differ from the model's by more than the rounding of a change.

    Args:
        expected: The model's outputs.
        got: The outputs to compare.
        change: The row of `TOLERANCES`.
        what: The name of what gave them, for messages.

    Raises:
        ValueError: Their number, a shape or a value differs.
    """
    if len(expected) != len(got):
        raise ValueError(f"{what} must give {len(expected)} outputs as the model does, got {len(got)}")
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"{what} must give output {i} the shape {tuple(a.shape)}, got {tuple(b.shape)}")
        moved, allowed = movement(a, b), tolerance(change, a.dtype)
        if not moved.share <= allowed:
            how = f"to {allowed:g} of the outputs' scale" if allowed else "exactly"
            raise ValueError(
                f"{what} must agree with the model {how}, got a difference of {moved.difference:.3g} in output {i} at a "
                f"scale of {moved.scale:.3g}"
            )
