"""Wider networks by the channel graph: channels that are added are the reverse of channels that are removed.

Every size is worked out from what the removal of one channel would make of it. A layer of 16 channels that would keep 15 has
16 + 4 after 4 are added; the sizes of several groups add up, as where two of them are concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.graph.channels import ChannelGraph
from fasterai.model.slim_norms import can_be_slim
from fasterai.prune.surgery.plan import Plan, make_plan, tensor_of, tensors_of
from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention

__all__ = ["widen_"]


def widen_(model: nn.Module, graph: ChannelGraph, counts: Mapping[str, int]) -> None:
    """Add channels to groups of a network; its values are repeated, and are to be set anew.

    Args:
        model: The network; changed in place. If it fails, nothing is said about its state.
        graph: Its channel graph.
        counts: Group's name -> number of channels to add.
    """
    plans = [(_without_one(model, graph, i), counts.get(group.name, 0)) for i, group in enumerate(graph.groups)]
    tensors = tensors_of(model)
    sizes: dict[tuple[str, int], int] = {}
    attributes: dict[tuple[str, str], Any] = {}
    heads: dict[str, int] = {}
    for plan, count in plans:
        for (name, d), kept in plan.keep.items():
            size = plan.shapes[name][d]
            sizes[name, d] = sizes.get((name, d), size) + count * (size - len(kept))
        for module, attribute, before, after in plan.attributes:
            now = attributes.get((module, attribute), before)
            attributes[module, attribute] = _more(now, before, after, count)
        for name, left in plan.slim.items():
            if can_be_slim(model.get_submodule(name)):  # it has more channels, and none that were zero
                continue
            whole = _attention(model, name).num_heads
            heads[name] = heads.get(name, whole) + count * (whole - left)
    for (name, d), size in sizes.items():
        tensor = tensor_of(tensors, name)
        tensor.data = _repeated(tensor.data, d, size)
    for (module, attribute), value in attributes.items():
        owner, _, own = attribute.rpartition(".")
        holder = model.get_submodule(module)
        setattr(attrgetter(owner)(holder) if owner else holder, own, value)
    for name, count in heads.items():
        _put_heads(model, name, count)


def _without_one(model: nn.Module, graph: ChannelGraph, group: int) -> Plan:
    kept = [np.ones(g.channels, np.bool_) for g in graph.groups]
    kept[group][-1] = False
    return make_plan(model, graph, kept, streams=True)


def _more(now: Any, before: Any, after: Any, count: int) -> Any:
    """Return a size with `count` channels more, given what it is before and after the removal of one.

    >>> _more(16, 16, 15, 4), _more((8, 3), (8, 3), (6, 3), 2)
    (20, (12, 3))
    """
    if isinstance(before, tuple | list):
        return type(before)(_more(*one, count) for one in zip(now, before, after, strict=True))
    return now + count * (before - after) if isinstance(before, int) and not isinstance(before, bool) else now


def _repeated(values: Tensor, d: int, size: int) -> Tensor:
    """Repeat values along a dimension, from the first on, up to a size."""
    return values.index_select(d, torch.arange(size, device=values.device) % values.shape[d])


def _attention(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _put_heads(model: nn.Module, name: str, heads: int) -> None:
    """Give an attention another number of heads, which need not fill its width."""
    attention = _attention(model, name)
    if isinstance(attention, SlimMultiheadAttention):
        attention.num_heads = heads
        return
    slim = SlimMultiheadAttention(attention, heads)
    for parent in list(model.modules()):
        places: Sequence[str] = [key for key, child in parent._modules.items() if child is attention]
        for key in places:
            setattr(parent, key, slim)
