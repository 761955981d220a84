"""A sensitivity by the names of the public fasterai: one sparsity, and a row for each layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fasterai.analyze.sensitivity_report import Sensitivity
from fasterai.core.checks import check_count
from fasterai.display import SERIES, Brief, Shown, Table, counted, dress, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerSensitivity", "SensitivityResult"]


@dataclass(frozen=True, repr=False)
class LayerSensitivity(Brief):
    """Score of a model with one layer pruned.

    Attributes:
        name: The layer; the parameter where it has another name than `weight`.
        layer_type: The layer's class.
        params: Number of weights of the parameter.
        baseline_metric: The score of the model as it is.
        compressed_metric: The score with this layer pruned.
        delta: The loss of score; above 0 the model has got worse.
    """

    name: str
    layer_type: str
    params: int
    baseline_metric: float
    compressed_metric: float
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class SensitivityResult(Shown):
    """Scores of a model with one layer at a time pruned to one sparsity.

    Attributes:
        compression_type: `sparsity` or `pruning`.
        compression_level: The share of each layer that was pruned, in [0, 1].
        baseline_metric: The score of the model as it is.
        layers: A row for each layer, in the model's order.
        metric_name: The name of the score, for texts.
        higher_is_better: True where a higher score is better.
        measured: The same as `sensitivity` returns it.
    """

    compression_type: str
    compression_level: float
    baseline_metric: float
    layers: list[LayerSensitivity]
    metric_name: str = "accuracy"
    higher_is_better: bool = True
    measured: Sensitivity | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        names = ("compression_type", "compression_level", "baseline_metric", "metric_name", "higher_is_better")
        return {**{name: getattr(self, name) for name in names}, "layers": [layer.as_dict() for layer in self.layers]}

    def top(self, n: int = 5, *, most_sensitive: bool = True) -> list[LayerSensitivity]:
        """Return the layers that lose most, or least, first; a score that is not finite counts as the largest loss."""
        check_count("n", n)
        return sorted(self.layers, key=lambda x: x.delta if x.delta == x.delta else float("inf"), reverse=most_sensitive)[:n]

    def summary(self, *, top: int = 5) -> None:
        """Print the layers that lose most and least.

        Args:
            top: The number of layers of each kind.
        """
        rows = [("most sensitive", one) for one in self.top(top)]
        rows += [("least sensitive", one) for one in self.top(top, most_sensitive=False)]
        body = [(kind, one.name, f"{one.delta:+.4f}") for kind, one in rows]
        lines = [self._head(), *Table(("", "layer", f"loss of {self.metric_name}"), body, left=2).lines()]
        print("\n".join(lines))  # noqa: T201 - what it is for

    def to_dataframe(self) -> Any:  # a pandas DataFrame, which is no dependency
        """Return a pandas table with a row for each layer.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "to_dataframe needs pandas: pip install pandas; as_dict() gives the same as plain data"
            ) from error
        return pd.DataFrame([layer.as_dict() for layer in self.layers])

    def to_layer_targets(
        self,
        model: nn.Module | None = None,
        target_pct: float = 0.5,
        min_pct: float = 0.0,
        max_pct: float = 0.9,
        gamma: float = 1.0,
    ) -> dict[str, float]:
        """Return a share of each layer, in [0, 1], that together remove `target_pct` of all units.

        Layers give up units at one and the same loss of score; see `Sensitivity.allocate`.

        Args:
            model: The model, to check the names; or None.
            target_pct: The share of all units, in [0, 1].
            min_pct: No layer gets less.
            max_pct: No layer gets more.
            gamma: Must be 1: the loss is measured, not scaled.

        Raises:
            ValueError: A share is out of range, or `gamma` is not 1.
        """
        if gamma != 1:
            raise ValueError(
                f"gamma must be 1, got {gamma!r}: layers give up units at one loss of score, which has no exponent"
            )
        if self.measured is None:
            raise ValueError("measured must be what sensitivity returned, got None; call SensitivityAnalyzer(...).analyze()")
        return self.measured.to_layer_targets(model, target_pct, min_pct, max_pct)

    def _head(self) -> str:
        level = f"{self.compression_type} {self.compression_level:.0%} of one layer at a time"
        return f"{level}; {self.metric_name} {self.baseline_metric:.4g} as it is, {counted(len(self.layers), 'layer')}"

    def _line(self) -> str:
        return f"<SensitivityResult: {self._head()}>"

    def _parts(self) -> Iterator[Table | str]:
        body = [
            (one.name, one.layer_type, f"{one.params:,}", f"{one.compressed_metric:.4g}", f"{one.delta:+.4f}")
            for one in self.layers
        ]
        yield self._head()
        yield Table(("layer", "class", "weights", self.metric_name, "loss"), body, left=2)

    @styled()
    def plot(self, figsize: tuple[float, float] = (12, 5), ax: Axes | None = None) -> Axes:
        """Draw a bar for each layer: what is lost with it pruned.

        Args:
            figsize: Width and height of a new figure, in inches.
            ax: Where to draw; a new figure if it is left out.
        """
        axes = new_axes(*figsize) if ax is None else ax
        axes.bar(range(len(self.layers)), [one.delta for one in self.layers], color=SERIES[2])
        axes.set_xticks(range(len(self.layers)), [one.name for one in self.layers], rotation=60, ha="right")
        axes.set_ylabel(f"loss of {self.metric_name}")
        dress(axes, f"{self.compression_type} {self.compression_level:.0%} of one layer at a time", grid="y")
        return axes
