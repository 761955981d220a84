"""Picture of a removal, drawn from plain figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fasterai.display import GRID, INK, QUIET, SERIES, SMALL, TITLE, as_percent, dress, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GroupBar", "ShareBar", "draw"]

LEFT, GONE, STAYED = SERIES[3], GRID, SERIES[1]
MOST_GROUPS = 40


class ShareBar(NamedTuple):
    """Figure of the small model as a share of the dense one's.

    Attributes:
        label: The figure's name.
        share: The small model's over the dense one's.
        dense: The dense model's, as it is written.
        small: The small model's, as it is written.
        spread: The first and the third quartile of the share, where it was measured several times.
        bar: Start and length of its bar; from 0 to the share if they are left out.
        said: The words for a share that is not to be named: it is the same, or too noisy. Empty where it is.
    """

    label: str
    share: float
    dense: str
    small: str
    spread: tuple[float, float] | None = None
    said: str = ""
    bar: tuple[float, float] | None = None


class GroupBar(NamedTuple):
    """Channels of a group of coupled channels, before and after.

    Attributes:
        name: Its name.
        before: The number of its channels before the removal.
        after: The number of its channels after it.
        silent: The number of silent channels among those.
        is_refused: True where silent channels had to stay.
    """

    name: str
    before: int
    after: int
    silent: int = 0
    is_refused: bool = False


@styled()
def draw(shares: Sequence[ShareBar], caption: str, groups: Sequence[GroupBar], units: str = "channels") -> Figure:
    """Draw the kept share of size, MACs and time at the left, the kept channels, or experts, of each group at the right.

    Args:
        shares: The figures at the left.
        caption: The conditions under which they were measured, below them.
        groups: The groups in the network's order. Of many, those are drawn that lose most or keep silent channels.
        units: What was counted and removed.
    """
    shown = _shown(groups)
    top, height = 3.6, max(3.6, 1.5 + 0.26 * len(shown))
    figure = new_figure(12.0, height)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.35), height_ratios=(top, max(height - top, 0.01)))
    is_tall = height > 1.5 * top
    _draw_shares(figure.add_subplot(grid[0 if is_tall else slice(None), 0]), shares, caption)
    _draw_groups(figure.add_subplot(grid[:, 1]), shown, len(groups) - len(shown), units)
    return figure


def _shown(groups: Sequence[GroupBar]) -> list[GroupBar]:
    order = sorted(groups, key=lambda group: (not group.is_refused, group.after - group.before))
    names = {group.name for group in order[:MOST_GROUPS]}
    return [group for group in groups if group.name in names]


def _draw_shares(axes: Axes, shares: Sequence[ShareBar], caption: str) -> None:
    for place, one in enumerate(shares):
        axes.barh(place, 1.0, height=0.52, color=GONE)
        start, length = one.bar or (0.0, one.share)
        axes.barh(place, length, left=start, height=0.52, color=LEFT)
        if one.spread is not None and one.bar is None:
            axes.plot(list(one.spread), [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
        end, weight = max(1.0, one.share), "normal" if one.said else "bold"
        axes.text(end + 0.03, place - 0.1, one.said or f"{one.share:.0%}", va="center", fontsize=TITLE, weight=weight)
        axes.text(end + 0.03, place + 0.19, f"{one.dense} → {one.small}", va="center", color=QUIET, fontsize=SMALL)
    axes.set_yticks(range(len(shares)), [one.label for one in shares])
    axes.set(ylim=(len(shares) - 0.4, -0.6), xlim=(0, 1.62 * max(1.0, *(one.share for one in shares))))
    axes.set_xticks([0, 0.5, 1.0], [as_percent(0.0), as_percent(0.5), "dense"])
    dress(axes, "What is left", grid=None)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(caption, loc="left", fontsize=SMALL)


def _draw_groups(axes: Axes, shown: Sequence[GroupBar], left_out: int, units: str) -> None:
    most = max([group.before for group in shown], default=1)
    for place, (_, before, after, silent, _) in enumerate(shown):
        axes.barh(place, before, height=0.66, color=GONE, label=_once("removed", place))
        axes.barh(place, after, height=0.66, color=LEFT, label=_once("kept", place))
        axes.barh(place, silent, left=after - silent, height=0.66, color=STAYED, label=_once("silent, but has to stay", place))
        text = f"{before:,} → {after:,}" if after < before else f"{before:,}"
        axes.text(before + 0.012 * most, place, text, va="center", color=QUIET, fontsize=SMALL)
    axes.set_yticks(range(len(shown)), [group.name.removesuffix(".weight") for group in shown], fontsize=SMALL)
    axes.set(ylim=(max(len(shown), 1) - 0.4, -0.6), xlim=(0, 1.2 * most), xlabel=units)
    dress(axes, f"{units.capitalize()} of each group" + (f" ({left_out} more not shown)" if left_out else ""))
    _legend(axes, has_stayed=any(group.silent for group in shown))


def _once(label: str, place: int) -> str | None:
    return label if place == 0 else None


def _legend(axes: Any, has_stayed: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    pairs = [(h, t) for h, t in zip(handles, labels, strict=True) if has_stayed or not t.startswith("silent")]
    if pairs:
        legend_above(axes, *zip(*pairs, strict=True))
