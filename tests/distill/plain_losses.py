"""Losses that are simple enough to be read off."""

from dataclasses import dataclass

from fasterai.distill.losses.loss import FeatureLoss


@dataclass(frozen=True)
class Squares(FeatureLoss):
    """The mean square of the differences of features of equal shapes."""

    def of_pairs(self, student, teacher, labels, adapter):
        return sum((a - b).square().mean() for a, b in zip(student, teacher, strict=True))
