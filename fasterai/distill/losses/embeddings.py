"""Catalogue of losses of embeddings, one vector `(B, D)` a sample, such as a search compares.

Where no layers are named they read the outputs of both networks; else the outputs of the layers, which are such vectors. To add
one: a frozen dataclass on `EmbeddingLoss`, its name in `__all__`, a row in the test and in `docs/distilled-embeddings.md`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.checks import check_choice, check_number
from fasterai.display import Brief
from fasterai.distill.losses.adapters import Projections, align
from fasterai.distill.losses.loss import Adapter, FeatureLoss

__all__ = ["EmbeddingCosine", "EmbeddingRegression", "Relational", "RelativeTriplet"]

#: Vectors shorter than this are left as they are where others are divided by their length.
SHORTEST = 1e-6
#: What variances are raised by under the square root, as torch does in a batch norm.
RAISE = 1e-5


# --- normalization ---------------------------------------------------------------------------------------------------


def batch_norm(x: Tensor) -> Tensor:
    """Return embeddings `(B, D)` with mean 0 and variance 1 over the batch in each dimension; of one sample all is 0."""
    spread, mean = torch.var_mean(x, 0, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(spread + RAISE)


def l2_norm(x: Tensor) -> Tensor:
    """Return embeddings `(B, D)` of length sqrt(D) each, so that their entries are as large as after a batch norm."""
    return unit(x) * math.sqrt(x.shape[1])


def unit(x: Tensor) -> Tensor:
    """Return vectors along the last dimension with length 1; those of length 0 stay."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > SHORTEST, length, 1.0)


NORMS: Mapping[str | None, Callable[[Tensor], Tensor]] = {"batch": batch_norm, "l2": l2_norm, None: lambda x: x}
KINDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


# --- distances -------------------------------------------------------------------------------------------------------


def distances(x: Tensor) -> Tensor:
    """Return the Euclidean distances `(B, B)` between embeddings; equal ones give no gradient."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def mean_triplet(far: Tensor, labels: Tensor, margin: float, weights: Tensor | None = None) -> Tensor:
    """Return the mean of `max(0, margin + far[a, p] - far[a, n])` over all triplets of a batch; 0 if there is none.

    Args:
        far: Distances `(B, B)`.
        labels: Numbers of the classes `(B,)`: `p` is another one of the class of `a`, and `n` of another class.
        margin: By how much `n` has to be farther away.
        weights: What a triplet counts, by its `a` and `n`, `(B, B)`; all the same if left out.
    """
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    counted = positive[:, :, None] & ~same[:, None, :]
    share = counted.to(far.dtype) if weights is None else counted * weights[:, None, :]
    terms = F.relu(margin + far[:, :, None] - far[:, None, :])
    total = share.sum()
    return (share * terms).sum() / torch.where(total > 0, total, 1.0)


# --- the losses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class EmbeddingLoss(FeatureLoss, Brief):
    """A loss of embeddings `(B, D)`, worked out in float32."""

    on_outputs: ClassVar[bool] = True
    same_size: ClassVar[bool] = True  # whether embeddings must have as many dimensions
    __repr__ = Brief.__repr__

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Any, adapter: Adapter | None) -> Tensor:
        """Return the sum over pairs."""
        total = torch.zeros((), device=student[0].device)
        with torch.autocast(student[0].device.type, enabled=False):
            for index, pair in enumerate(zip(student, teacher, strict=True)):
                check_embeddings(*pair)
                own, other = pair[0].float(), pair[1].float()
                if self.same_size:
                    own, other = align(index, own, other, adapter)
                total = total + self.of_embeddings(own, other, labels)
        return total

    @abstractmethod
    def of_embeddings(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        """Return the loss of embeddings `(B, D)` and `(B, E)` in float32, a scalar."""

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        """Make a linear layer for each pair whose dimensions differ; None for a loss that compares any.

        Raises:
            ValueError: They are no embeddings.
        """
        for own, other in zip(student, teacher, strict=True):
            check_embeddings(own, other)
        if not self.same_size:
            return None
        return Projections(student, teacher)


@dataclass(frozen=True, repr=False)
class EmbeddingRegression(EmbeddingLoss):
    """Regression of the teacher's embedding: the mean of `(N(s) - N(t))**2` over samples and dimensions.

    Plain regression is "surprisingly effective" for retrieval (Budnik and Avrithis 2020, arXiv 2006.16331, abstract). That a
    batch norm suits embeddings better than the l2 norm is what Seddati et al. 2023 (arXiv 2305.18988, abstract) find; this loss
    is ours, inspired by that. Neither norm has anything that trains: two factors of which one is the target's would agree on 0.

    Args:
        kind: `mse`, or `smooth_l1`, which grows in a straight line where an entry is off by more than 1.
        norm: N, of both embeddings: `batch`, mean 0 and variance 1 over the batch in each dimension; `l2`, length sqrt(D); or
            None.

    >>> s, t = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 1.0], [3.0, 6.0]])
    >>> EmbeddingRegression(norm=None)(s, t)  # (1 + 1 + 0 + 4) / 4
    tensor(1.5000)
    """

    kind: str = "mse"
    norm: str | None = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        check_norm(self.norm)

    def of_embeddings(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        """Return the mean over samples and dimensions."""
        norm = NORMS[self.norm]
        return KINDS[self.kind](norm(student), norm(teacher))


@dataclass(frozen=True, repr=False)
class EmbeddingCosine(EmbeddingLoss):
    """Directions of embeddings: the mean of `1 - cos(s, t)` over samples; half of a regression with the l2 norm.

    >>> EmbeddingCosine()(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]]))  # 1 - 3 / 5
    tensor(0.4000)
    """

    def of_embeddings(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        """Return the mean over samples."""
        return 1.0 - (unit(student) * unit(teacher)).sum(1).mean()


@dataclass(frozen=True, repr=False)
class Relational(EmbeddingLoss):
    """Relations between samples: their distances, and the angles that they span (RKD).

    Park et al. 2019, Relational Knowledge Distillation, arXiv 1904.05068; as the authors' code has it (`metric/loss.py`). With
    H the Huber loss, smooth L1: `distance * mean_ij H(d(s_i, s_j) / m_s, d(t_i, t_j) / m_t)`, where `m` is the mean of the
    distances d above 0, `+ angle * mean_ijk H(cos(s_j, s_k), cos(t_j, t_k))`, of the ways there from i; over all B**2 and B**3
    places. Dimensions may differ. Memory grows with B**3, unless `angle` is 0.

    Args:
        distance: The factor of the distances, at least 0.
        angle: The factor of the angles, at least 0. Both as in the authors' examples.

    Raises:
        ValueError: A factor is below 0, or both are 0.
    """

    distance: float = 1.0
    angle: float = 2.0
    same_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("distance", self.distance, at_least=0)
        check_number("angle", self.angle, at_least=0)
        if not self.distance and not self.angle:
            raise ValueError("distance or angle must be above 0, got 0 for both")

    def of_embeddings(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        """Return both parts, each times its factor."""
        total = student.new_zeros(())
        if self.distance:
            total = total + self.distance * F.smooth_l1_loss(relative(student), relative(teacher))
        if self.angle:
            total = total + self.angle * F.smooth_l1_loss(angles(student), angles(teacher))
        return total


@dataclass(frozen=True, repr=False)
class RelativeTriplet(EmbeddingLoss):
    """Triplets that count by how unlike the teacher finds the two that have to part: ours.

    Inspired by the relative triplet loss of Seddati et al. 2023 (arXiv 2305.18988, of which only the abstract was read): there
    the terms are weighted by the similarity of the anchors, by a formula that we have not seen. Here, over all triplets of the
    batch, `a` and `p` of one class and `n` of another:
    `sum w_an * max(0, margin + d(a, p) - d(a, n)) / sum w_an`, with `w_an = ((1 - cos(t_a, t_n)) / 2) ** power` of the
    teacher's embeddings, and d the root of the mean squared difference of the student's, normalized. Memory grows with B**3.

    Args:
        margin: By how much `n` has to be farther from `a` than `p` is, above 0.
        norm: Of the student's embedding: `batch`, `l2` or None, as for `EmbeddingRegression`.
        power: How strongly likeness counts, at least 0; 0 is the plain triplet loss, without the teacher.

    Raises:
        ValueError: A setting is out of range.
    """

    margin: float = 0.3
    norm: str | None = "batch"
    power: float = 1.0
    needs_labels: ClassVar[bool] = True
    is_distance: ClassVar[bool] = False
    same_size: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("margin", self.margin, above=0)
        check_norm(self.norm)
        check_number("power", self.power, at_least=0)

    def of_embeddings(self, student: Tensor, teacher: Tensor, labels: Any) -> Tensor:
        """Return the weighted mean over all triplets of the batch.

        Raises:
            ValueError: Labels are not one number a sample.
        """
        classes = check_classes(type(self).__name__, labels, len(student)).to(student.device)
        far = distances(NORMS[self.norm](student)) / math.sqrt(student.shape[1])
        other = unit(teacher)
        weights = ((1 - other @ other.T) / 2).clamp(0, 1) ** self.power
        return mean_triplet(far, classes, self.margin, weights)


def relative(x: Tensor) -> Tensor:
    """Return the distances `(B, B)` between embeddings, in units of the mean of those that are not 0."""
    far = distances(x)
    count = (far > 0).sum()
    return far / torch.where(count > 0, far.sum() / count.clamp(min=1), 1.0)


def angles(x: Tensor) -> Tensor:
    """Return the cosines `(B, B, B)` at each embedding between the ways to two others; 0 where one of them is itself."""
    ways = unit(x[None, :, :] - x[:, None, :])
    return ways @ ways.transpose(1, 2)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_embeddings(student: Tensor, teacher: Tensor) -> None:
    """Refuse what is not one vector a sample, of the same samples."""
    for whose, one in (("student", student), ("teacher", teacher)):
        if one.dim() != 2:
            raise ValueError(
                f"embeddings must be (B, D), got shape {tuple(one.shape)} of the {whose}; name a layer that returns one vector "
                "a sample, such as the pooling, flattened"
            )
    if len(student) != len(teacher):
        raise ValueError(f"embeddings must be of the same samples, got {len(student)} and {len(teacher)}")


def check_norm(norm: object) -> None:
    """Refuse an unknown normalization."""
    if norm is not None:
        check_choice("norm", norm, [str(name) for name in NORMS])


def check_classes(loss: str, labels: Any, count: int) -> Tensor:
    """Return the classes of samples as numbers `(B,)`, or refuse the labels."""
    if not isinstance(labels, Tensor) or labels.numel() != count or labels.is_floating_point():
        what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(
            f"labels must be the class of each of the {count} samples as a whole number for {loss}, got {what}; mixed samples "
            "have none"
        )
    return labels.reshape(-1)
