"""Reasons why dimensions of parameters cannot shrink, summed up, and the share of the parameters that each keeps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasterai.graph.channels import ChannelGraph

__all__ = ["kept_shares", "plain_reason", "shares_in_words", "summed_reasons"]

MOST_REASONS = 6
KERNEL = "kernel size"
IN_CODE = "a size is written into its code"
AS_PART = "it goes only with what stays"


def summed_reasons(pinned: Sequence[str]) -> list[str]:
    """List the reasons why dimensions can never shrink, the most frequent first, without the operations' numbers."""
    counts = Counter(map(_unnumbered, pinned))
    lines = [f"  {count} because {why}" for why, count in counts.most_common(MOST_REASONS)]
    rest = len(pinned) - sum(count for _, count in counts.most_common(MOST_REASONS))
    lines += [f"  {rest} for other reasons"] if rest else []
    return [f"{len(pinned)} dimensions of parameters cannot shrink, kernel sizes aside:", *lines] if lines else []


def _unnumbered(why: str) -> str:
    return re.sub(r"(?<=[a-z])_\d+\b", "", why)


def plain_reason(why: str) -> str:
    """Return a reason without what belongs to one place: numbers of operations, channels and messages.

    >>> plain_reason("1 of its 5 silent channels stay (1): the outputs would move by 2.0e-02 of their scale: it is not silent")
    'it is not silent'
    >>> plain_reason("layer_norm_4 averages over it")
    'layer_norm averages over it'
    >>> plain_reason("the model fails without them: RuntimeError: shape '[2, 8]' is invalid for input of size 12")
    'a size is written into its code'
    """
    if "the model fails without them" in why:
        return IN_CODE
    if "it is not silent" in why:
        return "it is not silent"
    return _unnumbered(why).split(" (")[0]


def kept_shares(
    shapes: Mapping[str, tuple[int, ...]],
    graph: ChannelGraph,
    stayed: Mapping[str, tuple[float, str]] | None = None,
    otherwise: str = AS_PART,
) -> dict[str, float]:
    """Return each reason's share of the parameters that cannot shrink for it, the largest first.

    A weight's numbers count in equal parts for each of its dimensions, kernel sizes aside: half of a matrix for its rows, half
    for its columns.

    Args:
        shapes: Parameter -> its shape.
        graph: The channel graph of the model.
        stayed: Group's name -> the share of it, in [0, 1], that could not be removed, and why.
        otherwise: The reason for what is in no group and has no reason of its own.
    """
    total = sum(_size(shape) for shape in shapes.values())
    stayed = stayed or {}
    shares: defaultdict[str, float] = defaultdict(float)
    in_groups: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in graph.groups:
        for place, indices in group.places.items():
            in_groups.setdefault(place, []).append((group.name, indices.size))
    for name, shape in shapes.items():
        dims = [d for d, n in enumerate(shape) if n > 1 and not graph.pinned.get((name, d), "").endswith(KERNEL)]
        for d in dims:
            part = _size(shape) / total / len(dims)
            free = 0.0
            for group_name, count in in_groups.get((name, d), ()):
                free += count / shape[d]
                share, why = stayed.get(group_name, (0.0, ""))
                shares[plain_reason(why)] += part * share * count / shape[d]
            why = graph.pinned.get((name, d)) or graph.partly.get((name, d)) or otherwise
            shares[plain_reason(why)] += part * max(0.0, 1 - free)
    return {why: share for why, share in sorted(shares.items(), key=lambda one: -one[1]) if share > 1e-9}


def _size(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def shares_in_words(shares: Mapping[str, float], most: int = 3) -> str:
    """Write the largest shares as text.

    >>> shares_in_words({"layer_norm averages over it": 0.5, "it is an output of the network": 0.04})
    '50 % because layer_norm averages over it, 4 % because it is an output of the network'
    """
    return ", ".join(f"{share:.0%} because {why}".replace("%", " %") for why, share in list(shares.items())[:most])
