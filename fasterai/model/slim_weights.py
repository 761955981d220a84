"""Averages over what is left of entries of which the others were zero, or were all the same once their mean was taken away.

They are for traced copies of code: `before` and `after` are the numbers of entries along what has got shorter. With a share
`r = after / before`, the mean of all is `r m`, and their variance `r v + r (1 - r) m^2`, where `m` and `v` are those of the
entries that are left (`slim_averages`).

Entries from which the mean of all was taken away sum to zero: those that are gone all were `-r m / (1 - r)`, where `m` is what
is left of the mean. So the mean of all squares is `r` times that of the rest plus `r^2 / (1 - r) m^2`:

>>> wide = torch.tensor([1.0, 3.0, 5.0, 0.0])
>>> centred = wide - wide.mean()
>>> torch.allclose(told_centred("var", 4, 3, centred[:3], 0), wide.var())
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasterai.model.slim_averages import correction_in, precise, result_of, spread

__all__ = ["told_batch_norm", "told_centred", "told_variance"]


def told_batch_norm(
    before: int,
    after: int,
    input: Tensor,
    running_mean: None = None,
    running_var: None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise `(B, C, ...)` as `F.batch_norm` does by the averages of its input, of which a part is gone and was zero."""
    x, share = precise(input), after / before
    dims = [d for d in range(x.dim()) if d != 1]
    mean, variance = _averages(x, dims)
    scale = torch.rsqrt(spread(variance, mean, share) + eps)
    y = (x - share * mean) * scale
    sides = [-1 if d == 1 else 1 for d in range(x.dim())]
    y = y if weight is None else y * weight.view(sides)
    return (y if bias is None else y + bias.view(sides)).to(result_of(input))


def _averages(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance with their dimensions; `torch.var` takes ten times as long on a CPU."""
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def told_variance(name: str, before: int, after: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return `torch.var`, `std`, `var_mean` or `std_mean` of entries of which a part is gone and was zero."""
    dims, correction, keepdim = _called(x, args, kwargs)
    share = after / before
    mean, variance = _averages(x, dims)
    variance = spread(variance, mean, share) * _unbiased(x, dims, share, correction)
    variance = variance.sqrt() if name.startswith("std") else variance
    results = [one if keepdim else one.squeeze(dims) for one in (variance, share * mean)]
    return tuple(results) if name.endswith("mean") else results[0]


def told_centred(name: str, before: int, after: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `var` or `std` of entries whose mean was taken away and of which a part is gone, or `mean` or `sum` of squares."""
    if name in ("mean", "sum"):
        args, kwargs = (*args[:1], *([False] if args else []), *args[1:]), {**kwargs, "correction": 0}
    dims, correction, keepdim = _called(x, args, kwargs)
    share = after / before
    squares = share * x.square().mean(dims, keepdim=True)
    squares = squares + share**2 / (1 - share) * x.mean(dims, keepdim=True).square()
    squares = squares if keepdim else squares.squeeze(dims)
    if name == "sum":
        return squares * (_count(x, dims) / share)
    squares = squares * _unbiased(x, dims, share, correction)
    return squares.sqrt() if name == "std" else squares


def _count(x: Tensor, dims: list[int]) -> int:
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count


def _unbiased(x: Tensor, dims: list[int], share: float, correction: float) -> float:
    """Return what makes of the mean of squares over all entries the one that is divided by fewer."""
    total = _count(x, dims) / share
    return total / (total - correction)


def _called(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[int], float, bool]:
    """Return the dimensions, the correction and `keepdim` of a call `(x, dim, unbiased, keepdim)` or `(x, unbiased)`."""
    dim = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    if isinstance(dim, bool):
        dim, args = None, (None, *args)
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", kwargs.get("keepdims", False)))
    return [d % x.dim() for d in dims], correction_in(args[1:], kwargs), keepdim
