"""Report of a removal as data, table and picture: the removed channels, those that had to stay and why, and the gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.layers import LayerComparison
from fasterai.display import Shown, Table, counted, of_batch, short, short_bytes, short_time
from fasterai.graph.inputs import InputCut
from fasterai.graph.reasons import shares_in_words, summed_reasons
from fasterai.prune.measure import DENSE, SMALL, Measurement
from fasterai.prune.removal_picture import GroupBar, ShareBar, draw
from fasterai.prune.surgery.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Removal"]

MOST_LINES = 24
AS_DENSE = "as dense"
#: So much of the asked share has to be gone of the parameters, or the report says what keeps them.
ENOUGH = 0.9
IGNORED = "ignored_layers keeps it"
#: Label, field of `Cost`, and how it is written.
FIGURES = (("parameters", "parameters", short), ("MACs", "macs", short), ("file", "file_bytes", short_bytes))


@dataclass(frozen=True, repr=False)
class Removal(Shown):
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
        is_blank: True if all outputs were zero, so that nothing could be compared.
        units: What was counted and removed: `channels`, or `experts`.
        kept_because: Reason -> share of the parameters, in [0, 1], that cannot shrink for it; a weight's numbers count in equal
            parts for each of its dimensions.
        asked: The share of the channels that was to be removed, in [0, 1]; None where none was named.
        dense: The number of parameters before the first of several removals; 0 where it is that of `parameters`.
        inputs: Argument -> what the small model takes of that input, where it takes less than the dense one did at first;
            what earlier removals have taken is counted in.
        recorded: Where `torch.export` refuses the model: that its operations were recorded from runs, and why.
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
    is_blank: bool = False
    inputs: Mapping[str, InputCut] = field(default_factory=dict)
    units: str = "channels"
    recorded: str = ""
    kept_because: Mapping[str, float] = field(default_factory=dict)
    asked: float | None = None
    dense: int = 0

    @property
    def shortfall(self) -> str:
        """Say what keeps parameters where fewer went than nine tenths of the share that was asked for; empty if enough went."""
        before, after = self.dense or self.parameters[0], self.parameters[1]
        gone = 1 - after / max(1, before)
        if self.asked is None or gone >= ENOUGH * self.asked * (1 - self.kept_because.get(IGNORED, 0.0)):
            return ""
        said = f"asked to prune {self.asked:.0%} of the {self.units}, {gone:.0%} of the parameters went: ".replace("%", " %")
        kept = sum(self.kept_because.values())
        why = f"{kept:.0%} cannot shrink, ".replace("%", " %") + shares_in_words(self.kept_because) if kept > 0.1 else ""
        return said + (why or f"the {self.units} that were chosen hold few of them{self._spared()}")

    def _spared(self) -> str:
        """Name the largest groups that lost less than half of what was asked for."""
        lost = {name: before - after for name, (before, after) in self.groups.items()}
        few = [name for name, (before, _) in self.groups.items() if lost[name] < (self.asked or 0.0) * before / 2]
        few = sorted(few, key=lambda name: -self.groups[name][0])[:2]
        return "".join(f"; of {name} {lost[name]} of {self.groups[name][0]} went" for name in few)

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
        note = f"non-zero of {DENSE}: its removed channels were masked already, so that they count as zeros"
        return replace(self.comparison.layers(), note=note)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; the plan has a `to_dict` of its own."""
        return (
            {
                "removed": {name: list(counts) for name, counts in self.removed.items()},
                "refused": dict(self.refused),
                "stayed": {name: list(channels) for name, channels in self.stayed.items()},
                "pinned": [[name, d, why] for (name, d), why in self.pinned.items()],
                "groups": {name: list(counts) for name, counts in self.groups.items()},
                "exact": self.exact,
                "difference": self.difference,
                "parameters": list(self.parameters),
                "rewritten": [*self.plan.rewrites],
                "inputs": self.measurement.inputs,
                "measured": None if self.comparison is None else self.comparison.to_dict(),
                "not_measured": self.measurement.why_not,
                "kept_because": dict(self.kept_because),
            }
            | ({"cut_inputs": [cut.to_dict() for cut in self.inputs.values()]} if self.inputs else {})
            | self._how()
        )

    def _how(self) -> dict[str, str]:
        return {"recorded": self.recorded} if self.recorded else {}

    def _line(self) -> str:
        before, after = self.parameters
        lost = f"{len(self.removed)} of {counted(len(self.groups) or len(self.removed), 'group')} lost {self.units}"
        return f"<Removal: {lost}, parameters {short(before)} -> {short(after)} ({after / max(1, before):.1%})>"

    def _parts(self) -> Iterator[Table | str]:
        before, after = self.parameters
        if self.removed:
            yield self._lost()
        yield from (f"takes less of its input {cut.words}" for cut in self.inputs.values())
        stays = [f"{name}: {'' if name in self.removed else 'stays, '}{why}" for name, why in self.refused.items()]
        yield from _listed(stays, "groups have to keep silent channels")
        for name, rewrite in self.plan.rewrites.items():
            yield f"{name or 'the model itself'}: {rewrite.why}; it runs a traced copy now"
        yield from summed_reasons([why for why in self.pinned.values() if not why.endswith("kernel size")])
        if self.shortfall:
            yield self.shortfall
        if not self.removed:
            yield "nothing was removed: " + ("see above" if self.refused else "no removable channel is silent")
        yield from [self.recorded] if self.recorded else []
        yield f"parameters: {before:,} -> {after:,} ({after / max(1, before):.1%})"
        yield self._moved()
        yield from self._figures()

    def _lost(self) -> Table:
        """Return the groups that lost some; of many the first."""
        lines = [f"{name}: {n:,} -> {m:,} {self.units}" for name, (n, m) in self.removed.items()]
        text = _listed(lines, f"groups lost {self.units}")
        body = [(name, f"{n:,}", f"{m:,}") for name, (n, m) in self.removed.items()]
        if len(body) > MOST_LINES:
            body = [*body[: MOST_LINES - 1], (text[-1], "", "")]
        return Table(("group", self.units, "kept"), body, text=text)

    def _moved(self) -> str:
        if self.is_blank and self.difference == 0:
            return "outputs are all zero, before and after: there was nothing to compare"
        moved = f"outputs moved by at most {self.difference:.1e} of their scale"
        return moved if self.exact else f"{moved}, as was allowed (exact=False)"

    def _figures(self) -> Iterator[Table | str]:
        """Write the table of figures, and the conditions under which they were measured."""
        comparison = self.comparison
        if comparison is None:
            yield from [f"not measured: {self.measurement.why_not}"] if self.removed else []
            return
        dense = comparison.costs[DENSE]
        yield ""
        yield _table(comparison)
        yield (
            f"masked: {1 - dense.nonzero / max(1, dense.parameters):.1%} of the parameters are zero; a mask changes no shape, "
            f"so that all else is as dense, and was not measured again"
        )
        yield "file: the weights alone, as safetensors; save_small writes what was removed beside them"
        yield from _timing(comparison, self.measurement.inputs)
        if uncounted := dict.fromkeys(op for one in comparison.costs.values() for op in one.uncounted):
            yield f"not counted, without a rule: {', '.join(uncounted)}"

    def plot(self) -> Figure:
        """Draw the kept share of size, MACs and time, and the kept channels of each group."""
        groups = [
            GroupBar(name, before, after, len(self.stayed.get(name, ())), name in self.refused)
            for name, (before, after) in self.groups.items()
        ]
        return draw(self._shares(), self._caption(), groups, self.units)

    def _shares(self) -> list[ShareBar]:
        if self.comparison is not None:
            return list(_rows(self.comparison))
        before, after = self.parameters
        return [ShareBar("parameters", after / max(1, before), short(before), short(after))]

    def _caption(self) -> str:
        lines = [f"outputs moved by at most {self.difference:.0e} of their scale"]
        if self.comparison is not None and self.comparison.latency is not None:
            one = self.comparison.latency.models[SMALL]
            speed = self.comparison.latency.speed(SMALL, self.comparison.latency.batch_sizes[0])
            lines.append(f"time on {self.measurement.inputs}, {one.device}, {counted(one.threads, 'thread')},")
            what = "bar" if speed.is_noisy else "line"
            lines.append(f"{one.timings[0].blocks} turns; the {what} is the middle half of the fastest passes")
            lines.append("a mask alone leaves all of it as dense")
        return "\n".join(lines)


def _rows(comparison: Comparison) -> Iterator[ShareBar]:
    dense, small = comparison.costs[DENSE], comparison.costs[SMALL]
    for label, name, write in FIGURES:
        named = f"{label}{of_batch(comparison.batch_size)}" if name == "macs" else label
        yield ShareBar(named, comparison.share(SMALL, name), write(getattr(dense, name)), write(getattr(small, name)))
    if comparison.latency is not None:
        times = [short_time(comparison.latency.models[name].timings[0].median) for name in (DENSE, SMALL)]
        speed = comparison.latency.speed(SMALL, comparison.latency.batch_sizes[0])
        spread = (1 / speed.high, 1 / speed.low)
        said = speed.share if speed.is_same or speed.is_noisy else ""
        yield ShareBar("time", 1 / speed.ratio, times[0], times[1], spread, said, speed.bar if speed.is_noisy else None)


def _table(comparison: Comparison) -> Table:
    """Lay out the figures of the dense, the masked and the small model."""
    body = [[b.label, b.dense, AS_DENSE, f"{b.small} ({b.said or f'{b.share:.1%}'})"] for b in _rows(comparison)]
    nonzero = [short(comparison.costs[name].nonzero) for name in (DENSE, SMALL)]
    body.insert(1, ["not zero", "", *nonzero])
    return Table(["", DENSE, "masked", SMALL], body)


def _timing(comparison: Comparison, inputs: str) -> Iterator[str]:
    """Describe how the times were measured, and how much they spread."""
    if comparison.latency is None:
        return
    one, speed = comparison.latency.models[SMALL], comparison.latency.speed(SMALL, comparison.latency.batch_sizes[0])
    verdict = speed.words()
    if not speed.is_noisy:
        spread = f"(half of the fastest passes: {speed.low:.2f}x to {speed.high:.2f}x)"
        verdict = f"{'no faster within the spread' if speed.is_same else verdict} {spread}"
    yield (
        f"time: a forward pass on {inputs}, {one.device}, {counted(one.threads, 'thread')}, the fastest of "
        f"{one.timings[0].blocks} turns; {verdict}"
    )


def _listed(lines: Sequence[str], what: str) -> list[str]:
    """Cut a long list of lines, and say how many more there are."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    return [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more: {len(lines)} {what} in all"]
