"""Scores of a model with one target pruned at a time, as data, table and picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fasterai.analyze.allocation import allocate
from fasterai.core.checks import check_count, check_fraction
from fasterai.display import (
    HEAT,
    INK,
    PAPER,
    QUIET,
    SMALL,
    Shown,
    Table,
    as_percent,
    counted,
    dress,
    line_colors,
    new_axes,
    styled,
    units_word,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Ranked", "Sensitivity"]

#: Targets beyond which a map is drawn, not lines; the difference of asked and reached that is worth a line.
MOST_LINES, LEAST_OFF = 12, 0.005


class Ranked(NamedTuple):
    """Target with its rank in the order of sensitivity.

    Attributes:
        name: The target.
        drop: The fall of the score, the mean over the measured sparsities.
    """

    name: str
    drop: float


@dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """Scores of a model with one target pruned at a time; `print` shows them as a table.

    Attributes:
        baseline: The score of the model as it is.
        sparsities: The sparsities that were asked of each target.
        scores: Target name -> the score at each sparsity.
        reached: Target name -> the share of its units that the masks pruned then: whole units, so not quite what was asked.
        units: Target name -> the number of its units.
        higher_is_better: True where a higher score is better, as of an accuracy; False for a loss.
        granularity: The granularity, which says what a unit is.
    """

    baseline: float
    sparsities: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    reached: Mapping[str, tuple[float, ...]]
    units: Mapping[str, int]
    higher_is_better: bool = True
    granularity: str = "weight"

    def drops(self, name: str) -> tuple[float, ...]:
        """Return the loss of score at each sparsity of a target; negative where pruning improves the score."""
        sign = 1.0 if self.higher_is_better else -1.0
        return tuple(sign * (self.baseline - score) for score in self.scores[name])

    def top(self, n: int = 5, most_sensitive: bool = True) -> list[Ranked]:
        """Rank the targets by their mean drop, most or least sensitive first.

        A score that is not finite counts as the largest drop.
        """
        check_count("n", n)
        means = [Ranked(name, sum(self.drops(name)) / len(self.sparsities)) for name in self.scores]

        def badness(one: Ranked) -> float:
            return math.inf if math.isnan(one.drop) else one.drop

        return sorted(means, key=badness, reverse=most_sensitive)[:n]

    def allocate(self, sparsity: float, *, least: float = 0.0, most: float = 1.0) -> dict[str, float]:
        """Distribute a sparsity of all units over the targets: target -> sparsity, for `Sparsifier(...).sparsify_model`.

        Our rule: every target gives up as many units as it can for one and the same drop in score, and that drop is as small
        as the share allows. Between measured sparsities the drop is interpolated, from 0 at sparsity 0; it never falls as the
        sparsity rises. What lies beyond the last measured sparsity goes last, in equal parts of what each target has left; what
        costs no drop at all is given up in equal parts as well, if less is asked. At least one unit of every target stays.

        Args:
            sparsity: The share of the units of all targets to prune, in [0, 1]; met to the unit.
            least: No target gets less than this share, in whole units.
            most: No target gets more, in whole units.

        Raises:
            ValueError: A share is out of range, or `sparsity` does not lie between `least` and `most`.
        """
        check_fraction("sparsity", sparsity)
        check_fraction("least", least)
        check_fraction("most", most)
        curves = [list(zip(self.reached[name], self.drops(name), strict=True)) for name in self.scores]
        units = [self.units[name] for name in self.scores]
        counts = allocate(curves, units, sparsity, least, most)
        return {name: count / n for name, count, n in zip(self.scores, counts, units, strict=True)}

    def to_layer_targets(
        self, model: nn.Module | None = None, target_pct: float = 0.5, min_pct: float = 0.0, max_pct: float = 1.0
    ) -> dict[str, float]:
        """Return the allocation by module name, in fractions, for `sparsify_layer` and `ignored_layers` (a familiar name).

        Args:
            model: The model, or None: if given, the names are checked to be its modules.
            target_pct: The share of all units to prune, in [0, 1].
            min_pct: No target gets less than this share.
            max_pct: No target gets more.

        Raises:
            ValueError: A share is out of range, or a module is not in the model.
        """
        pruned: dict[str, float] = {}
        units: dict[str, int] = {}
        for label, value in (("target_pct", target_pct), ("min_pct", min_pct), ("max_pct", max_pct)):
            check_fraction(label, value)
        for name, share in self.allocate(target_pct, least=min_pct, most=max_pct).items():
            module = name.rpartition(".")[0]
            pruned[module] = pruned.get(module, 0.0) + share * self.units[name]
            units[module] = units.get(module, 0) + self.units[name]
        if model is not None:
            known = dict(model.named_modules())
            if lost := [name for name in pruned if name not in known]:
                raise ValueError(f"model must be the one that was analysed, got one without {', '.join(lost[:5])}")
        return {module: pruned[module] / units[module] for module in pruned}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "baseline": self.baseline,
            "sparsities": list(self.sparsities),
            "scores": {name: list(values) for name, values in self.scores.items()},
            "reached": {name: list(values) for name, values in self.reached.items()},
            "units": dict(self.units),
            "higher_is_better": self.higher_is_better,
            "granularity": self.granularity,
        }

    def _line(self) -> str:
        worst = ", ".join(f"{one.name} ({one.drop:.3g})" for one in self.top(2))
        return (
            f"<Sensitivity of {counted(len(self.scores), 'target')}, baseline {self.baseline:.4g}; largest mean drops: {worst}>"
        )

    def _parts(self) -> Iterator[Table | str]:
        header = (
            "target",
            units_word(self.granularity),
            *(f"{s:.0%}" if round(100 * s, 6) % 1 == 0 else f"{s:.1%}" for s in self.sparsities),
        )
        body = [(name, f"{self.units[name]:,}", *(f"{v:.4g}" for v in values)) for name, values in self.scores.items()]
        better = "higher" if self.higher_is_better else "lower"
        yield Table(header, body)
        yield f"baseline {self.baseline:.4g}, {better} is better; one target pruned at a time"
        off = max(abs(got - s) for shares in self.reached.values() for got, s in zip(shares, self.sparsities, strict=True))
        if off >= LEAST_OFF:
            yield f"the columns are what was asked; `reached` has what was pruned, {off:.1%} from it at most"

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a line for each target; for more than a dozen targets a map with one row each.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        many = len(self.scores) > MOST_LINES
        height = 1.4 + 0.26 * len(self.scores) if many else 4.2
        axes = new_axes(8.0, height) if ax is None else ax
        (self._draw_map if many else self._draw_lines)(axes)
        return axes

    def _draw_lines(self, axes: Axes) -> None:
        for (name, values), color in zip(self.scores.items(), line_colors(len(self.scores)), strict=True):
            places = [0.0, *self.reached[name]]
            axes.plot(places, [self.baseline, *values], color=color, linewidth=1.8, marker="o", markersize=4, label=name)
        axes.axhline(self.baseline, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_formatter(as_percent)
        axes.set(xlim=(0, 1), xlabel=f"share of the target's {units_word(self.granularity)} pruned", ylabel="score")
        dress(axes, f"Score with one target pruned at a time; {self.baseline:.4g} as it is", grid="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    def _draw_map(self, axes: Axes) -> None:
        import numpy as np

        drops = np.array([self.drops(name) for name in self.scores])
        finite = drops[np.isfinite(drops)]
        top = max(float(finite.max()) if finite.size else 0.0, 1e-12)
        image = axes.imshow(np.where(np.isfinite(drops), drops, top), aspect="auto", cmap=HEAT, vmin=0.0, vmax=top)
        for row, values in enumerate(self.scores.values()):
            for column, value in enumerate(values):
                dark = not np.isfinite(drops[row, column]) or drops[row, column] > 0.6 * top
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=SMALL, color=PAPER if dark else INK)
        axes.set_yticks(range(len(self.scores)), list(self.scores), fontsize=SMALL)
        axes.set_xticks(range(len(self.sparsities)), [f"{s:.0%}" for s in self.sparsities])
        axes.set_xlabel(f"share of the target's {units_word(self.granularity)} pruned")
        dress(axes, f"Score with one target pruned at a time; {self.baseline:.4g} as it is")
        if axes.figure is not None:
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, label="drop")
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.tick_params(colors=QUIET, length=0, labelsize=SMALL)
