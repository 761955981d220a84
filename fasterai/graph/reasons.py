"""Reasons why dimensions of parameters cannot shrink, summed up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["summed_reasons"]

MOST_REASONS = 6


def summed_reasons(pinned: Sequence[str]) -> list[str]:
    """List the reasons why dimensions can never shrink, the most frequent first, without the operations' numbers."""
    counts = Counter(re.sub(r"(?<=[a-z])_\d+\b", "", why) for why in pinned)
    lines = [f"  {count} because {why}" for why, count in counts.most_common(MOST_REASONS)]
    rest = len(pinned) - sum(count for _, count in counts.most_common(MOST_REASONS))
    lines += [f"  {rest} for other reasons"] if rest else []
    return [f"{len(pinned)} dimensions of parameters cannot shrink, kernel sizes aside:", *lines] if lines else []
