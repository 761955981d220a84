"""Sizes that modules keep as attributes, such as `in_features`, and their values after a cut.

To add a module class: a function `(module, old shapes, new shapes, kept indices) -> attribute -> new value`, registered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from torch import nn

from fasterai.graph.labels import Array

__all__ = ["EXPERTS", "HEADS", "STREAMS", "WIDTHS", "new_sizes"]

Shapes = Mapping[str, tuple[int, ...]]
Kept = Mapping[tuple[str, int], Array]
#: Numbers of channels that are several indices each, as heads and the equal parts of a split are; widths of all of them.
HEADS = (
    *("num_heads", "n_heads", "nheads", "n_head", "nhead", "num_head", "num_attention_heads", "num_key_value_heads"),
    *("heads", "width", "c"),  # the last is that of ultralytics' blocks
)
WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "hidden_dim", "split_size", "dim", "expand_chs")
#: Numbers of experts, as models call them; in a config too.
EXPERTS = (
    *("num_experts", "num_local_experts", "n_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
    *("expert_count", "experts_count"),
)
#: Widths of streams, as models call them.
STREAMS = ("hidden_dim", "hidden_size", "embed_dim", "d_model", "dim", "n_embd", "width", "channels", "num_features")


@singledispatch
def new_sizes(module: nn.Module, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    """Return attribute -> new value, for a module whose parameters get other shapes.

    Args:
        module: The module, still as it was.
        old: Name of a parameter or buffer of its own -> shape.
        new: The same after the surgery.
        keep: Name and dimension -> the indices that stay, where not all do.
    """
    if hasattr(module, "nf") and "weight" in new:  # the transformers' Conv1D, a linear layer with its weight turned
        return {"nf": new["weight"][1]} | ({"nx": new["weight"][0]} if hasattr(module, "nx") else {})
    shrunk: dict[Any, int] = {b: a for n in new for b, a in zip(old[n], new[n], strict=True) if b != a}
    # A filter that is a buffer keeps its channels, a table of relative positions the shape of what is read off it.
    known = {name: vars(module).get(name) for name in ("channels", "bias_shape", "normalized_shape")}
    sizes = {k: tuple(shrunk.get(n, n) for n in v) if isinstance(v, tuple) else shrunk.get(v, v) for k, v in known.items()}
    return {k: v for k, v in sizes.items() if v != known[k]}


@new_sizes.register(nn.modules.conv._ConvNd)
def _(module: nn.modules.conv._ConvNd, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    before, after, groups = old["weight"], new["weight"], module.groups
    if groups > 1 and ("weight", 0) in keep:  # either whole groups went, or the same indices of each
        groups = len(set((keep["weight", 0] // (before[0] // groups)).tolist()))
    if module.transposed:
        return {"in_channels": after[0], "out_channels": groups * after[1], "groups": groups}
    return {"in_channels": groups * after[1], "out_channels": after[0], "groups": groups}


@new_sizes.register(nn.Linear)
def _(module: nn.Linear, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"in_features": new["weight"][1], "out_features": new["weight"][0]}


@new_sizes.register(nn.Bilinear)
def _(module: nn.Bilinear, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return dict(zip(("out_features", "in1_features", "in2_features"), new["weight"], strict=True))


@new_sizes.register(nn.modules.batchnorm._NormBase)
def _(module: nn.modules.batchnorm._NormBase, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"num_features": next((s[0] for s in new.values() if s), module.num_features)}


@new_sizes.register(nn.GroupNorm)
def _(module: nn.GroupNorm, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    channels, width = new["weight"][0], module.num_channels // module.num_groups
    # Whole groups went, or the same channels of each.
    groups = len(set((keep["weight", 0] // width).tolist())) if ("weight", 0) in keep else module.num_groups
    return {"num_channels": channels, "num_groups": groups}


@new_sizes.register(nn.LayerNorm)
@new_sizes.register(nn.RMSNorm)
def _(module: nn.Module, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"normalized_shape": tuple(new["weight"])}


@new_sizes.register(nn.Embedding)
@new_sizes.register(nn.EmbeddingBag)
def _(module: nn.Module, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"embedding_dim": new["weight"][1]}


@new_sizes.register(nn.PReLU)
def _(module: nn.PReLU, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"num_parameters": new["weight"][0]}


@new_sizes.register(nn.RNNBase)
def _(module: nn.RNNBase, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"input_size": new["weight_ih_l0"][1], "hidden_size": new["weight_hh_l0"][1]}


@new_sizes.register(nn.RNNCellBase)
def _(module: nn.RNNCellBase, old: Shapes, new: Shapes, keep: Kept) -> dict[str, Any]:
    return {"input_size": new["weight_ih"][1], "hidden_size": new["weight_hh"][1]}
