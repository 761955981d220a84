"""Probes: inputs of other values and sizes, on which a removal must not change the outputs either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.model.inputs import batch_of, listed_samples

__all__ = ["larger", "probes"]

#: How much larger the numbers of one probe are, as what is dead at scale 1 may come alive. In float64 alone: products and
#: powers in a network make more of float32's rounding there than of what is to be found.
LARGE = 30.0
#: Sizes from here on shrink by it, as images' sides are often multiples of it.
STEP = 32
#: Integers whose range can be read off.
RANGED = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


def probes(inputs: tuple[Any, ...], several: bool = False) -> Iterator[tuple[Any, ...]]:
    """Give the inputs, random ones of another batch size, in float64 large ones, and random ones of another size or length.

    With `several` also ones of the other sign, and of one sign alone, for networks whose way depends on values. Integers are
    drawn from the range that the inputs hold, for no other is known to be allowed. A model need not run on all.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    yield inputs
    if count := listed_samples(inputs):
        yield tree_map(lambda x: _random(x, _shape(x), generator), batch_of(inputs, count + 1))
    else:
        yield tree_map(lambda x: _random(x, _longer(x), generator), inputs)
    if several:
        yield tree_map(lambda x: -x if _is_real(x) else x, inputs)
        yield tree_map(lambda x: _random(x, _shape(x), generator).abs() if _is_real(x) else x, inputs)
    if {x.dtype for x in tensors if x.is_floating_point()} == {torch.float64}:
        yield tree_map(lambda x: _random(x, _shape(x), generator, LARGE), inputs)
    for sizes in _other_sizes(tensors, _other_size):
        yield tree_map(lambda x, s=sizes: _random(x, _resized(x, s), generator), inputs)


def larger(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Give random inputs with larger sides of images, or of a further length, for code that decides by sizes."""
    generator = torch.Generator().manual_seed(1)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    for sizes in _other_sizes(tensors, _larger_size):
        yield tree_map(lambda x, s=sizes: _random(x, _resized(x, s), generator), inputs)


def _larger_size(n: int, may_grow: bool) -> int:
    if not may_grow:
        return 0
    return n + STEP if n >= 2 * STEP else 2 * n if n >= STEP // 2 else n // 2


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, Tensor) else ()


def _longer(x: Any) -> tuple[int, ...]:
    shape = _shape(x)
    return (shape[0] + 1, *shape[1:]) if shape else ()


def _resized(x: Any, sizes: dict[int, int]) -> tuple[int, ...]:
    shape = _shape(x)
    return (*shape[:1], *(sizes.get(n, n) for n in shape[1:]))


def _other_sizes(tensors: list[Tensor], other: Callable[[int, bool], int]) -> list[dict[int, int]]:
    """Find other sizes to try for images and lengths: size now -> size of the probe.

    The first input decides: `(N, C, H, W)`, `(N, C, L)` or `(N, L, C)`, `(N, L)`.

    Nothing gets longer where a table might be read beyond its end on an accelerator, which no program survives.
    """
    shape = tuple(tensors[0].shape) if tensors else ()
    is_index = [not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool for x in tensors]
    may_grow = not any(is_index) and all(x.device.type == "cpu" for x in tensors)
    if any(is_index) and not is_index[0]:
        return []
    sides = [shape[2:]] if len(shape) > 3 else [(n,) for n in dict.fromkeys(shape[:0:-1]) if len(shape) == 3 or any(is_index)]
    others = [{n: other(n, may_grow) for n in side} for side in sides]
    return [sizes for sizes in others if all(sizes.values()) and sizes]


def _other_size(n: int, may_grow: bool) -> int:
    if n >= 2 * STEP:
        return n - STEP
    return 2 * n if may_grow and n < STEP // 2 else n // 2


def _random(x: Any, shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.is_floating_point() or x.is_complex():
        dtype = x.dtype if x.is_complex() else torch.float32
        return (torch.randn(shape, generator=generator, dtype=dtype) * scale).to(x.device, x.dtype)
    if x.dtype not in RANGED:
        return x
    low, high = (0, 1) if x.dtype == torch.bool or not x.numel() else (int(x.min()), int(x.max()))
    return torch.randint(min(low, 2**63 - 2), min(high, 2**63 - 2) + 1, shape, generator=generator).to(x.device, x.dtype)
