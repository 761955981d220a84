"""Example inputs of a model: as a tuple of arguments, from the batches of its training, and in batches of another size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.loop import Batch, Fit
from fasterai.model.names import unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = ["arguments", "as_batch", "as_tuple", "batch_inputs", "batch_of", "few_samples", "listed_samples", "positional"]
__all__ += ["sample_count"]

SAMPLES = 2  # enough to follow the operations, and to compare outputs


def as_batch(item: Any) -> Batch:
    """Return a batch from what a data loader yields: `x`, `(x, y)`, `((x1, x2), y)`, or a dict of keywords."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        return Batch(keywords=dict(item))
    if isinstance(item, tuple | list):
        if isinstance(item[0], Mapping):
            return Batch(targets=tuple(item[1:]), keywords=dict(item[0]))
        inputs = tuple(item[0]) if isinstance(item[0], tuple | list) else (item[0],)
        return Batch(inputs, tuple(item[1:]))
    return Batch((item,))


def arguments(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
    """Return the positional arguments that a model gets for a batch.

    Keywords stand in the order of the model's `forward`; if it has no such arguments, they are one argument, a dict.

    Raises:
        ValueError: A keyword has no position in `forward`.
    """
    if not batch.keywords:
        return batch.inputs
    try:
        bound = inspect.signature(unwrap(model).forward).bind(*batch.inputs, **batch.keywords)
    except TypeError:
        return (*batch.inputs, dict(batch.keywords))
    bound.apply_defaults()
    placeless = [name for name in bound.kwargs if name in batch.keywords]
    if placeless:
        raise ValueError(f"the batch's keywords must have positions in the model's forward, got {', '.join(placeless)}")
    given = {id(value) for value in (*batch.inputs, *batch.keywords.values())}
    last = max((i for i, value in enumerate(bound.args) if id(value) in given), default=-1)
    return bound.args[: last + 1]


def batch_inputs(model: nn.Module, fit: Fit) -> tuple[Any, ...]:
    """Take a few samples of the loop's batch, as the model gets them.

    Raises:
        ValueError: The loop shows no batch, or the model does not run on it.
    """
    if fit.batch is None or not (fit.batch.inputs or fit.batch.keywords):
        raise ValueError("example_inputs must be given for a loop that shows no batch, got None")
    inputs = few_samples(arguments(model if fit.model is None else fit.model, fit.batch))
    if fit.model is None or unwrap(fit.model) is unwrap(model):
        return inputs
    seen: list[tuple[Any, ...]] = []
    hook = model.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        with undisturbed(fit.model), evaluating(fit.model), torch.no_grad():
            fit.model(*inputs)
    except Exception as error:
        raise ValueError(
            f"example_inputs must be given where the whole model does not run on the loop's batch, got None ({error})"
        ) from error
    finally:
        hook.remove()
    if not seen:
        raise ValueError("model must be part of the trained model's forward pass, got one that it does not run")
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in seen[0])


def few_samples(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take the first samples of a batch: plain tensors, copies."""
    count = sample_count(inputs)
    if listed_samples(inputs):
        inputs, count = batch_of(inputs, min(SAMPLES, count)), -1

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        plain = x.detach().as_subclass(Tensor)
        return plain[:SAMPLES].clone() if x.dim() and len(x) == count else plain.clone()

    return tuple(tree_map(cut, x) for x in inputs)


def batch_of(inputs: tuple[Any, ...], size: int | None, samples: int | None = None) -> tuple[Any, ...]:
    """Repeat the samples of inputs in turn, or cut them, to a batch of another size.

    Args:
        inputs: Positional arguments; tensors with as many rows as there are samples are batches, all else stays.
        size: The number of samples to have; None leaves the inputs as they are.
        samples: The number of samples that there are; the rows of the first tensor if it is left out.

    Raises:
        ValueError: There is no tensor with a sample.
    """
    if size is None:
        return inputs
    samples = sample_count(inputs) if samples is None else samples
    if not samples:
        raise ValueError("example_inputs must hold a tensor with at least one sample to make batches of; pass batch_sizes=None")
    if count := listed_samples(inputs):
        is_list = [isinstance(x, list | tuple) and len(x) == count for x in inputs]
        return tuple([x[i % count] for i in range(size)] if y else x for x, y in zip(inputs, is_list, strict=True))

    def resized(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != samples:
            return x
        return x[torch.arange(size, device=x.device) % samples]

    result: tuple[Any, ...] = tree_map(resized, inputs)
    return result


def sample_count(inputs: tuple[Any, ...]) -> int:
    """Count the rows of the first tensor that has any dimension, or the images of a list; 0 without one."""
    if count := listed_samples(inputs):
        return count
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 0)


def listed_samples(inputs: tuple[Any, ...]) -> int:
    """Count the images of a first argument that is a list of them, each (C, H, W), as detectors take it; 0 where it is none.

    >>> listed_samples(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)],)), listed_samples((torch.zeros(2, 3, 8, 8),))
    (2, 0)
    """
    first = inputs[0] if inputs else None
    if not isinstance(first, list | tuple) or not all(isinstance(x, Tensor) and x.is_floating_point() for x in first):
        return 0
    return len(first) if all(x.dim() == 3 for x in first) else 0


def positional(example_inputs: Any) -> tuple[Any, ...]:
    """Return example inputs as positional arguments, or refuse None.

    Raises:
        ValueError: There are none.
    """
    if example_inputs is None:
        raise ValueError("example_inputs must be a tensor, or a tuple of what the model takes, got None")
    return as_tuple(example_inputs)


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Return example inputs as positional arguments: a tuple or list as it is, anything else alone."""
    return tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
