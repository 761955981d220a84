"""Selector of inputs: which features of the data a small network still reads, and the ways to give it those alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fasterai.core.checks import check_count
from fasterai.display import Shown, Table, counted
from fasterai.prune.features.data import Part, SelectedLoader, selected_dataset
from fasterai.prune.features.files import read_selectors, write_selectors
from fasterai.prune.features.front import SelectInputs
from fasterai.prune.features.names import read_features, read_names
from fasterai.prune.features.selecting import Where, scattered, select

__all__ = ["InputSelector"]

#: Rows of the table that is printed.
MOST_ROWS = 24


@dataclass(repr=False)  # not frozen: scikit-learn writes notes on what stands in a pipeline
class InputSelector(Shown):
    """Choice of the features of an input that are kept: a function of data, and a transform for what feeds a network.

    It has scikit-learn's calls of a selector, so that it stands in a `Pipeline`; it is fitted as soon as it is made.

    Attributes:
        keep: The indices to keep, ascending. Flags for all features, or names, may be given as well.
        size: The number of features that there are.
        dim: The dimension of the features in a batch, at least 1: 0 is that of the samples.
        names: The features' names, if they have some.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A feature does not exist, is named twice, or none is kept; there are as many names as features or none.
    """

    keep: tuple[int, ...]
    size: int
    dim: int = 1
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        size, dim = check_count("size", self.size), check_count("dim", self.dim)
        names = read_names(self.names, size)
        keep = read_features("keep", self.keep, size, names)
        if not keep:
            raise ValueError("keep must hold at least one feature, got none")
        self.keep, self.size, self.dim, self.names = keep, size, dim, names

    # --- data --------------------------------------------------------------------------------------------------------

    def __call__(self, x: Any) -> Any:
        """Select the kept features of a batch; `transform` under the name that functions have."""
        return self.transform(x)

    def transform(self, X: Any) -> Any:  # noqa: N803 - scikit-learn's name
        """Select the kept features of a batch: a tensor, an array, a sparse matrix or a data frame, and it stays one.

        Raises:
            ValueError: It has another number of features, or lacks a column of a name.
        """
        return select(X, self.keep, self.size, self.dim, self.names)

    def item(self, x: Any) -> Any:
        """Select the kept features of one sample, which has no dimension of the samples.

        Raises:
            ValueError: It has another number of features.
        """
        return select(x, self.keep, self.size, self.dim - 1)

    def inverse_transform(self, X: Any) -> Any:  # noqa: N803
        """Put the kept features back to their places, with zeros at all others.

        Raises:
            ValueError: It has not as many features as are kept.
        """
        return scattered(X, self.keep, self.size, self.dim, self.names)

    def dataset(self, dataset: Any, argument: Where = 0) -> Any:
        """Return a dataset of torch's, by index or as a stream, whose samples have the kept features alone.

        Args:
            dataset: The dataset; not changed.
            argument: The place of the input in a sample: a position, a key, or a path of such.
        """
        return selected_dataset(dataset, Part(self.item, argument))

    def loader(self, loader: Iterable[Any], argument: Where = 0) -> SelectedLoader:
        """Return a data loader whose batches have the kept features alone; all else of it is as before."""
        return SelectedLoader(loader, Part(self.transform, argument))

    def collate(self, collate: Any = None, argument: Where = 0) -> Any:
        """Return a `collate_fn` that makes a batch as another one does, torch's by default, and selects in it."""
        return Part(self.transform, argument, torch.utils.data.default_collate if collate is None else collate)

    def item_transform(self, argument: Where = 0) -> Any:
        """Return a transform for fastai's items, such as `(x, y)` of one sample."""
        return Part(self.item, argument).fastai()

    def batch_transform(self, argument: Where = 0) -> Any:
        """Return a transform for fastai's batches; for tabular ones `argument` is 0 for categories, 1 for numbers."""
        return Part(self.transform, argument).fastai()

    # --- networks ----------------------------------------------------------------------------------------------------

    def module(self) -> SelectInputs:
        """Return a module that selects; it exports to ONNX as one operation."""
        return SelectInputs(self)

    def in_front(self, model: nn.Module) -> nn.Sequential:
        """Return a network that takes all features, and gives the kept ones to a small model; the model is shared."""
        return nn.Sequential(self.module(), model)

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a small file of its own, as JSON; `save_small(path, model, selector=...)` keeps it with the model.

        Raises:
            OSError: It cannot be written.
        """
        write_selectors(path, {"": self.to_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], argument: str = "") -> InputSelector:
        """Read it from a file of `save`, or from one of `save_small` that has it.

        Args:
            path: The file.
            argument: The name of the network's argument, where the file has selectors of several.

        Raises:
            ValueError: The file has none, or several and no name was given.
        """
        found = read_selectors(path)
        if argument not in found and (argument or len(found) != 1):
            names = ", ".join(map(repr, found)) or "no selector"
            raise ValueError(f"argument must be one of those in {path}, {names}, got {argument!r}")
        return cls.from_dict(found[argument] if argument in found else next(iter(found.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        names = None if self.names is None else list(self.names)
        return {"keep": list(self.keep), "size": self.size, "dim": self.dim, "names": names}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSelector:
        """Make a selector from the data of `to_dict`."""
        return cls(**data)

    # --- what scikit-learn calls -------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, **_: Any) -> InputSelector:  # noqa: N803
        """Return itself; the choice is made already.

        Raises:
            ValueError: The data has another number of features.
        """
        self.transform(X[:1])
        return self

    def fit_transform(self, X: Any, y: Any = None, **_: Any) -> Any:  # noqa: N803
        """Return `transform(X)`."""
        return self.transform(X)

    def get_support(self, indices: bool = False) -> np.ndarray[Any, Any]:
        """Return flags of the kept features, or their indices."""
        return np.asarray(self.keep) if indices else np.isin(np.arange(self.size), self.keep)

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> np.ndarray[Any, Any]:
        """Return the names of the kept features; `x0`, `x1` and so on where they have none.

        Raises:
            ValueError: There are as many names as features, or they are other ones.
        """
        names = self.names if input_features is None else read_names(input_features, self.size)
        if self.names is not None and names != self.names:
            raise ValueError(f"input_features must be {', '.join(self.names[:5])} and so on, got {', '.join(names or ())[:60]}")
        return np.asarray([f"x{i}" if names is None else names[i] for i in self.keep], dtype=object)

    @property
    def n_features_in_(self) -> int:
        """The number of features that there are."""
        return self.size

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings."""
        return {"keep": self.keep, "size": self.size, "dim": self.dim, "names": self.names}

    def __sklearn_clone__(self) -> InputSelector:
        return copy.deepcopy(self)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        tags = {"target_tags": TargetTags(required=False), "transformer_tags": TransformerTags()}
        return Tags(estimator_type=None, input_tags=InputTags(), requires_fit=False, **tags)

    # --- shown -------------------------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """The share of the features that are kept, in (0, 1]."""
        return len(self.keep) / self.size

    def _line(self) -> str:
        return f"<InputSelector: {len(self.keep):,} of {counted(self.size, 'feature')} kept, dimension {self.dim}>"

    def _parts(self) -> Iterator[Table | str]:
        yield f"{len(self.keep):,} of {counted(self.size, 'feature')} kept ({self.share:.1%}), in dimension {self.dim}"
        names = self.get_feature_names_out()
        shown = [(str(i), str(name)) for i, name in zip(self.keep, names, strict=True)]
        yield Table(("feature", "name"), shown[:MOST_ROWS], left=2)
        if len(shown) > MOST_ROWS:
            yield f"and {len(shown) - MOST_ROWS} more"
