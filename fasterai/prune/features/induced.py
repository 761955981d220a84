"""Result of an induced feature selection: the small network, the selectors of its inputs, and what they save."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fasterai.analyze.comparison import Comparison
from fasterai.display import Shown, Table, counted, of_batch, short, short_bytes
from fasterai.prune.features.picture import draw_bars, draw_pixels, image_of
from fasterai.prune.features.selector import InputSelector
from fasterai.prune.removal_report import Removal
from fasterai.prune.small_files import save_small

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DENSE", "SMALL", "Induced"]

DENSE, SMALL = "dense", "small"
#: Kept features that are listed.
MOST = 24


@dataclass(frozen=True, repr=False)
class Induced(Shown):
    """Small network that reads fewer features; `print` shows the report, `plot` draws the features.

    Attributes:
        model: The small network; it takes selected inputs.
        selectors: Argument -> the choice of its features.
        removal: The removal of the features and of hidden channels, with its check.
        scores: Argument -> the score of each feature that there was, as a share of their mean.
        whole: The small network with the selectors in front: it takes whole inputs.
        input_bytes: Bytes of a sample, before and after.
        parameters: Numbers of parameters, before and after.
        comparison: Costs and scores of the dense network and of `whole`; None if they were not measured.
    """

    model: nn.Module
    selectors: Mapping[str, InputSelector]
    removal: Removal
    scores: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    whole: nn.Module
    input_bytes: tuple[int, int]
    parameters: tuple[int, int]
    comparison: Comparison | None = field(default=None)

    @property
    def selector(self) -> InputSelector:
        """The choice of features, of a network that has one input with some.

        Raises:
            ValueError: There are several such inputs.
        """
        if len(self.selectors) != 1:
            raise ValueError(
                f"selector must be that of one input, got {', '.join(self.selectors)}; take it from selectors[...]"
            )
        return next(iter(self.selectors.values()))

    @property
    def accuracy(self) -> dict[str, float]:
        """The given score of the dense and the small network; empty if none was given."""
        return dict(self.comparison.scores.get("score", {})) if self.comparison is not None else {}

    @property
    def feature_counts(self) -> tuple[int, int]:
        """Numbers of features of all inputs, before and after."""
        return sum(s.size for s in self.selectors.values()), sum(len(s.keep) for s in self.selectors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the small network and its selectors as one file: `load_small` and `InputSelector.load` read it.

        Raises:
            OSError: It cannot be written.
        """
        save_small(path, self.model, selector=self.selectors)

    def figures(self) -> dict[str, tuple[float, float]]:
        """Return what is counted, before and after: features, input bytes, parameters, MACs and the score where measured."""
        found: dict[str, tuple[float, float]] = {"features": self.feature_counts, "input bytes": self.input_bytes}
        found["parameters"] = self.parameters
        if self.comparison is not None:
            dense, small = (self.comparison.costs[name] for name in (DENSE, SMALL))
            found |= {"macs": (dense.macs, small.macs)}
        if self.accuracy:
            found["score"] = self.accuracy[DENSE], self.accuracy[SMALL]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "figures": {name: list(pair) for name, pair in self.figures().items()},
            "selectors": {name: one.to_dict() for name, one in self.selectors.items()},
            "scores": {name: values.tolist() for name, values in self.scores.items()},
            "removal": self.removal.to_dict(),
        }

    def _line(self) -> str:
        before, after = self.feature_counts
        (first, then), (old, new) = self.input_bytes, self.parameters
        bytes_left, left = f"{short_bytes(first)} -> {short_bytes(then)}", f"{short(old)} -> {short(new)}"
        return f"<Induced: {after:,} of {counted(before, 'feature')} kept, input {bytes_left}, parameters {left}>"

    def _parts(self) -> Iterator[Table | str]:
        writes = {"input bytes": short_bytes, "parameters": short, "macs": short, "score": "{:.4g}".format}
        body = []
        for name, (before, after) in self.figures().items():
            write = writes.get(name, "{:,}".format)
            share = "" if name == "score" else f" ({after / before:.1%})" if before else ""
            body.append([self._label(name), write(before), write(after) + share])
        yield Table(["", DENSE, SMALL], body)
        for argument, selector in self.selectors.items():
            yield f"{argument}: {', '.join(self._kept(selector))}"
        yield from (f"{name}: {why}" for name, why in self.removal.refused.items())
        yield self._moved()

    def _label(self, name: str) -> str:
        if name == "macs":
            return "MACs" + of_batch(self.comparison.batch_size if self.comparison is not None else None)
        return {"input bytes": "input of 1 sample"}.get(name, name)

    def _kept(self, selector: InputSelector) -> list[str]:
        names = [str(name) for name in selector.get_feature_names_out()]
        return names if len(names) <= MOST else [*names[:MOST], f"and {len(names) - MOST} more"]

    def _moved(self) -> str:
        return f"its outputs differ from those of the masked network by at most {self.removal.difference:.1e} of their scale"

    def plot(self, image: Any = None, shape: tuple[int, ...] | None = None, argument: str | None = None) -> Figure:
        """Draw the features' scores as bars with their names, or over an image the kept pixels.

        Args:
            image: A flat image, or a batch `(N, F)` whose mean is taken, for features that are pixels; bars if it is left out.
            shape: The shape of the image, `(H, W)` or `(C, H, W)`.
            argument: The input; the only one if left out.

        Raises:
            ValueError: There are several inputs and none was named, or the shape does not fit.
        """
        selector = self.selector if argument is None else self.selectors[argument]
        scores = self.scores[argument if argument is not None else next(iter(self.selectors))]
        is_kept = selector.get_support()
        title = f"{len(selector.keep):,} of {counted(selector.size, 'feature')} kept"
        if image is None:
            names = [f"x{i}" for i in range(selector.size)] if selector.names is None else list(selector.names)
            return draw_bars(names, [float(s) for s in scores], [bool(k) for k in is_kept], title)
        values = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image, dtype=np.float64)
        mean = image_of(values.mean(0) if values.ndim == 2 else values, shape or ())
        kept, heat = (image_of(v.astype(np.float64), shape or ()) for v in (is_kept, np.where(is_kept, scores, 0.0)))
        if kept.ndim == 3:
            kept, heat = kept.mean(2), heat.sum(2)
        return draw_pixels(heat, kept, mean, title)
