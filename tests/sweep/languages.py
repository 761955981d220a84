"""x-transformers' networks, small: one option of its attention, its feed-forward or its norms each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

SIZES = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16}
#: Name -> the layers' class, and what differs from the plain network.
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("Decoder", {}),
    "encoder": ("Encoder", {}),
    "flash": ("Decoder", {"attn_flash": True}),
    "rmsnorm": ("Decoder", {"use_rmsnorm": True}),
    "scalenorm": ("Decoder", {"use_scalenorm": True}),
    "simple-rmsnorm": ("Decoder", {"use_simple_rmsnorm": True}),
    "post-norm": ("Decoder", {"pre_norm": False}),
    "sandwich-norm": ("Decoder", {"sandwich_norm": True}),
    "swiglu": ("Decoder", {"ff_swish": True, "ff_glu": True}),
    "relu-squared": ("Decoder", {"ff_relu_squared": True}),
    "no-bias": ("Decoder", {"ff_no_bias": True}),
    "one-kv-head": ("Decoder", {"attn_one_kv_head": True}),
    "grouped": ("Decoder", {"attn_kv_heads": 2}),
    "rotary": ("Decoder", {"rotary_pos_emb": True}),
    "alibi": ("Decoder", {"alibi_pos_bias": True, "alibi_num_heads": 2}),
    "relative": ("Decoder", {"rel_pos_bias": True}),
    "qk-norm": ("Decoder", {"attn_qk_norm": True}),
    "talking-heads": ("Decoder", {"attn_pre_talking_heads": True}),
    "gated-values": ("Decoder", {"attn_gate_values": True}),
    "gated-heads": ("Decoder", {"attn_gate_value_heads": True}),
    "sparse-topk": ("Decoder", {"attn_sparse_topk": 4}),
    "memory": ("Decoder", {"attn_num_mem_kv": 4}),
    "macaron": ("Decoder", {"macaron": True}),
    "shifted": ("Decoder", {"shift_tokens": 1}),
    "residual-attention": ("Decoder", {"residual_attn": True}),
    "gated-residual": ("Decoder", {"gate_residual": True}),
    "hyper-connections": ("Decoder", {"num_residual_streams": 2}),
    "cross": ("Decoder", {"cross_attend": True}),
    "image": ("Encoder", {}),
    "continuous": ("Decoder", {}),
    "translation": ("", {}),
}
NAMES = tuple(TABLE)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network, and tokens, or an image."""
    import x_transformers

    kind, options = TABLE[name]
    tokens = torch.randint(0, 99, (2, 12))
    if name == "translation":
        both = {f"{side}_{k}": v for side in ("enc", "dec") for k, v in _sizes().items()}
        return x_transformers.XTransformer(dim=32, **both), (tokens, tokens[:, :8])
    layers = getattr(x_transformers, kind)(**SIZES, **options)
    if name == "image":
        made = x_transformers.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)
        return made, (torch.randn(2, 3, 32, 32),)
    if name == "continuous":
        made = x_transformers.ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=16, attn_layers=layers)
        return made, (torch.randn(2, 12, 8),)
    model = x_transformers.TransformerWrapper(num_tokens=99, max_seq_len=16, attn_layers=layers)
    return (_Reading(model), (tokens, torch.randn(2, 6, 32))) if name == "cross" else (model, (tokens,))


def _sizes() -> dict[str, Any]:
    return {"num_tokens": 99, "depth": 1, "heads": 4, "max_seq_len": 16, "attn_dim_head": 16}


class _Reading(nn.Module):
    """A decoder that reads what an encoder gave it, as its second argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, context: Tensor) -> Any:
        return self.model(tokens, context=context)
