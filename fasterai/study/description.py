"""Description of a study: what is compared, over which settings and seeds, at which size, and how it is shown.

To add a study: a file beside this one with a function `trial` and a value `STUDY`, and its name in `catalogue.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasterai.core.checks import check_choice, check_count
from fasterai.display import Brief
from fasterai.study.sizes import SIZES, Size

if TYPE_CHECKING:
    from fasterai.study.data import Data

__all__ = ["SIZES", "Run", "Settings", "Size", "Study", "Trial", "key_of"]

#: Columns of runs.csv beside axes and metrics.
COLUMNS = ("seed", "failure")
#: Axis -> value; values are text, numbers, booleans or None.
Settings = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]]


Trial = Callable[[Settings, int, Size, Any], Mapping[str, float]]
Load = Callable[[Path | None, Size], Any]


def _images(folder: Path | None, size: Size) -> Data | None:
    from fasterai.study.data import load_data  # torchvision and scikit-learn are slow to load

    return load_data(folder, size)


@dataclass(frozen=True)
class Run:
    """One training of a study: its settings and its seed."""

    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        """Text that is equal for equal runs."""
        return key_of(self.settings, self.seed)

    def __str__(self) -> str:
        return ", ".join([*(f"{axis} {value}" for axis, value in self.settings.items()), f"seed {self.seed}"])


def key_of(settings: Settings, seed: int) -> str:
    """Write the settings and the seed of a run as text that is equal for equal runs."""
    return json.dumps([dict(sorted(settings.items())), seed])


@dataclass(frozen=True, repr=False)
class Study(Brief):
    """A grid of settings and seeds, the function that runs one of them, and how the results are shown.

    Attributes:
        name: Its name, as on the command line.
        about: What it compares, in a sentence.
        trial: `(settings, seed, size, data) -> {metric: number}`; all of it is drawn from the seed.
        grids: Size -> axis -> values, of which every combination is run; or a list of such grids, all of which are run. The
            grid of `tiny` follows from that of `small` if it is left out.
        seeds: Size -> seeds; 0, 1, 2 if left out, and 0 for `tiny`.
        x: Axis or metric along the picture.
        y: Metric up the picture; the higher the better.
        lines: Axis, or axes, whose values are the picture's lines.
        panels: Axis, each value of which has a picture of its own beside the others; none if left out.
        reference: Settings that the others are held against, drawn as a level across the picture.
        sizes: Size -> what a run of it trains; `SIZES` if left out.
        load: Reads the data once: `(folder or None, size) -> data`. None for a study that brings its own data.
        version: To be raised with every change of `trial` after which results are others.
    """

    name: str
    about: str
    trial: Trial
    grids: Mapping[str, Grid | Sequence[Grid]]
    x: str
    lines: str | Sequence[str]
    y: str = "accuracy"
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=lambda: SIZES)
    panels: str = ""
    reference: Settings = field(default_factory=dict)
    load: Load | None = _images
    version: int = 1

    def __post_init__(self) -> None:
        check_count("version", self.version)
        if not self.grids:
            raise ValueError(f"grids must name the grid of one size at least, got {self.grids!r}")
        for size in self.grids:
            check_choice("grids", size, self.sizes)
            for grid in self._grids(size):
                _check_grid(grid)

    @property
    def line_axes(self) -> tuple[str, ...]:
        """The axes whose values are the picture's lines."""
        return (self.lines,) if isinstance(self.lines, str) else tuple(self.lines)

    def size_names(self) -> list[str]:
        """List the sizes that the study can be run at."""
        return [size for size in self.sizes if size in self.grids or (size == "tiny" and "small" in self.grids)]

    def size(self, name: str) -> Size:
        """Return a size by its name.

        Raises:
            ValueError: The study has none of that name.
        """
        return self.sizes[check_choice("size", name, self.size_names())]

    def settings(self, size: str) -> list[dict[str, Any]]:
        """List the settings of a size, in the order in which they are run."""
        self.size(size)
        if size == "tiny" and size not in self.grids:
            return _unique(found for grid in self._grids("small") for found in _corners(grid))
        return _unique(found for grid in self._grids(size) for found in _product(grid))

    def default_seeds(self, size: str) -> tuple[int, ...]:
        """Return the seeds that a size is run with."""
        return tuple(self.seeds.get(size, (0,) if size == "tiny" else (0, 1, 2)))

    def _grids(self, size: str) -> Sequence[Grid]:
        grids = self.grids[size]
        return [grids] if isinstance(grids, Mapping) else grids

    def record(self, size: Size, data: str | None) -> dict[str, Any]:
        """Return what must be equal for results to stand in one table, as values of JSON."""
        trained = {name: value for name, value in asdict(size).items() if name != "device"}
        found = {"version": self.version, "settings": self.settings(size.name), "size": trained, "data": data}
        return dict(json.loads(json.dumps(found)))


def _check_grid(grid: Grid) -> None:
    for axis, values in grid.items():
        if axis in COLUMNS or isinstance(values, str) or not values:
            raise ValueError(
                f"grids must give each axis (none called {' or '.join(COLUMNS)}) a list of values, got {axis!r}: {values!r}"
            )
        for value in values:
            if not (value is None or isinstance(value, str | bool | int | float)):
                raise TypeError(
                    f"grids must hold text, numbers, booleans and None, got {value!r} for {axis!r}; name it in text"
                )


def _product(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _corners(grid: Grid) -> Iterator[dict[str, Any]]:
    """Give the first setting, and for every axis those that differ from it in this axis alone."""
    first = {axis: values[0] for axis, values in grid.items()}
    yield first
    for axis, values in grid.items():
        for value in values[1:]:
            yield {**first, axis: value}


def _unique(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({key_of(settings, 0): settings for settings in found}.values())
