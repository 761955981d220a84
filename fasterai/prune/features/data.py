"""Data with the kept features alone: wrappers of torch's datasets and loaders, and transforms of fastai."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from fasterai.prune.features.selecting import Where, select_in

__all__ = ["Part", "SelectedDataset", "SelectedLoader", "SelectedStream", "selected_dataset"]


@dataclass(frozen=True)
class Part:
    """Function of a sample or a batch that changes one part of it; it can be pickled, as workers of a loader need.

    Attributes:
        change: The function of the part.
        argument: The place of the part.
        before: A function whose result it is applied to, such as a `collate_fn`.
    """

    change: Callable[[Any], Any]
    argument: Where = 0
    before: Callable[[Any], Any] | None = None

    def __call__(self, item: Any) -> Any:
        return select_in(item if self.before is None else self.before(item), self.argument, self.change)

    def of_fastai(self, batch):  # type: ignore[no-untyped-def]  # fastai chooses by annotations
        """Return a fastai tuple with the part changed."""
        return self(batch)

    def fastai(self) -> Any:
        """Return it as a transform that gets whole items, not each of their parts; after those that make tensors.

        Raises:
            ImportError: fastai is not installed.
        """
        from fastai.data.transforms import ItemTransform

        return ItemTransform(self.of_fastai, order=99)


class SelectedDataset(Dataset[Any]):
    """Dataset by index, each of whose samples is changed.

    Args:
        dataset: The dataset of all features.
        part: The change.
    """

    def __init__(self, dataset: Any, part: Part) -> None:
        self.dataset, self.part = dataset, part

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.part(self.dataset[index])

    def __getattr__(self, name: str) -> Any:
        return _of_inner(self, "dataset", name)


class SelectedStream(IterableDataset[Any]):
    """Dataset as a stream, each of whose samples is changed.

    Args:
        dataset: The stream of all features.
        part: The change.
    """

    def __init__(self, dataset: Any, part: Part) -> None:
        self.dataset, self.part = dataset, part

    def __iter__(self) -> Iterator[Any]:
        return map(self.part, self.dataset)


class SelectedLoader:
    """Loader each of whose batches is changed; what else is asked of it, the loader inside answers.

    Args:
        loader: The loader of all features.
        part: The change.
    """

    def __init__(self, loader: Iterable[Any], part: Part) -> None:
        self.loader, self.part = loader, part

    def __iter__(self) -> Iterator[Any]:
        return map(self.part, self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return _of_inner(self, "loader", name)


def _of_inner(whole: object, inner: str, name: str) -> Any:
    """Return an attribute of what is wrapped; special names are the wrapper's own, also while it is being unpickled."""
    if name.startswith("__") or inner not in vars(whole):
        raise AttributeError(f"{type(whole).__name__!r} object has no attribute {name!r}")
    return getattr(vars(whole)[inner], name)


def selected_dataset(dataset: Any, part: Part) -> SelectedDataset | SelectedStream:
    """Return a dataset with each sample changed, by index or as a stream.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(dataset, IterableDataset):
        return SelectedStream(dataset, part)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be a dataset of torch's, got {type(dataset).__name__}; for batches call loader()")
    return SelectedDataset(dataset, part)
