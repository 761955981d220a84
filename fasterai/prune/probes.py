"""L4. Inputs of other values and sizes, on which a removal must not show either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["probes"]

#: How much larger the numbers of one probe are, as what is dead at scale 1 may come alive. In float64 alone: products and
#: powers in a network make more of float32's rounding there than of what is to be found.
LARGE = 30.0
#: Sizes from here on change by it, as images' sides are often multiples of it; smaller ones are doubled.
STEP = 32


def probes(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The inputs; random ones of another batch size, in float64 large ones, and random ones of another size or length.

    Integers are drawn from the range that the inputs hold, for no other is known to be allowed. A model need not run on all.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    yield inputs
    yield tree_map(lambda x: _random(x, _longer(x), generator), inputs)
    if {x.dtype for x in tensors if x.is_floating_point()} == {torch.float64}:
        yield tree_map(lambda x: _random(x, _shape(x), generator, LARGE), inputs)
    for sizes in _other_sizes(tensors):
        shapes = {size: size - STEP if size > STEP else 2 * size for size in sizes}
        yield tree_map(lambda x, s=shapes: _random(x, _resized(x, s), generator), inputs)


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, Tensor) else ()


def _longer(x: Any) -> tuple[int, ...]:
    shape = _shape(x)
    return (shape[0] + 1, *shape[1:]) if shape else ()


def _resized(x: Any, sizes: dict[int, int]) -> tuple[int, ...]:
    shape = _shape(x)
    return (*shape[:1], *(sizes.get(n, n) for n in shape[1:]))


def _other_sizes(tensors: list[Tensor]) -> list[set[int]]:
    """What may be a side of an image or a length, by the first input: `(N, C, H, W)`, `(N, C, L)` or `(N, L, C)`, `(N, L)`."""
    shape = tuple(tensors[0].shape) if tensors else ()
    if len(shape) > 3:
        return [set(shape[2:])]
    return [{n} for n in dict.fromkeys(shape[:0:-1]) if len(shape) == 3 or not tensors[0].is_floating_point()]


def _random(x: Any, shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.is_complex():
        return x
    if x.is_floating_point():
        return (torch.randn(shape, generator=generator) * scale).to(x.device, x.dtype)
    low, high = (0, 1) if x.dtype == torch.bool or not x.numel() else (int(x.min()), int(x.max()))
    return torch.randint(low, high + 1, shape, generator=generator).to(x.device, x.dtype)
