"""The mean of squares, which keeps nothing for the backward pass but what is squared.

`F.mse_loss` keeps both maps that it compares, and a chain of powers and means goes over the map once for each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["mean_square"]


def mean_square(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of `x^2`, of all entries or along a dimension; `x` alone is kept for the backward pass.

    >>> mean_square(torch.tensor([[3.0, 1.0], [1.0, 1.0]])), mean_square(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0)
    (tensor(3.), tensor([5., 1.]))
    """
    found: Tensor = _MeanSquare.apply(x, dim)
    return found


class _MeanSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int | None) -> Tensor:
        squares = x.square()
        return squares.mean() if dim is None else squares.mean(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int | None], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        count = x.numel() if ctx.dim is None else x.shape[ctx.dim]
        factor = grads[0] * (2 / max(1, count))
        return x * (factor if ctx.dim is None else factor.unsqueeze(ctx.dim)), None
