"""Redundancy among units: how similar they are, and which of the most similar go first.

Plain functions of vectors, one for each unit, and the rule on units that a criterion carries. To add a similarity: its name in
`SIMILARITIES`, and its lines in `_comparable` and `_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import check_choice

__all__ = ["ON", "SIMILARITIES", "Variety", "order_of_removal", "similarities"]

SIMILARITIES = ("abs_cosine", "cosine", "euclidean", "pearson")
ON = ("activations", "weights")
#: Similarities that differ by less count as equal, so that the rounding of a sum decides nothing.
STEP = 2.0**-16
#: Rows of similarities that are held at once: what is held beyond the vectors grows with the units, not with their pairs.
BLOCK = 256
#: Share of the largest score by which units of equal scores are told apart; a float64 holds 12 binary digits more.
APART = 2.0**-40
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Variety:
    """The rule on units by which redundant ones go first; `variety(criterion)` makes a criterion of it.

    The scores of a pool's units stay the same numbers, dealt out anew: the lowest to the unit that goes first. So a layer
    compares with others as it does by the criterion alone, and loses as many units; which of them is decided by redundancy.
    Units of zero weights, as pruned ones are, have nothing to be compared by. They keep their scores and stand beside no other.

    Attributes:
        similarity: One of `SIMILARITIES`.
        on: What is compared: the `weights` of the units, or their `activations` on data: what the layers put out.
        before: A further rule on units, whose scores are taken for the criterion's; None if there is none.
        compares: True; where there are no units of several weights to compare, it is refused.
    """

    compares: ClassVar[bool] = True
    similarity: str = "cosine"
    on: str = "weights"
    before: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("on", self.on, ON)

    @property
    def reads(self) -> str:
        """The vectors that it is given for the units: `weights` or `outputs`."""
        return "outputs" if self.on == "activations" else "weights"

    def __repr__(self) -> str:
        told = [repr(self.similarity), *([f"on={self.on!r}"] if self.on != "weights" else [])]
        return f"variety({', '.join(told)})"

    def __call__(self, scores: Tensor, vectors: Tensor) -> Tensor:
        """Return the scores, dealt out in the order of removal, in float64.

        Args:
            scores: `(units,)`, by the criterion.
            vectors: `(units, features)`.

        Raises:
            ValueError: No unit can be compared by this similarity.
        """
        scores = scores if self.before is None else self.before(scores, vectors)
        dealt = scores.detach().double().cpu().clone()
        if min(vectors.shape) > 1 and bool(dealt.isfinite().all()):  # the choice names what is not finite
            order = order_of_removal(scores, vectors, self.similarity)
            dealt[order] = torch.from_numpy(_told_apart(np.sort(dealt[order].numpy())))
        return dealt.to(scores.device)


def similarities(vectors: Tensor, similarity: str = "cosine") -> Tensor:
    """Return the similarities of all pairs of vectors, `(units, units)`, on the CPU.

    `cosine` is that of the angle, `abs_cosine` its magnitude, `pearson` the cosine of the vectors less their own means, and
    `euclidean` the distance with a minus sign, over the root mean square of the distances to the mean vector.

    >>> similarities(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -3.0]]), "cosine").tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Args:
        vectors: `(units, features)`.
        similarity: One of `SIMILARITIES`.

    Raises:
        ValueError: A vector has norm 0, or for `pearson` is constant, so that it has no direction.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    rows, has_direction = _comparable(_vectors(vectors), similarity)
    if similarity != "euclidean" and not bool(has_direction.all()):
        none = (~has_direction).nonzero().flatten().tolist()
        raise ValueError(_no_direction(similarity, f"number {none[0]} of {len(rows)}"))
    parts = [block[:, : len(rows)] for block in _blocks(rows, similarity, whole=True)]
    return torch.from_numpy(np.concatenate(parts))


def order_of_removal(scores: Tensor, vectors: Tensor, similarity: str = "cosine") -> Tensor:
    """Return the numbers of the units in the order in which they go, less those of zero norm, which are not compared.

    Again and again the most similar pair is looked up among those left, and the one of the lower score goes. Of pairs that are
    equally similar, the one with the lowest unit comes first; of equal scores the contents decide, and then the position.

    Whom a unit meets depends only on units of higher scores: it goes at the largest similarity to one of them that is still
    there at that level. So the levels are found from the highest score down, and each pair is looked at once.

    >>> order_of_removal(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])).tolist()
    [1, 2, 0]

    Args:
        scores: `(units,)`, finite.
        vectors: `(units, features)`.
        similarity: One of `SIMILARITIES`.

    Raises:
        ValueError: A vector is not finite, or no unit has a direction.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    vectors = _vectors(vectors)
    rows, has_direction = _comparable(vectors, similarity)
    compared = has_direction.nonzero().flatten().cpu().numpy()
    if not len(compared):
        raise ValueError(_no_direction(similarity, f"{len(rows)} of them"))
    ascending = compared[_ascending(scores.detach().double().cpu().numpy()[compared], vectors, compared)]
    levels = _levels(rows[torch.from_numpy(ascending[::-1].copy()).to(rows.device)], similarity)[::-1]
    return torch.from_numpy(ascending[np.argsort(-levels, kind="stable")])


def _vectors(vectors: Tensor) -> Tensor:
    """Return vectors on a device that computes in float64, after a check that they are numbers.

    Raises:
        ValueError: One of them is not finite.
    """
    vectors = vectors.detach() if vectors.device.type == "cuda" else vectors.detach().cpu()
    if not bool(vectors.isfinite().all()):
        raise ValueError("weights must be finite to be compared, got NaN or infinity")
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def _no_direction(similarity: str, which: str) -> str:
    kind, other = ("constant", "cosine") if similarity == "pearson" else ("of norm 0", "euclidean")
    more = "; take another similarity" if other == "cosine" else "; a unit of zeros is similar to nothing: leave it out"
    return f"weights must have a direction to be compared by {similarity}, got units {kind}: {which}{more}"


def _comparable(vectors: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Return rows whose inner products tell the similarity, and flags of the units that can be compared."""
    size = vectors.abs().amax(1, keepdim=True)
    has_weights = size.flatten() > 0
    if similarity == "euclidean":  # in float64, since a difference of squares loses half of the digits
        rows = vectors.double() / size.max().double().clamp(min=torch.finfo(torch.float64).tiny)
        rows = rows - rows[has_weights].mean(0) if bool(has_weights.any()) else rows
        spread = rows[has_weights].square().sum(1).mean().sqrt()
        return (rows / spread if bool(spread > 0) else rows), has_weights
    rows = vectors / torch.where(size > 0, size, 1)  # no square of it is too large or too small
    if similarity == "pearson":
        whole = rows.norm(dim=1, keepdim=True)
        rows = rows - rows.mean(1, keepdim=True)
        rows = torch.where(rows.norm(dim=1, keepdim=True) > 1e-6 * whole, rows, 0)
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1), norms.flatten() > 0


def _ascending(scores: Array, vectors: Tensor, compared: Array) -> Array:
    """Return the order of rising scores; of equal scores by content, then by position."""
    order = np.argsort(scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.inf)) + 1
    begin = 0
    for end in ends.tolist():
        if end - begin > 1:
            tied = order[begin:end]
            rows = vectors[torch.from_numpy(compared[tied]).to(vectors.device)].cpu().numpy() + 0.0  # no minus zeros
            order[begin:end] = tied[sorted(range(len(tied)), key=lambda i: rows[i].tobytes())]
        begin = end
    return order


def _levels(rows: Tensor, similarity: str) -> Array:
    """Return for each unit, in the order of falling scores, the similarity at which it goes; minus infinity for the first."""
    levels = np.full(len(rows), -np.inf)
    start = 0
    for block in _blocks(rows, similarity):
        block = np.round(block / STEP)
        earlier = block[:, :start]
        reached = np.where(levels[:start] <= earlier, earlier, -np.inf).max(1, initial=-np.inf)
        for i, own in enumerate(block[:, start:]):
            others = own[:i]
            levels[start + i] = max(reached[i], others[levels[start : start + i] <= others].max(initial=-np.inf))
        start += len(block)
    return levels


def _blocks(rows: Tensor, similarity: str, whole: bool = False) -> Iterator[Array]:
    """Yield the similarities of some rows after the others, to all of them or to those up to the last of these."""
    squares = rows.square().sum(1)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        last = len(rows) if whole else stop
        found = rows[start:stop] @ rows[:last].T
        if similarity == "euclidean":
            found = -(squares[start:stop, None] + squares[:last] - 2 * found).clamp(min=0).sqrt()
        elif similarity == "abs_cosine":
            found = found.abs()
        yield found.cpu().numpy()


def _told_apart(values: Array) -> Array:
    """Return rising values of which no two are equal, unchanged where they rise already."""
    if len(values) < 2 or np.diff(values).min() > 0:
        return values
    steps = np.arange(len(values)) * APART * (np.abs(values).max() or 1.0)
    return np.maximum.accumulate(values - steps) + steps
