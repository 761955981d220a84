"""The picture of a removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasterai.display import GRID, INK, QUIET, SERIES, dress, short, short_bytes, short_time
from fasterai.prune.measure import DENSE, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fasterai.prune.removal_report import Removal

__all__ = ["draw"]

LEFT, GONE, STAYED = SERIES[3], GRID, SERIES[1]
MOST_GROUPS = 40


def draw(removal: Removal) -> Figure:
    """What is left of size, MACs and time at the left, what is left of each group of channels at the right."""
    import matplotlib.pyplot as plt

    shown = _shown(removal)
    top, height = 3.6, max(3.6, 1.5 + 0.26 * len(shown))
    figure = plt.figure(figsize=(12.0, height), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.35), height_ratios=(top, max(height - top, 0.01)))
    is_tall = height > 1.5 * top
    _draw_shares(figure.add_subplot(grid[0 if is_tall else slice(None), 0]), removal)
    _draw_groups(figure.add_subplot(grid[:, 1]), removal, shown)
    return figure


def _shown(removal: Removal) -> list[str]:
    """The groups that are drawn, in the network's order: of many those that lose most, or keep silent channels."""
    groups = removal.groups
    order = sorted(groups, key=lambda name: (name not in removal.refused, groups[name][1] - groups[name][0]))
    return [name for name in groups if name in set(order[:MOST_GROUPS])]


def _shares(removal: Removal) -> list[tuple[str, float, str]]:
    """Label, share of the dense, and the figures themselves."""
    comparison = removal.comparison
    before, after = removal.parameters
    if comparison is None:
        return [("parameters", after / max(1, before), f"{short(before)} → {short(after)}")]
    dense, small = comparison.costs[DENSE], comparison.costs[SMALL]
    rows = [
        (label, comparison.share(SMALL, name), f"{write(getattr(dense, name))} → {write(getattr(small, name))}")
        for label, name, write in (
            ("parameters", "parameters", short),
            ("MACs", "macs", short),
            ("file", "file_bytes", short_bytes),
        )
    ]
    if comparison.latency is not None:
        times = [short_time(comparison.latency.models[name].timings[0].median) for name in (DENSE, SMALL)]
        rows.append(("time", 1 / comparison.latency.ratios[SMALL][0], " → ".join(times)))
    return rows


def _draw_shares(axes: Axes, removal: Removal) -> None:
    rows = _shares(removal)
    for place, (label, share, figures) in enumerate(rows):
        axes.barh(place, 1.0, height=0.52, color=GONE)
        axes.barh(place, share, height=0.52, color=LEFT)
        if label == "time" and removal.comparison is not None and removal.comparison.latency is not None:
            low, high = removal.comparison.latency.quartiles[SMALL][0]
            axes.plot([1 / high, 1 / low], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
        end = max(1.0, share)
        axes.text(end + 0.03, place - 0.1, f"{share:.0%}", va="center", color=INK, fontsize=11, weight="bold")
        axes.text(end + 0.03, place + 0.19, figures, va="center", color=QUIET, fontsize=8.5)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, 1.62 * max(1.0, *(share for _, share, _ in rows))))
    axes.set_xticks([0, 0.5, 1.0], ["0 %", "50 %", "dense"])
    dress(axes, "What is left", grid=None)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(_caption(removal), loc="left", fontsize=8.5)


def _caption(removal: Removal) -> str:
    """Under which conditions, and how far the outputs moved."""
    lines = [f"outputs moved by at most {removal.difference:.0e} of their scale"]
    comparison = removal.comparison
    if comparison is not None and comparison.latency is not None:
        one = comparison.latency.models[SMALL]
        threads = f"{one.threads} thread{'s' if one.threads > 1 else ''}"
        lines.append(f"time on {removal.measurement.inputs}, {one.device}, {threads},")
        lines.append(f"{one.timings[0].blocks} turns; the line is the middle half")
        lines.append("a mask alone leaves all of it as dense")
    return "\n".join(lines)


def _draw_groups(axes: Axes, removal: Removal, shown: list[str]) -> None:
    most = max([removal.groups[name][0] for name in shown], default=1)
    for place, name in enumerate(shown):
        before, after = removal.groups[name]
        silent = len(removal.stayed.get(name, ()))
        axes.barh(place, before, height=0.66, color=GONE, label=_once("removed", place))
        axes.barh(place, after, height=0.66, color=LEFT, label=_once("kept", place))
        axes.barh(place, silent, left=after - silent, height=0.66, color=STAYED, label=_once("silent, but has to stay", place))
        text = f"{before:,} → {after:,}" if after < before else f"{before:,}"
        axes.text(before + 0.012 * most, place, text, va="center", color=QUIET, fontsize=8)
    axes.set_yticks(range(len(shown)), [name.removesuffix(".weight") for name in shown], fontsize=8)
    axes.set(ylim=(max(len(shown), 1) - 0.4, -0.6), xlim=(0, 1.2 * most), xlabel="channels")
    left_out = len(removal.groups) - len(shown)
    dress(axes, "Channels of each group" + (f" ({left_out} more not shown)" if left_out else ""))
    _legend(axes, has_stayed=any(removal.stayed.get(name) for name in shown))


def _once(label: str, place: int) -> str | None:
    return label if place == 0 else None


def _legend(axes: Any, has_stayed: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    pairs = [(h, t) for h, t in zip(handles, labels, strict=True) if has_stayed or not t.startswith("silent")]
    if pairs:
        options = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "ncols": len(pairs),
            "frameon": False,
            "labelcolor": QUIET,
        }
        axes.legend(*zip(*pairs, strict=True), fontsize=8.5, borderaxespad=0.2, handlelength=1.2, **options)
