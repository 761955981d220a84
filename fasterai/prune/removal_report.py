"""Report of a removal as data, table and picture: the removed channels, those that had to stay and why, and the gain."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.layers import LayerComparison
from fasterai.display import counted, short, short_bytes, short_time, table
from fasterai.prune.measure import DENSE, SMALL, Measurement
from fasterai.prune.removal_picture import GroupBar, ShareBar, draw
from fasterai.prune.surgery.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Removal"]

MOST_LINES, MOST_REASONS = 24, 6
AS_DENSE = "as dense"
#: Label, field of `Cost`, and how it is written.
FIGURES = (("parameters", "parameters", short), ("MACs", "macs", short), ("file", "file_bytes", short_bytes))


@dataclass(frozen=True)
class Removal:
    """Result of a removal: removed channels, kept ones with reasons, and the gain; `print` shows it, `plot` draws it.

    Attributes:
        plan: The plan that was carried out; it can be replayed on a fresh model or a copy (`apply_plan_`).
        removed: Group's name -> (channels before, channels after), for groups that lost some.
        refused: Group's name -> why silent channels of it stayed.
        pinned: Name of a parameter's dimension -> why none of it may go.
        difference: The largest change of an output, as a share of the outputs' scale.
        parameters: (before, after).
        stayed: Group's name -> its silent channels that stayed.
        groups: Group's name -> (channels before, channels after), for all that could lose some.
        exact: True where the outputs had to stay the same.
        measurement: Size, MACs and time of the dense and the small model, or why there are none.
    """

    plan: Plan
    removed: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str]
    pinned: Mapping[tuple[str, int], str]
    difference: float
    parameters: tuple[int, int]
    stayed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    exact: bool = True
    measurement: Measurement = field(default_factory=Measurement)

    @property
    def comparison(self) -> Comparison | None:
        """Figures of the dense and the small model; None if they were not measured."""
        return self.measurement.comparison

    def layers(self) -> LayerComparison:
        """Compare the dense and the small model layer by layer.

        Raises:
            ValueError: They were not measured.
        """
        if self.comparison is None:
            raise ValueError(f"layers must have figures to show, got none: {self.measurement.why_not}")
        return self.comparison.layers()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; the plan has a `to_dict` of its own."""
        return {
            "removed": {name: list(counts) for name, counts in self.removed.items()},
            "refused": dict(self.refused),
            "stayed": {name: list(channels) for name, channels in self.stayed.items()},
            "pinned": [[name, d, why] for (name, d), why in self.pinned.items()],
            "groups": {name: list(counts) for name, counts in self.groups.items()},
            "exact": self.exact,
            "difference": self.difference,
            "parameters": list(self.parameters),
            "inputs": self.measurement.inputs,
            "measured": None if self.comparison is None else self.comparison.to_dict(),
            "not_measured": self.measurement.why_not,
        }

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            *_listed([f"{name}: {n:,} -> {m:,} channels" for name, (n, m) in self.removed.items()], "groups lost channels")
        ]
        stays = [f"{name}: {'' if name in self.removed else 'stays, '}{why}" for name, why in self.refused.items()]
        lines += _listed(stays, "groups have to keep silent channels")
        lines += _reasons([why for why in self.pinned.values() if not why.endswith("kernel size")])
        if not self.removed:
            lines.append("nothing was removed: " + ("see above" if self.refused else "no removable channel is silent"))
        lines.append(f"parameters: {before:,} -> {after:,} ({after / max(1, before):.1%})")
        lines.append(self._moved())
        return "\n".join([*lines, *self._figures()])

    def _moved(self) -> str:
        moved = f"outputs moved by at most {self.difference:.1e} of their scale"
        return moved if self.exact else f"{moved}, as was allowed (exact=False)"

    def _figures(self) -> Iterator[str]:
        """Write the table of figures, and the conditions under which they were measured."""
        comparison = self.comparison
        if comparison is None:
            yield from [f"not measured: {self.measurement.why_not}"] if self.removed else []
            return
        dense = comparison.costs[DENSE]
        yield ""
        yield from _table(comparison)
        yield (
            f"masked: {1 - dense.nonzero / max(1, dense.parameters):.1%} of the parameters are zero; a mask changes no shape, "
            f"so that all else is as dense, and was not measured again"
        )
        yield from _timing(comparison, self.measurement.inputs)
        if uncounted := dict.fromkeys(op for one in comparison.costs.values() for op in one.uncounted):
            yield f"not counted, without a rule: {', '.join(uncounted)}"

    def plot(self) -> Figure:
        """Draw the kept share of size, MACs and time, and the kept channels of each group."""
        groups = [
            GroupBar(name, before, after, len(self.stayed.get(name, ())), name in self.refused)
            for name, (before, after) in self.groups.items()
        ]
        return draw(self._shares(), self._caption(), groups)

    def _shares(self) -> list[ShareBar]:
        if self.comparison is not None:
            return list(_rows(self.comparison))
        before, after = self.parameters
        return [ShareBar("parameters", after / max(1, before), short(before), short(after))]

    def _caption(self) -> str:
        lines = [f"outputs moved by at most {self.difference:.0e} of their scale"]
        if self.comparison is not None and self.comparison.latency is not None:
            one = self.comparison.latency.models[SMALL]
            lines.append(f"time on {self.measurement.inputs}, {one.device}, {counted(one.threads, 'thread')},")
            lines.append(f"{one.timings[0].blocks} turns; the line is the middle half")
            lines.append("a mask alone leaves all of it as dense")
        return "\n".join(lines)


def _rows(comparison: Comparison) -> Iterator[ShareBar]:
    dense, small = comparison.costs[DENSE], comparison.costs[SMALL]
    for label, name, write in FIGURES:
        yield ShareBar(label, comparison.share(SMALL, name), write(getattr(dense, name)), write(getattr(small, name)))
    if comparison.latency is not None:
        times = [short_time(comparison.latency.models[name].timings[0].median) for name in (DENSE, SMALL)]
        low, high = comparison.latency.quartiles[SMALL][0]
        yield ShareBar("time", 1 / comparison.latency.ratios[SMALL][0], times[0], times[1], (1 / high, 1 / low))


def _table(comparison: Comparison) -> list[str]:
    """Lay out the figures of the dense, the masked and the small model."""
    body = [[label, dense, AS_DENSE, f"{small} ({share:.1%})"] for label, share, dense, small, _ in _rows(comparison)]
    nonzero = [short(comparison.costs[name].nonzero) for name in (DENSE, SMALL)]
    body.insert(1, ["not zero", "", *nonzero])
    return table(["", DENSE, "masked", SMALL], body)


def _timing(comparison: Comparison, inputs: str) -> Iterator[str]:
    """Describe how the times were measured, and how much they spread."""
    if comparison.latency is None:
        return
    one, (first, third) = comparison.latency.models[SMALL], comparison.latency.quartiles[SMALL][0]
    ratio = comparison.latency.ratios[SMALL][0]
    verdict = "no faster within the spread" if comparison.latency.is_same(SMALL) else f"{ratio:.2f}x as fast"
    yield (
        f"time: a forward pass on {inputs}, {one.device}, {counted(one.threads, 'thread')}, median of {one.timings[0].blocks} "
        f"turns; {verdict} (half of the turns: {first:.2f}x to {third:.2f}x)"
    )


def _listed(lines: Sequence[str], what: str) -> list[str]:
    """Cut a long list of lines, and say how many more there are."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    return [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more: {len(lines)} {what} in all"]


def _reasons(pinned: Sequence[str]) -> list[str]:
    """List the reasons why dimensions can never shrink, the most frequent first, without the operations' numbers."""
    counts = Counter(re.sub(r"(?<=[a-z])_\d+\b", "", why) for why in pinned)
    lines = [f"  {count} because {why}" for why, count in counts.most_common(MOST_REASONS)]
    rest = len(pinned) - sum(count for _, count in counts.most_common(MOST_REASONS))
    lines += [f"  {rest} for other reasons"] if rest else []
    return [f"{len(pinned)} dimensions of parameters cannot shrink, kernel sizes aside:", *lines] if lines else []
