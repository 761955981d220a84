"""`sad`: how many places of a network's masks flip over a training, layer by layer, with table and picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasterai.core.selection import count_true
from fasterai.display import SERIES, Shown, Table, counted, dress, legend_above, new_axes, styled
from fasterai.sparse.nm.training import NMTraining

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SAD", "sad"]


@dataclass(frozen=True, repr=False)
class SAD(Shown):
    """Flips of masks between looks at them: SAD_{i:j} = ||E_j - E_i||_1, where E is the mask of zeros and ones.

    A weight that left and came back between two looks is not seen.

    Attributes:
        steps: Steps done at each look; empty where two sets of masks were compared.
        flips: Target's name -> flips up to each look, from the one before.
        weights: Target's name -> number of its weights.
    """

    steps: tuple[int, ...]
    flips: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, int]

    @property
    def per_layer(self) -> dict[str, int]:
        """The sum over all looks, target by target."""
        return {name: sum(found) for name, found in self.flips.items()}

    @property
    def overall(self) -> int:
        """The sum over all looks and targets."""
        return sum(self.per_layer.values())

    @property
    def over_time(self) -> list[int]:
        """The sum over all targets, look by look."""
        return [sum(found) for found in zip(*self.flips.values(), strict=True)]

    def __int__(self) -> int:
        return self.overall

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self) | {"overall": self.overall}

    def _line(self) -> str:
        looks = f" in {counted(len(self.steps), 'look')}" if self.steps else ""
        return f"<SAD: {counted(self.overall, 'flip')}{looks} at the masks of {counted(len(self.flips), 'target')}>"

    def _parts(self) -> Iterator[Table | str]:
        body = [self._row(name, self.per_layer[name], self.weights[name]) for name in self.flips]
        body.append(self._row("all targets", self.overall, sum(self.weights.values())))
        yield Table(("target", "weights", "flips", "flips per weight"), body, foot=1)
        if self.steps:
            yield f"{counted(len(self.steps), 'look')} up to step {self.steps[-1]:,}"

    def _row(self, name: str, flips: int, weights: int) -> tuple[str, str, str, str]:
        return name, f"{weights:,}", f"{flips:,}", f"{flips / max(1, weights):.4f}"

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the flips per weight from look to look: of all targets together, and of each one.

        Args:
            ax: Where to draw; a new figure if it is left out.

        Raises:
            ValueError: There was no look.
        """
        if not self.steps:
            raise ValueError("sad must be that of a training to be drawn over its steps, got one without looks")
        axes = new_axes(7.0, 3.5) if ax is None else ax
        for i, (name, found) in enumerate(self.flips.items()):
            label = "each target" if i == 0 else None
            shares = [flips / max(1, self.weights[name]) for flips in found]
            axes.plot(self.steps, shares, color=SERIES[3], linewidth=0.7, alpha=0.6, label=label)
        total = max(1, sum(self.weights.values()))
        axes.plot(self.steps, [flips / total for flips in self.over_time], color=SERIES[2], label="all targets")
        axes.set(xlabel="step", ylabel="flips per weight", ylim=(0, None))
        dress(axes, "Flips of the masks since the last look", grid="y")
        legend_above(axes)
        return axes


def sad(of: NMTraining | Mapping[str, Tensor], then: Mapping[str, Tensor] | None = None) -> SAD:
    """Return the sum of absolute differences of masks: SAD_{i:j} = ||E_j - E_i||_1, the number of places that have flipped.

    Zhou et al. 2021 (arXiv 2102.04010), who use it to tell how restless the choice of a training is.

    Args:
        of: An `SRSTE` or `STE` that has trained, for its looks over the training; or the masks at one moment.
        then: The masks at a later moment, where masks are compared: target's name -> bool tensor.

    Raises:
        TypeError: `of` is neither, or masks are missing.
        ValueError: The masks are of other names or shapes, or the training was without looks.

    >>> import torch
    >>> sad({"fc": torch.tensor([True, True, False])}, {"fc": torch.tensor([True, False, True])}).overall
    2
    """
    if isinstance(of, NMTraining):
        if then is not None:
            raise TypeError("then must be left out for a training, whose masks are compared from look to look")
        return _over_training(of)
    if not isinstance(of, Mapping) or not isinstance(then, Mapping):
        raise TypeError(f"sad must be given an SRSTE or STE, or the masks of two moments, got {of!r} and {then!r}")
    shapes = [{name: tuple(mask.shape) for name, mask in one.items()} for one in (of, then)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"masks must be of the same names and shapes, got {shapes[0]} and {shapes[1]}")
    flips = {name: (count_true(mask.bool() != then[name].bool().to(mask.device)),) for name, mask in of.items()}
    return SAD((), flips, {name: mask.numel() for name, mask in of.items()})


def _over_training(training: NMTraining) -> SAD:
    notes = training.notes
    if not notes.steps:
        got = "no run" if notes.looks else "looks=0"
        raise ValueError(f"{training.name} must have trained with looks of at least 1, got {got}")
    weights = {t.name: t.parameter.numel() for t in training.targets}
    return SAD(tuple(notes.steps), {name: tuple(found) for name, found in notes.read().items()}, weights)
