"""Data whose samples a teacher answers for once: batches of a loader, of a list, or tensors that hold everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from fasterai.core.batch import Batch
from fasterai.core.checks import not_one_of, warn
from fasterai.display import Brief
from fasterai.model.inputs import as_batch
from fasterai.model.progress import keep_random_state, put_random_state_

__all__ = ["Source", "source_of", "untouched_generators"]

FEW = 8  # samples that are read twice before the work begins


@dataclass(frozen=True, repr=False)
class Source(Brief):
    """Batches that can be gone through.

    Attributes:
        batches: Begins to go through them.
        few: Reads the same few samples each time; None where nobody knows how.
        count: The number of batches, if it is known.
        repeats: Whether they can be gone through again.
    """

    batches: Callable[[], Iterator[Batch]]
    few: Callable[[], Batch] | None = None
    count: int | None = None
    repeats: bool = True


def source_of(data: Any, batch_size: int) -> Source:
    """Return the batches of data.

    Args:
        data: fastai's DataLoaders or one of their loaders, torch's loader or data set, any iterable of batches, or one batch
            that holds everything: a tensor, a tuple `(inputs, labels)` or a dict.
        batch_size: The samples at a time, where data holds everything.

    Raises:
        TypeError: It is none of these.
        ValueError: A loader is shuffled and leaves out samples.
    """
    if isinstance(data, Tensor | tuple | Mapping):
        return _of_tensors(as_batch(data), batch_size)
    if (kind := _fastai_kind(data)) == "DataLoaders":
        return _of_fastai(data.train) if _fastai_kind(data.train) else _of_loader(data.train, _as_in_fastai)
    if kind == "DataLoader":
        return _of_fastai(data)
    if isinstance(data, Dataset) or type(data).__module__.partition(".")[0] == "datasets":
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader):
        return _of_loader(data, _batch)
    if not isinstance(data, Iterable) or isinstance(data, str) or type(data).__module__.startswith("fastai."):
        raise not_one_of("data", "a loader, a data set, an iterable of batches or tensors", data)
    count = len(data) if isinstance(data, Sized) else None
    return Source(lambda: map(_batch, data), None, count, repeats=iter(data) is not data)


def _batch(item: Any) -> Batch:
    """Return a batch, or refuse a row of a data set of texts, or rows that nobody has padded.

    Raises:
        TypeError: It is one: a list stands where a tensor is meant.
    """
    batch = as_batch(item)
    bare = next((name for name, x in batch.keywords.items() if isinstance(x, list)), None)
    if bare is not None:
        raise TypeError(
            f"data must give batches of tensors, got a list under {bare}; pass DataLoader(data, batch_size=64, collate_fn=...) "
            "with what pads and stacks rows, such as DataCollatorWithPadding(tokenizer)"
        )
    return batch


def _of_tensors(whole: Batch, batch_size: int) -> Source:
    count = next((len(x) for x in tree_leaves((whole.inputs, dict(whole.keywords))) if isinstance(x, Tensor) and x.dim()), 0)
    if not count:
        raise ValueError(f"data must hold tensors with a row for each sample, got {whole!r}")

    def piece(start: int) -> Batch:
        def cut(x: Any) -> Any:
            return x[start : start + batch_size] if isinstance(x, Tensor) and x.dim() and len(x) == count else x

        return Batch(tree_map(cut, whole.inputs), (), tree_map(cut, dict(whole.keywords)))

    starts = range(0, count, batch_size)
    return Source(lambda: map(piece, starts), None, len(starts))


def _fastai_kind(data: Any) -> str:
    """Return the name of fastai's class of loaders that a value is of; empty if it is none."""
    names = {base.__name__ for base in type(data).__mro__ if base.__module__.startswith("fastai.")}
    return next((name for name in ("DataLoaders", "DataLoader") if name in names), "")


def _as_in_fastai(item: Any, loader: Any = None) -> Batch:
    """Return a batch as fastai's Learner divides it: all but the last are inputs, unless the loader says otherwise."""
    items = tuple(item) if isinstance(item, tuple | list) else (item,)
    split = getattr(loader, "n_inp", max(1, len(items) - 1))
    return Batch(items[:split], items[split:])


def _of_fastai(loader: Any) -> Source:
    """Return all samples of fastai's loader once, in their order, with its transforms."""
    ordered = loader.new(shuffle=False, drop_last=False)

    def batches() -> Iterator[Batch]:
        return (_as_in_fastai(item, loader) for item in ordered)

    def few() -> Batch:
        return next(batches())

    return Source(batches, few, len(ordered))


def _of_loader(loader: Any, divide: Callable[[Any], Batch]) -> Source:
    """Return the batches of torch's loader."""
    _check_all_are_there(loader)
    count = None if isinstance(loader.dataset, IterableDataset) else len(loader)

    def few() -> Batch:
        samples = [loader.dataset[i] for i in range(min(FEW, len(loader.dataset)))]
        return divide(loader.collate_fn(samples))

    can_index = hasattr(loader.dataset, "__getitem__") and isinstance(loader.dataset, Sized) and loader.batch_size is not None
    return Source(lambda: map(divide, loader), few if can_index and len(loader.dataset) else None, count)


def _check_all_are_there(loader: Any) -> None:
    """Refuse a loader that leaves other samples out in each epoch, and tell of one that leaves out the same."""
    if not getattr(loader, "drop_last", False) or isinstance(loader.dataset, IterableDataset):
        return
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    count = len(sampler) if isinstance(sampler, Sized) else len(loader.dataset)
    if not (left := count % size):
        return
    repair = f"pass DataLoader(data.dataset, batch_size={size}) with the same collate_fn"
    if not isinstance(sampler, SequentialSampler):
        raise ValueError(
            f"data must give every sample, got a shuffled loader whose drop_last leaves out {left} of {count:,}, others in "
            f"each epoch; {repair}"
        )
    warn(f"data leaves out {left} of {count:,} samples by drop_last: a training that meets them is refused; {repair}")


@contextmanager
def untouched_generators(data: Any) -> Iterator[None]:
    """Restore the random generators that going through data moves on: the global ones, and the loader's own."""
    before, own = keep_random_state(), getattr(data, "generator", None)
    generators = [own] if isinstance(own, torch.Generator) else []
    states = [one.get_state() for one in generators]
    try:
        yield
    finally:
        put_random_state_(before)
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
