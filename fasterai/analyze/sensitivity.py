"""How a model's score falls as one target at a time is pruned, and how much of each target may go therefore."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fasterai.analyze.allocation import allocate
from fasterai.core.checks import check_count, check_fraction
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.display import INK, QUIET, dress, new_axes, table
from fasterai.model.running import evaluating, undisturbed
from fasterai.model.supported import check_model
from fasterai.model.targets import TargetsLike
from fasterai.sparse.sparsifier import Sparsifier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Ranked", "Sensitivity", "sensitivity"]

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOST_LINES, LEAST_OFF = 12, 0.005


class Ranked(NamedTuple):
    """A target in the order of sensitivity.

    Attributes:
        name: The target.
        drop: By how much the score gets worse, over the measured sparsities on average.
    """

    name: str
    drop: float


@dataclass(frozen=True)
class Sensitivity:
    """Scores of a model with one target pruned at a time; `print` shows them as a table.

    Attributes:
        baseline: The score of the model as it is.
        sparsities: What was asked of each target.
        scores: Target name -> the score at each sparsity.
        reached: Target name -> the share of its units that the masks pruned then: whole units, so not quite what was asked.
        units: Target name -> how many units it has.
        higher_is_better: Whether a higher score is better, as of an accuracy, or a lower one, as of a loss.
        granularity: What a unit is.
    """

    baseline: float
    sparsities: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    reached: Mapping[str, tuple[float, ...]]
    units: Mapping[str, int]
    higher_is_better: bool = True
    granularity: str = "weight"

    def drops(self, name: str) -> tuple[float, ...]:
        """By how much the score gets worse at each sparsity of a target; below 0 where it gets better."""
        sign = 1.0 if self.higher_is_better else -1.0
        return tuple(sign * (self.baseline - score) for score in self.scores[name])

    def top(self, n: int = 5, most_sensitive: bool = True) -> list[Ranked]:
        """The targets whose pruning hurts most on average, or least; a score that is not finite hurts more than any that is."""
        check_count("n", n)
        means = [Ranked(name, sum(self.drops(name)) / len(self.sparsities)) for name in self.scores]

        def badness(one: Ranked) -> float:
            return math.inf if math.isnan(one.drop) else one.drop

        return sorted(means, key=badness, reverse=most_sensitive)[:n]

    def allocate(self, sparsity: float, *, least: float = 0.0, most: float = 1.0) -> dict[str, float]:
        """How much of each target goes, for a share of all units together: `Sparsifier(...).sparsify_model` takes the dict.

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
        """The allocation by module name, for `sparsify_layer` and `ignored_layers`: the familiar name, in fractions.

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

    @property
    def _units(self) -> str:
        return "channels" if self.granularity.lower().startswith("coupled") else f"{self.granularity}s"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "baseline": self.baseline,
            "sparsities": list(self.sparsities),
            "scores": {name: list(values) for name, values in self.scores.items()},
            "reached": {name: list(values) for name, values in self.reached.items()},
            "units": dict(self.units),
            "higher_is_better": self.higher_is_better,
            "granularity": self.granularity,
        }

    def __str__(self) -> str:
        header = (
            "target",
            self._units,
            *(f"{s:.0%}" if round(100 * s, 6) % 1 == 0 else f"{s:.1%}" for s in self.sparsities),
        )
        body = [(name, f"{self.units[name]:,}", *(f"{v:.4g}" for v in values)) for name, values in self.scores.items()]
        better = "higher" if self.higher_is_better else "lower"
        lines = [*table(header, body), f"baseline {self.baseline:.4g}, {better} is better; one target pruned at a time"]
        off = max(abs(got - s) for shares in self.reached.values() for got, s in zip(shares, self.sparsities, strict=True))
        if off >= LEAST_OFF:
            lines.append(f"the columns are what was asked; `reached` has what was pruned, {off:.1%} from it at most")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a line for each target; of more than a dozen a map with a row for each.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        many = len(self.scores) > MOST_LINES
        height = 1.4 + 0.26 * len(self.scores) if many else 4.2
        axes = new_axes(8.0, height) if ax is None else ax
        (self._draw_map if many else self._draw_lines)(axes)
        return axes

    def _draw_lines(self, axes: Axes) -> None:
        from matplotlib import colormaps

        colors = colormaps["turbo"]
        n = len(self.scores)
        for i, (name, values) in enumerate(self.scores.items()):
            color = colors(0.08 + 0.84 * i / max(1, n - 1))
            places = [0.0, *self.reached[name]]
            axes.plot(places, [self.baseline, *values], color=color, linewidth=1.8, marker="o", markersize=4, label=name)
        axes.axhline(self.baseline, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlim=(0, 1), xlabel=f"share of the target's {self._units} pruned", ylabel="score")
        dress(axes, f"Score with one target pruned at a time; {self.baseline:.4g} as it is", grid="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=QUIET, fontsize=8)

    def _draw_map(self, axes: Axes) -> None:
        import numpy as np

        drops = np.array([self.drops(name) for name in self.scores])
        finite = drops[np.isfinite(drops)]
        top = max(float(finite.max()) if finite.size else 0.0, 1e-12)
        image = axes.imshow(np.where(np.isfinite(drops), drops, top), aspect="auto", cmap="OrRd", vmin=0.0, vmax=top)
        for row, values in enumerate(self.scores.values()):
            for column, value in enumerate(values):
                dark = not np.isfinite(drops[row, column]) or drops[row, column] > 0.6 * top
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color="white" if dark else INK)
        axes.set_yticks(range(len(self.scores)), list(self.scores), fontsize=8)
        axes.set_xticks(range(len(self.sparsities)), [f"{s:.0%}" for s in self.sparsities])
        axes.set_xlabel(f"share of the target's {self._units} pruned")
        dress(axes, f"Score with one target pruned at a time; {self.baseline:.4g} as it is")
        if axes.figure is not None:
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, label="drop")
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.tick_params(colors=QUIET, length=0, labelsize=8)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    granularity: Granularity | str = "weight",
    criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
    sparsities: Sequence[float] = SPARSITIES,
    targets: TargetsLike | None = None,
    higher_is_better: bool = True,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Score a model over the sparsity of one target at a time, all others as they are.

    The weights and buffers are afterwards what they were, bit for bit, also if `evaluate` fails; so are modes and torch's
    random generators. For each evaluation the model is in eval mode, and the generators stand where they stood at the first.

    Args:
        model: The model, wrapped or not.
        evaluate: The model -> its score, an accuracy or a loss on data of yours. It is called once with the model as it is
            and once for each target and sparsity.
        granularity: Which weights share one decision, as for `Sparsifier`.
        criteria: How much a weight matters, as there.
        sparsities: What is pruned of each target, in [0, 1], rising.
        targets: Names, globs or a predicate, as for `Sparsifier`; its default if left out.
        higher_is_better: Whether a higher score is better; False for a loss.
        progress: Whether to show a progress bar.
        **options: Further arguments of `Sparsifier`: `layer_type`, `example_inputs`, `data`, `loss`, `min_keep`, `round_to`.
            Counts are exact, of coupled channels too, unless `round_to` is given.

    Raises:
        TypeError: `evaluate` does not return a number, or an argument is of the wrong type.
        ValueError: An argument is out of range, or the score of the model as it is is not finite.
    """
    check_model(model, holds_values=True)
    asked = _check_sparsities(sparsities)
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, got {evaluate!r} ({type(evaluate).__name__})")
    for name in ("context", "sparsity", "schedule", "nm"):
        if name in options:
            raise TypeError(f"options must be what a Sparsifier takes beside its context and sparsity, got {name}")
    sparsifier = Sparsifier(model, granularity, "local", criteria, targets=targets, **{"round_to": 1, **options})
    report = sparsifier.report()
    units = {row.name: row.units for row in report.rows if row.name not in report.left_out}  # frozen ones cannot be pruned
    if not units:
        raise ValueError("targets must train, and all are frozen: name them with targets= to prune them all the same")
    scores: dict[str, list[float]] = {name: [] for name in units}
    reached: dict[str, list[float]] = {name: [] for name in units}
    with undisturbed(model), evaluating(model), _put_back(model) as put_back, _bar(len(units) * len(asked), progress) as step:
        baseline = _score(model, evaluate, put_back)
        if not math.isfinite(baseline):
            raise ValueError(f"evaluate must return a finite score of the model as it is, got {baseline!r}")
        for name in units:
            for sparsity in asked:
                sparsifier.sparsify_model({name: sparsity})
                reached[name].append(sparsifier.sparsity[name])
                scores[name].append(_score(model, evaluate, put_back))
                sparsifier.reset()
                step(name)
    found = {name: tuple(values) for name, values in scores.items()}
    shares = {name: tuple(values) for name, values in reached.items()}
    return Sensitivity(baseline, asked, found, shares, units, higher_is_better, repr(sparsifier.granularity))


def _check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    asked = tuple(check_fraction("sparsities", s) for s in sparsities)
    if not asked or list(asked) != sorted(set(asked)):
        raise ValueError(f"sparsities must be at least one share, rising, got {tuple(sparsities)!r}")
    return asked


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float], put_back: Callable[[], None]) -> float:
    """One evaluation; weights, buffers, modes and random generators are put back."""
    try:
        with undisturbed(model), evaluating(model):
            score = evaluate(model)
    finally:
        put_back()
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate must return a number, got {score!r} ({type(score).__name__})") from error


@contextmanager
def _put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """A function that gives parameters and buffers the values that they have now; it is also called at the end."""
    held = [*model.parameters(), *model.buffers()]
    values = [x.detach().clone() for x in held]

    @torch.no_grad()
    def put_back() -> None:
        for x, value in zip(held, values, strict=True):
            x.copy_(value)

    try:
        yield put_back
    finally:
        put_back()


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sensitivity", disable=not shown) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield step
