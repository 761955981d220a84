"""Features as maps: vectors, tokens and images of two networks, brought to one form so that they can be compared.

A map is `(B, C, *S)`: channels, then places. Vectors `(B, C)` have no places, tokens `(B, T, C)` are maps over T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fasterai.distill.losses.squares import mean_square

__all__ = ["UnlikeShapesError", "as_maps", "as_one_map", "attention_of", "grid_of", "resize"]

#: How maps of one, two and three dimensions of places are averaged to fewer, and interpolated to more.
AVERAGES: Mapping[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}
REPAIR = "name two layers whose outputs are both maps, both tokens or both vectors"


class UnlikeShapesError(ValueError):
    """Features of a pair cannot be compared.

    Attributes:
        pair: The place of the pair among those given.
    """

    def __init__(self, pair: int, student: Sequence[int], teacher: Sequence[int], repair: str = REPAIR) -> None:
        self.pair = pair
        self.shapes = tuple(student), tuple(teacher)
        self.repair = repair
        super().__init__(self.message(f"pair {pair}"))

    def message(self, pair: str) -> str:
        """Write the message about a pair, by its place or by its layers."""
        student, teacher = self.shapes
        return (
            f"features of {pair} must be of shapes that can be compared, got {student} of the student and {teacher} of the "
            f"teacher; {self.repair}"
        )


def as_maps(student: Tensor, teacher: Tensor, *, channels_first: bool = False, pair: int = 0) -> tuple[Tensor, Tensor]:
    """Return the features of a pair as maps `(B, C, *S)` in float32, both with as many dimensions.

    Tokens beside a map become one: T is the number of its places, or that of a square; one token more is the class token,
    which is left out. Tokens of two counts become such squares both.

    Args:
        student: The student's feature: `(B, C)`, tokens `(B, T, C)`, or a map `(B, C, *S)`.
        teacher: The teacher's.
        channels_first: Whether three dimensions are a map `(B, C, L)`, such as that of a 1-D convolution, and no tokens.
        pair: The place of the pair, for the message.

    Raises:
        UnlikeShapesError: They are of different kinds or batches, or the number of tokens is that of no square.
    """
    if min(student.dim(), teacher.dim()) < 2 or len(student) != len(teacher):
        raise UnlikeShapesError(pair, student.shape, teacher.shape)
    maps = [as_one_map(x, channels_first) for x in (student, teacher)]
    tokens = [x.dim() == 3 and not channels_first for x in (student, teacher)]
    if any(tokens) and maps[0].shape[2:] != maps[1].shape[2:]:
        beside = [None if is_tokens else x.shape[2:] for x, is_tokens in zip(maps, tokens, strict=True)]
        grids = [
            grid_of(x.shape[2], near) if is_tokens else None
            for x, is_tokens, near in zip(maps, tokens, beside[::-1], strict=True)
        ]
        if grids.count(None) != tokens.count(False):
            raise UnlikeShapesError(pair, student.shape, teacher.shape)
        maps = [x if grid is None else _on_grid(x, grid) for x, grid in zip(maps, grids, strict=True)]
    if maps[0].dim() != maps[1].dim():
        maps = [x.flatten(1) if math.prod(x.shape[2:]) == 1 else x for x in maps]
    if maps[0].dim() != maps[1].dim():
        raise UnlikeShapesError(pair, student.shape, teacher.shape)
    return maps[0], maps[1]


def as_one_map(feature: Tensor, channels_first: bool = False) -> Tensor:
    """Return a feature as a map `(B, C, *S)` in float32."""
    is_tokens = feature.dim() == 3 and not channels_first
    return (feature.transpose(1, 2) if is_tokens else feature).float()


def grid_of(tokens: int, beside: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """Return the places of tokens: those of the map beside them if they are as many, else a square; None if it is neither.

    >>> grid_of(49), grid_of(50), grid_of(15, (3, 5)), grid_of(48)
    ((7, 7), (7, 7), (3, 5), None)
    """
    if beside and tokens - math.prod(beside) in (0, 1):
        return tuple(beside)
    side = math.isqrt(tokens)
    return (side, side) if side and tokens - side * side in (0, 1) and (beside is None or len(beside) == 2) else None


def _on_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Lay tokens `(B, C, T)` out on a grid; the class token, which is the first, is left out."""
    return tokens[:, :, tokens.shape[2] - math.prod(grid) :].reshape(*tokens.shape[:2], *grid)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps `(B, C, *S)` of another size: averages where it is smaller, linear interpolation where it is larger."""
    size = tuple(size)
    if maps.shape[2:] == size:
        return maps
    smaller = tuple(min(a, b) for a, b in zip(maps.shape[2:], size, strict=True))
    if maps.shape[2:] != smaller:
        maps = AVERAGES[len(size)](maps, smaller)
    if smaller == size:
        return maps
    return F.interpolate(maps, size=size, mode=INTERPOLATIONS[len(size)], align_corners=False)


def attention_of(maps: Tensor, p: float = 2.0) -> Tensor:
    """Return where maps `(B, C, *S)` are large: the mean over channels of `|a|^p`, `(B, 1, *S)`."""
    return mean_square(maps, 1).unsqueeze(1) if p == 2 else maps.abs().pow(p).mean(1, keepdim=True)
