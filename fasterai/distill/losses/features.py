"""The catalogue of losses of features: how far the outputs of a student's layers are from those of a teacher's.

Over 300 lines, since it is a list. To add one: a frozen dataclass here, its name in `__all__`, a row in
`tests/distill/test_features.py` and a section in `docs/distilled-features.md`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.checks import check_count, check_fraction, check_number
from fasterai.distill.losses.adapters import Fusions, Generators, Heads, Projections, align
from fasterai.distill.losses.loss import Adapter, FeatureLoss
from fasterai.distill.losses.shapes import UnlikeShapesError, as_maps, as_one_map, attention_of, resize
from fasterai.distill.losses.squares import mean_square

__all__ = ["MGD", "ActivationBoundaries", "Attention", "Contrastive", "FitNet", "ReviewKD", "Similarity"]

PYRAMID = (4, 2, 1)  # sizes to which ReviewKD averages maps
MAKE = "pass adapter=loss.adapter(student, teacher)"


@dataclass(frozen=True)
class MapLoss(FeatureLoss):
    """A loss that compares features as maps: images `(B, C, *S)`, tokens `(B, T, C)`, vectors `(B, C)`.

    Args:
        channels_first: Whether three dimensions are a map `(B, C, L)`, such as that of a 1-D convolution, and no tokens.

    Attributes:
        takes_vectors: Whether features without places can be compared.
    """

    takes_vectors: ClassVar[bool] = True

    _: KW_ONLY
    channels_first: bool = False

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the sum over pairs."""
        pairs = enumerate(zip(*self.maps(student, teacher), strict=True))
        return torch.stack([self.of_maps(i, own, other, adapter) for i, (own, other) in pairs]).sum()

    @abstractmethod
    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the loss of one pair of maps in float32, with as many dimensions, of any channels and sizes."""

    def maps(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of all pairs as maps."""
        check_pairs(student, teacher)
        found = [
            as_maps(own, other, channels_first=self.channels_first, pair=i)
            for i, (own, other) in enumerate(zip(student, teacher, strict=True))
        ]
        for i, (own, other) in enumerate(found):
            if own.dim() < 3 and not self.takes_vectors:
                raise UnlikeShapesError(i, own.shape, other.shape, "name layers whose outputs have places, not vectors")
        return [own for own, _ in found], [other for _, other in found]

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Check that features of these shapes can be compared; None, since nothing trains."""
        self.maps(student, teacher)
        return None


@dataclass(frozen=True)
class FitNet(MapLoss):
    """Mean squared difference of features, `mean((r(s) - t)^2)`, where `r` projects the student's channels if they differ.

    Source: Romero et al., "FitNets", 2015, https://arxiv.org/abs/1412.6550. Zero where both are equal.
    """

    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the mean squared difference."""
        own, other = align(index, student, teacher, adapter)
        if own is student:  # the graph keeps it anyway
            return F.mse_loss(own, other)
        return mean_square(own.sub_(other))

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make projections for the pairs whose channels differ; without any, it follows channels of the student that go."""
        return Projections(*self.maps(student, teacher))


@dataclass(frozen=True)
class Attention(MapLoss):
    """Mean squared difference of attention maps, `mean((q(s) - q(t))^2)`, with `q(a) = normalize(sum over channels of |a|^p)`.

    Channels need not be as many. The student's map is averaged or interpolated to the size of the teacher's. The sizes of
    features do not matter: a positive factor leaves the loss unchanged. Zero where both are equal.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017 (https://arxiv.org/abs/1612.03928), as in
    the authors' code: squared, and the mean over samples and places.

    Args:
        p: The power, at least 1.
    """

    takes_vectors: ClassVar[bool] = False

    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the power."""
        super().__post_init__()
        check_number("p", self.p, at_least=1)

    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the mean squared difference of the attention maps."""
        own = resize(attention_of(student, self.p), teacher.shape[2:])
        return F.mse_loss(F.normalize(own.flatten(1)), F.normalize(attention_of(teacher, self.p).flatten(1)))


@dataclass(frozen=True)
class Similarity(FeatureLoss):
    """Mean squared difference of what is alike in a batch, `sum((g(s) - g(t))^2) / B^2`.

    `g(a)` are the products of the samples' features with each other, `a a^T` of `(B, -1)`, each row divided by its length.
    Features may have any shapes, and need no adapter: turning all channels by a rotation leaves the loss unchanged. Zero where
    both are equal.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019 (https://arxiv.org/abs/1907.09682).

    Args:
        p: The power by which the length of a row is measured, at least 1; the paper's is 2.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the power."""
        super().__post_init__()
        check_number("p", self.p, at_least=1)

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the sum over pairs."""
        check_pairs(student, teacher)
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(_alike(own, self.p), _alike(other, self.p)) for own, other in pairs]).sum()

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Check that features are of the same samples; None, since nothing trains."""
        check_pairs(student, teacher)
        return None


@dataclass(frozen=True)
class ActivationBoundaries(MapLoss):
    """Mean squared distance to the right side of the teacher's activation boundaries, by a margin.

    Features are those before the activation. Where the teacher's is positive the student's has to be `m` or more, elsewhere
    `-m` or less: `mean(max(0, m - s)^2)` and `mean(max(0, m + s)^2)`. Zero where all are, not where both are equal.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", 2019
    (https://arxiv.org/abs/1811.03233); the mean is ours, as are projections where channels differ.

    Args:
        m: The margin, at least 0.
    """

    is_distance: ClassVar[bool] = False

    m: float = 2.0

    def __post_init__(self) -> None:
        """Check the margin."""
        super().__post_init__()
        check_number("m", self.m, at_least=0)

    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the mean squared distance."""
        student, teacher = align(index, student, teacher, adapter)
        side = (teacher > 0).to(torch.int8).mul_(2).sub_(1)  # a byte each is kept
        return mean_square(F.relu(self.m - student * side, inplace=True))

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make projections for the pairs whose channels differ; without any, it follows channels of the student that go."""
        return Projections(*self.maps(student, teacher))


@dataclass(frozen=True)
class Contrastive(FeatureLoss):
    """Contrast within a batch: each sample's feature has to be nearer to the teacher's of it than to those of other samples.

    `z` and `w` are the features' means over places, through a linear layer each, of length 1. The loss is the cross-entropy of
    `z w^T / temperature`, whose right class is the sample itself, from both sides: rows and columns. Where labels are classes,
    other samples of a sample's class are left out.

    Ours, inspired by Tian et al., "Contrastive Representation Distillation", 2020 (https://arxiv.org/abs/1910.10699): the
    two projections and the temperature are from there. It has no memory of 16384 negatives: those of the batch are all, of
    each process by itself.

    Args:
        dim: The number of dimensions in which features are compared.
        temperature: The temperature, above 0.
        channels_first: Whether three dimensions are a map `(B, C, L)` and no tokens.
    """

    is_distance: ClassVar[bool] = False

    dim: int = 128
    temperature: float = 0.07
    _: KW_ONLY
    channels_first: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_count("dim", self.dim)
        check_number("temperature", self.temperature, above=0)

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the sum over pairs."""
        check_pairs(student, teacher)
        if not isinstance(adapter, Heads):
            raise ValueError(f"adapter must be that of Contrastive, which always has one, got {adapter!r}; {MAKE}")
        pairs = enumerate(zip(self._vectors(student), self._vectors(teacher), strict=True))
        vectors = [adapter(i, own, other) for i, (own, other) in pairs]
        same = _of_one_class(labels, student[0])
        return torch.stack([self._contrast(own, other, same) for own, other in vectors]).sum()

    def _vectors(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [as_one_map(x, self.channels_first).flatten(2).mean(2) if x.dim() > 2 else x.float() for x in features]

    def _contrast(self, own: Tensor, other: Tensor, same: Tensor | None) -> Tensor:
        near = own @ other.T / self.temperature
        if same is not None:
            near = near.masked_fill(same, -torch.inf)
        right = torch.arange(len(near), device=near.device)
        return (F.cross_entropy(near, right) + F.cross_entropy(near.T, right)) / 2

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make the two linear layers of each pair."""
        check_pairs(student, teacher)
        return Heads(self._vectors(student), self._vectors(teacher), self.dim)


@dataclass(frozen=True)
class ReviewKD(MapLoss):
    """Review of what was learned: each of the teacher's maps is held against the student's own and all deeper ones, fused.

    Pairs are given from the first layer to the last. Going back from the last, attention fuses each map of the student with
    those behind it (ABF), and a convolution of 3 brings it to the teacher's shape. Its distance is the mean squared difference
    of the maps, and of their averages over grids of 4, 2 and 1, each with half the share of the one before, divided by the sum
    of the shares (HCL); grids that are not smaller than the map are left out.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", 2021 (https://arxiv.org/abs/2104.09044), as in the
    authors' code; other numbers of dimensions than two, and norms that read the batch alone, are ours.

    Args:
        middle: The number of channels in which maps are fused; None for as many as the last one has, 512 at most.
    """

    is_distance: ClassVar[bool] = False

    middle: int | None = None

    def __post_init__(self) -> None:
        """Check the number of channels."""
        super().__post_init__()
        if self.middle is not None:
            check_count("middle", self.middle)

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Return the sum over pairs, which are fused with each other."""
        own, other = self.maps(student, teacher)
        if not isinstance(adapter, Fusions):
            raise ValueError(f"adapter must be that of ReviewKD, which always has one, got {adapter!r}; {MAKE}")
        fused = adapter(own, other)
        return torch.stack([self.of_maps(i, a, b, None) for i, (a, b) in enumerate(zip(fused, other, strict=True))]).sum()

    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the hierarchical distance (HCL) of two maps of one shape."""
        apart = student - teacher  # the means of a difference are the differences of the means
        found, share, whole = mean_square(apart), 1.0, 1.0
        for size in PYRAMID:
            if size < max(student.shape[2:]):
                smaller = [min(size, n) for n in student.shape[2:]]
                share /= 2
                found = found + share * mean_square(resize(apart, smaller))
                whole += share
        return found / whole

    def maps(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of all pairs as maps of as many dimensions; vectors are maps of one place."""
        own, other = super().maps(student, teacher)
        most = max(1, *(x.dim() - 2 for x in own))
        one_place = (1,) * most
        own, other = ([x.reshape(*x.shape, *one_place) if x.dim() == 2 else x for x in side] for side in (own, other))
        for i, (a, b) in enumerate(zip(own, other, strict=True)):
            if a.dim() - 2 != most:
                raise UnlikeShapesError(
                    i, a.shape, b.shape, f"ReviewKD fuses all pairs, and others have {most} dimensions of places"
                )
        return own, other

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make the fusions of all pairs."""
        own, other = self.maps(student, teacher)
        return Fusions(own, other, min(512, own[-1].shape[1]) if self.middle is None else self.middle)


@dataclass(frozen=True)
class MGD(MapLoss):
    """Masked generative distillation: of the student's map, some channels of which are hidden, the teacher's is generated.

    `mean((g(mask * r(s)) - t)^2)`: `r` projects the student's channels if they differ, the mask sets each channel of each
    sample to zero with the probability `ratio`, and `g` is a convolution of 3, a ReLU and a convolution of 3.

    Source: Yang et al., "Masked Generative Distillation", 2022 (https://arxiv.org/abs/2205.01529), with channels hidden as
    in the authors' code for classification. There it is the sum of a sample times 7e-5; this is the mean, so that `scale`
    means the same for all sizes: 7e-5 is `scale=1.76` for maps of 512 x 7 x 7.

    Args:
        ratio: The probability that a channel is hidden, in [0, 1].
    """

    is_distance: ClassVar[bool] = False
    takes_vectors: ClassVar[bool] = False

    ratio: float = 0.15

    def __post_init__(self) -> None:
        """Check the ratio."""
        super().__post_init__()
        check_fraction("ratio", self.ratio)

    def of_maps(self, index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
        """Return the mean squared difference between what is generated and the teacher's map."""
        if not isinstance(adapter, Generators):
            raise ValueError(f"adapter must be that of MGD, which always has one, got {adapter!r}; {MAKE}")
        return mean_square(adapter(index, resize(student, teacher.shape[2:]), self.ratio).sub_(teacher))

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make the generators of all pairs."""
        return Generators(*self.maps(student, teacher))


def check_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Refuse features that are none, or of unequal number.

    Raises:
        ValueError: They are.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            "features must be as many of the student as of the teacher, and at least one, "
            f"got {len(student)} and {len(teacher)}"
        )
    for i, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if min(own.dim(), other.dim()) < 2 or len(own) != len(other):
            raise UnlikeShapesError(i, own.shape, other.shape, "features are (B, C, ...), of the same B samples")


def _alike(feature: Tensor, p: float) -> Tensor:
    rows = feature.flatten(1).float()
    return F.normalize(rows @ rows.T, p)


def _of_one_class(labels: Tensor | None, like: Tensor) -> Tensor | None:
    """Return which other samples are of a sample's class, `(B, B)`; None where labels are no classes."""
    if not isinstance(labels, Tensor) or labels.shape != like.shape[:1] or labels.is_floating_point():
        return None
    labels = labels.to(like.device)
    return (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=like.device)
