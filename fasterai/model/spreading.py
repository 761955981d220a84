"""Channels at their places among all that there were, with zeros where some are gone, for what reads a channel's neighbours.

>>> x = torch.tensor([[1.0, 3.0]])
>>> wide = put_back(x, 1, 4, (0, 2))  # along the last dimension, counted from the right
>>> wide
tensor([[1., 0., 3., 0.]])
>>> taken_out(wide.cumsum(1), 1, (0, 2))
tensor([[1., 4.]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["put_back", "taken_out"]


def put_back(x: Tensor, d: int, size: int, places: Sequence[int]) -> Tensor:
    """Put the entries along a dimension, counted from the right from 1 on, to places among `size`; the others are zero."""
    shape = list(x.shape)
    shape[-d] = size
    return x.new_zeros(shape).index_copy(-d, torch.tensor(places, device=x.device), x)


def taken_out(x: Tensor, d: int, places: Sequence[int]) -> Tensor:
    """Return the entries at some places along a dimension, counted from the right from 1 on."""
    return x.index_select(-d, torch.tensor(places, device=x.device))
