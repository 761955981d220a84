"""Best ternary values of groups of weights, `min ||w - a t||^2` over a >= 0 and t in {-1, 0, 1}^N.

With |w| in falling order and its prefix sums `P_k`, the best number of weights that are not zero is `k* = argmax P_k^2 / k`,
and `a = P_k* / k*`: for a given set of k the best scale is its mean magnitude, which leaves `sum w^2 - P_k^2 / k`, and of all
sets of k the k largest have the largest sum. The weights above `a / 2` are these k*. Ternary weights with a scale for each
small group are Mellempudi et al. 2017 (https://arxiv.org/abs/1705.01462), the scale for a given threshold is Li et al. 2016
(https://arxiv.org/abs/1605.04711); that prefix sums give the optimum of all is worked out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fasterai.core.checks import check_choice
from fasterai.misc.ternary.groups import Division

__all__ = ["RULES", "check_rule", "ternary_of"]

#: The ways to choose which weights of a group are not zero.
RULES = ("exact", "threshold")
#: The usual threshold, as a share of the mean magnitude (Li et al. 2016).
SHARE = 0.7
#: Groups up to this size are sorted by exchanges of whole tensors, larger ones row by row.
EXCHANGED = 8
#: Weights that are worked on at once: what is made of them stays in the cache.
BLOCK = 1 << 16


def check_rule(rule: object) -> str:
    """Return a rule if there is one of that name, or refuse it."""
    return check_choice("rule", rule, RULES)


@torch.no_grad()
def ternary_of(weight: Tensor, division: Division, rule: str = "exact", scale_dtype: torch.dtype | None = None) -> Tensor:
    """Return the ternary values of a weight, in its shape and dtype.

    Args:
        weight: The weight; it stays as it is. NaN in a group makes all of the group NaN.
        division: Its groups.
        rule: `exact` for the best values, `threshold` for those above 0.7 of the group's mean magnitude.
        scale_dtype: Round the scales to this type.
    """
    groups = division.split(weight)
    counts = division.counts(groups)
    result = torch.empty_like(groups, memory_format=torch.contiguous_format)
    rows = max(1, BLOCK // max(1, groups[:1].numel()))
    for start in range(0, len(groups) if groups.numel() else 0, rows):
        _put_ternary(groups[start : start + rows], counts, rule, scale_dtype, result[start : start + rows])
    return division.join(result, weight.shape)


def _put_ternary(groups: Tensor, counts: Tensor, rule: str, scale_dtype: torch.dtype | None, out: Tensor) -> None:
    place = 0 if groups.shape[2] <= EXCHANGED else -1  # the dimension that runs inside of a group
    wide = groups.movedim(2, place).contiguous()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    sizes = wide.abs()
    if rule == "threshold":
        scale, least = _by_threshold(sizes, counts, place)
    else:
        scale = _exact_small(sizes) if place == 0 else _exact_large(sizes)
        least = scale / 2
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(scale.dtype)
    # A NaN stays one, so that a training that has failed says so. Adding 0 leaves no negative zeros.
    kept = _above(sizes, least).mul_(scale)
    out.movedim(2, place).copy_(torch.copysign(kept, wide, out=kept).add_(0.0))


def _above(sizes: Tensor, least: Tensor) -> Tensor:
    """Return 1.0 where sizes are above a limit, else 0.0: a tenth of the time of `where` with a mask."""
    return torch.gt(sizes, least, out=torch.empty_like(sizes))


def _by_threshold(sizes: Tensor, counts: Tensor, place: int) -> tuple[Tensor, Tensor]:
    counts = counts.to(sizes.dtype)
    least = SHARE * sizes.sum(place, keepdim=True) / (counts if place == 0 else counts.unsqueeze(-1))
    kept = _above(sizes, least)
    return (sizes * kept).sum(place, keepdim=True) / kept.sum(place, keepdim=True).clamp_min(1), least


def _exact_small(sizes: Tensor) -> Tensor:
    """Return the best scales of small groups `(N, ...)`, which are sorted side by side."""
    ranked = list(sizes.unbind(0))
    for i, j in _exchanges(len(ranked)):
        ranked[i], ranked[j] = torch.maximum(ranked[i], ranked[j]), torch.minimum(ranked[i], ranked[j])
    total = best = scale = ranked[0]
    for k, size in enumerate(ranked[1:], 2):
        total = total + size
        gain = total * k**-0.5  # the root of P^2 / k, which neither overflows nor underflows
        scale = torch.lerp(scale, total / k, _above(gain, best))  # exact at both ends
        best = torch.maximum(best, gain)
    return scale


def _exact_large(sizes: Tensor) -> Tensor:
    """Return the best scales `(..., 1)` of groups of any size `(..., N)`."""
    if sizes.device.type == "cpu":  # numpy's sort of values alone: a tenth of the time of torch's, which has positions too
        ranked = sizes.neg()
        ranked.numpy().sort(axis=-1)
        ranked.neg_()
    else:
        ranked = sizes.sort(-1, descending=True).values
    totals = ranked.cumsum(-1)
    counts = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device, dtype=ranked.dtype)
    k = (totals * counts.rsqrt()).argmax(-1, keepdim=True)
    return totals.gather(-1, k) / (k + 1)


@cache
def _exchanges(n: int) -> tuple[tuple[int, int], ...]:
    """Return the comparisons of Batcher's odd-even merge sort: (place of the larger one, place of the smaller one)."""
    return tuple(_batcher(n))


def _batcher(n: int) -> Iterator[tuple[int, int]]:
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, min(j + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        yield i, i + k
            k //= 2
        p *= 2
