"""Units of a ticket as plain data: decisions, and the units that the weights of each parameter belong to.

A mask is read off without a model: weight `(i, j)` of a parameter belongs to unit `axes[0][i] + axes[1][j]`. So a filter of 16
channels is 16 decisions, its weights find them by `axes[0] = 0..15`, and a random choice of filters stays one of filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from fasterai.display import Brief
from fasterai.sparse.record import MaskRecord
from fasterai.units.pool import Pool

__all__ = ["Place", "Units", "masks_of", "read_units"]


@dataclass(frozen=True, repr=False)
class Place(Brief):
    """A parameter whose weights belong to units.

    Attributes:
        name: The parameter's name.
        axes: For each dimension of the parameter's view a whole number for each of its indices; their sum is the unit's number.
    """

    name: str
    axes: tuple[Tensor, ...]

    def numbers(self) -> Tensor:
        """Return the number of the unit of each weight, in the view's shape."""
        count = len(self.axes)
        parts = [axis.view([-1 if i == d else 1 for i in range(count)]) for d, axis in enumerate(self.axes)]
        return reduce(torch.add, parts)


@dataclass(frozen=True, repr=False)
class Units(Brief):
    """Units that competed under one name.

    Attributes:
        name: The name of the target, or of the first weight of coupled channels.
        keep: Their decisions, bool `(n,)`, True = keep.
        places: The parameters that hold their weights, biases and norms of theirs included.
    """

    name: str
    keep: Tensor
    places: tuple[Place, ...]

    @property
    def pruned(self) -> int:
        """The number of pruned units."""
        return int((~self.keep).sum())

    def shuffled(self, generator: torch.Generator) -> Units:
        """Return the same units with as many of them pruned, drawn at random."""
        return replace(self, keep=self.keep[torch.randperm(len(self.keep), generator=generator)])


def masks_of(units: Sequence[Units], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the mask of each parameter that units lie in: bool, True = keep.

    Args:
        units: The units. A weight that belongs to several, as where coupled channels cross, is kept if all are.
        shapes: The parameters' names and shapes.
    """
    masks: dict[str, Tensor] = {}
    for one in units:
        for place in one.places:
            mask = one.keep[place.numbers()].reshape(shapes[place.name])
            masks[place.name] = masks[place.name] & mask if place.name in masks else mask
    return masks


def read_units(record: MaskRecord) -> tuple[Units, ...]:
    """Return the units of a record of masks, on the CPU; pools without decisions are kept whole."""
    return tuple(units for pool in record.pools for units in _of_pool(pool, record.keep.get(pool.name)))


def _of_pool(pool: Pool, keep: Tensor | None) -> Iterator[Units]:
    decided = torch.ones(pool.count, dtype=torch.bool) if keep is None else keep.reshape(-1).cpu()
    places = [_separated(name, numbers) for name, numbers in _numbered(pool)]
    if all(place is not None for place in places):
        yield Units(pool.name, decided, tuple(place for place in places if place is not None))
        return
    for name, numbers in _numbered(pool):  # units that lie in no such way are taken weight by weight
        yield Units(name, decided[numbers.reshape(-1)], (Place(name, _rows(tuple(numbers.shape))),))


def _numbered(pool: Pool) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter with the number of the unit of each weight, in the shape of its view.

    A pool says where units lie by masks alone. So it is asked for the masks of units whose number has bit 0, then bit 1 and so
    on: a weight of unit 5 is kept in the first and the third.
    """
    numbers = torch.arange(pool.count, device=pool.device)
    found: dict[int, tuple[str, Tensor]] = {}
    for bit in range(max(1, (pool.count - 1).bit_length())):
        keep = pool.laid_out((numbers >> bit & 1).bool().view(pool.shape))
        for i, (name, mask) in enumerate([*pool.masks(keep), *pool.vectors(keep)]):
            so_far = found[i][1] if i in found else torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
            found[i] = name, so_far + (mask.to(torch.int32) << bit)
    for name, so_far in found.values():
        yield name, so_far.expand(pool.tensor(name).shape).cpu()


def _rows(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return axes that number the weights one by one."""
    return tuple(torch.arange(n, dtype=torch.int32) * math.prod(shape[d + 1 :]) for d, n in enumerate(shape))


def _separated(name: str, numbers: Tensor) -> Place | None:
    """Return a place whose axes add up to these numbers; None if there are none.

    Of the numbers `[[0, 1], [2, 3]]` the first column is one axis, `[0, 2]`, and the first row, less its first, the other:
    `[0, 1]`.
    """
    origin = numbers.reshape(-1)[0]
    axes = []
    for d in range(numbers.dim()):
        along = numbers[tuple(slice(None) if i == d else 0 for i in range(numbers.dim()))]
        axes.append(along.clone() if d == 0 else along - origin)
    place = Place(name, tuple(axes))
    return place if torch.equal(place.numbers(), numbers) else None
