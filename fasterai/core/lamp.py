"""Layer-adaptive magnitudes: `s_u^2 / sum of s_v^2 over the v of the target that score at least s_u`.

Lee et al. 2021 (arXiv 2010.07611), equation 2. They rise with the scores, so a choice by them takes the lowest of each target;
only how many depends on the others. On a CPU scores are therefore sorted without their places, which takes a tenth of the time,
and what goes is found by count:

    scores of a target   3 1 2        sorted 1 2 3, squares 1 4 9, sums from there up 14 13 9
    LAMP, sorted         1/14 4/13 1  if two of them go in the choice over all targets, the two lowest scores of this target do
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasterai.core.scores import Array, Scores, TensorScores

__all__ = ["lamp_scores", "sorted_lamp"]


def lamp_scores(scores: Tensor) -> Tensor:
    """Return the LAMP scores of one target, same shape, in float64; equals score the same."""
    flat = scores.reshape(-1).double()
    if not flat.numel():
        return flat.view(scores.shape)
    squares = (flat - flat.min().clamp(max=0)).square()
    ordered, order = torch.sort(squares)
    # NaN has no place in the order: it stays NaN, which the choice then refuses by the target's name.
    place = torch.searchsorted(ordered, ordered).clamp(max=flat.numel() - 1)
    remaining = ordered.flip(0).cumsum(0).flip(0)[place]
    adapted = torch.where(ordered == 0, ordered, ordered / remaining)
    return torch.empty_like(flat).scatter_(0, order, adapted).view(scores.shape)


def sorted_lamp(s: Scores) -> TensorScores | None:
    """Return the LAMP scores of one target in rising order, what is pruned so far first; None where that says too little.

    So on other devices, of negative scores, which are shifted, and where pruned units score anything but 0: they have places of
    their own in the order then.
    """
    if s.device.type != "cpu" or not s.count:
        return None
    values = s.tensor().detach().reshape(-1).numpy()
    ordered = np.sort(values).astype(np.float64)
    if ordered[0] < 0 or (s.keep is not None and ((values != 0) & ~s.keep.reshape(-1).numpy()).any()):
        return None
    keep = None if s.keep is None else torch.arange(s.count) >= s.pruned
    np.square(ordered, out=ordered)
    zeros = int(np.searchsorted(ordered, 0.0, side="right"))
    _adapt_(ordered[zeros:])
    return TensorScores(s.name, torch.from_numpy(ordered), keep)


def _adapt_(squares: Array) -> None:
    """Divide rising squares by the sum of those that are at least as high; of equals each by that of the first."""
    if squares.size:
        firsts = np.flatnonzero(np.concatenate([[True], squares[1:] != squares[:-1]]))
        remaining = np.cumsum(squares[::-1])[::-1]
        adapted = squares[firsts] / remaining[firsts]
        squares[:] = np.repeat(adapted, np.diff(firsts, append=squares.size))
