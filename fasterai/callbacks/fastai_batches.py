"""A learner's batch as participants see it: plain tensors, and the labels of samples that fastai has mixed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner
from torch import Tensor
from torch.utils._pytree import tree_map

from fasterai.core.batch import Batch

__all__ = ["batch_of", "plain"]


def batch_of(learn: Learner, *, with_outputs: bool = False) -> Batch:
    """Return the batch under way, of plain tensors: fastai's own kinds refuse to meet each other in a function of torch.

    Args:
        learn: The learner.
        with_outputs: Whether the model has run on it; then labels of samples that `MixUp` or `CutMix` has mixed are shares.
    """
    inputs, targets = plain(tuple(learn.xb)), plain(tuple(learn.yb))
    if not with_outputs:
        return Batch(inputs, targets)
    outputs = plain(learn.pred)
    mixes = [one for one in learn.cbs if isinstance(one, MixHandler) and getattr(one, "stack_y", False)]
    if mixes and len(targets) == 1 and isinstance(outputs, Tensor):
        (others,) = plain(mixes[-1].yb1)
        targets = (_shares(targets[0], others, plain(mixes[-1].lam), outputs),)
    return Batch(inputs, targets, outputs=outputs)


def _shares(labels: Tensor, others: Tensor, share: Tensor, logits: Tensor) -> Tensor:
    """Return `share * onehot(labels) + (1 - share) * onehot(others)`, of the shape of the logits.

    For 3 classes, 0.75 of class 0 and the rest of class 2 are `[0.75, 0, 0.25]`.
    """
    dim = 1 if logits.shape[:1] + logits.shape[2:] == labels.shape else -1
    first, second = (F.one_hot(x.long(), logits.shape[dim]).movedim(-1, dim) for x in (labels, others))
    share = share.reshape(-1, *[1] * (logits.dim() - 1))
    return share * first + (1 - share) * second


def plain(values: Any) -> Any:
    """Return tensors, alone or in tuples and dicts, as plain ones; those that are stay the same objects."""
    return tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x, values)
