"""First looks at pools of coupled channels: what makes several steps choose as one does, where nothing is trained in between.

Two things change a channel's score though its weights do not. The mean that a group's scores are divided by rises with every
channel that goes, since the low ones go. And a channel loses the weights that lead to those of other groups. So the scale stays
that of the first look, and of a channel's score counts how much training has changed it since the last step:

    score = score at the last step x (score of its weights now / score of its weights right after that step)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fasterai.core.saved import Check, check_parts, finite_tensors, mapping_of

__all__ = ["Look", "check_looks", "look_at"]

#: Share of its score below which what others have left of a channel tells nothing by factors: it may grow by any.
LEAST = 0.01


@dataclass(frozen=True)
class Look:
    """The memory of a pool.

    Attributes:
        scale: The mean score of its first channels.
        mean: The mean score of the channels that the last step has left.
        base: `(channels,)`: their scores at the last step; empty where scores are not of the weights alone.
        then: `(channels,)`: what their weights alone scored right after it; empty likewise.
    """

    scale: Tensor
    mean: Tensor
    base: Tensor
    then: Tensor

    def carried(self, scores: Tensor) -> Tensor:
        """Return scores with what channels have lost with others given back; unchanged where that is not known."""
        if self.base.shape != scores.shape:
            return scores
        base, then = self.base.to(scores), self.then.to(scores)
        has_factor = (base * then > 0) & (then.abs() > LEAST * base.abs())
        found = torch.where(has_factor, base * (scores / then), base + (scores - then))
        return torch.where(base == then, scores, found)

    def scale_of(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        """Return what scores are divided by.

        It is the scale of the first look, as long as nothing is trained. Training changes it, and so do other data, where
        scores are not of the weights alone: it is what the mean of the first channels would be, as far as those left tell.
        """
        scale = self.scale.to(scores)
        moved = scale * (mean_of(scores, keep) / self.mean.to(scores))
        if self.base.shape != scores.shape:
            return moved
        return torch.where((scores == self.base.to(scores)).all(), scale, moved)  # equal bits, whatever a sum rounds to

    @classmethod
    def after(cls, scores: Tensor, scale: Tensor, keep: Tensor | None, then: Tensor | None) -> Look:
        """Return the look of a step.

        Args:
            scores: `(channels,)`: what it was chosen by.
            scale: What they were divided by.
            keep: The decisions; None if all channels that are there are kept.
            then: `(channels,)`: what their weights alone score after it; None if scores are not of the weights alone.
        """
        mean = mean_of(scores, keep)
        if then is None:
            return cls(scale, mean, scores[:0], scores[:0])
        return cls(scale, mean, scores if keep is None else torch.where(keep, scores, then), then)

    def without_channels(self) -> Look:
        """Return the scale alone, for channels that were taken out by others."""
        return replace(self, base=self.base[:0], then=self.then[:0])

    def to_dict(self) -> dict[str, Tensor]:
        """Return copies of its tensors."""
        return {f.name: getattr(self, f.name).clone() for f in fields(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Tensor]) -> Look:
        """Return a look of copies of saved tensors."""
        return cls(**{f.name: saved[f.name].clone() for f in fields(cls)})


def look_at(scores: Tensor, keep: Tensor | None, look: Look | None) -> tuple[Tensor, Tensor]:
    """Return the scores to choose by, and what they are divided by where pools compete; without a look, by their own mean."""
    if look is None:
        return scores, mean_of(scores, keep)
    carried = look.carried(scores)
    return carried, look.scale_of(carried, keep)


def mean_of(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Return the mean magnitude of the scores of units that are kept."""
    kept = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep
    return (scores.abs() * kept).sum() / kept.sum()


def check_looks(what: str, value: Any) -> None:
    """Refuse what are no saved looks, by pool's name.

    Raises:
        TypeError: They are no dicts of tensors.
        ValueError: One lacks a part, or is not finite.
    """
    mapping_of(_check_look)(what, value)


def _check_look(what: str, value: Any) -> None:
    finite_tensors(what, value)
    parts: Mapping[str, Check] = {f.name: _anything for f in fields(Look)}
    check_parts(value, "Look", parts)
    if value["base"].shape != value["then"].shape:
        raise ValueError(f"{what} must hold as many scores then as before, got {tuple(value['then'].shape)}")
    if value["scale"].numel() != 1 or value["mean"].numel() != 1:
        raise ValueError(f"{what} must hold one scale and one mean, got {value['scale'].numel()} and {value['mean'].numel()}")


def _anything(what: str, value: Any) -> None:
    """Let everything in: the tensors are checked together."""
