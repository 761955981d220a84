"""L4. `nn.MultiheadAttention` with fewer heads than its embedding holds: the same call, the same results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SlimMultiheadAttention", "encoders_of"]


class SlimMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` after heads were removed; made from one, never by hand.

    The parameters are the very ones of the module that it replaces, under the same names, so that an optimizer, a checkpoint
    and the names of the masks go on.

    Attributes:
        embed_dim: Features that come in and go out.
        num_heads: Heads; they need not fill `embed_dim`.
        head_dim: Features of a head.
    """

    def __init__(self, attention: nn.MultiheadAttention, num_heads: int) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention must be without bias_k and add_zero_attn to have heads removed")
        # Parameters, hooks and whatever a user has put there; the very dicts, so that handles of hooks still remove them.
        vars(self).update(vars(attention))
        self.num_heads = num_heads
        self._qkv_same_embed_dim = False  # nn.TransformerEncoderLayer then leaves its fused kernel alone
        self.out_proj: nn.Module
        self.embed_dim: int
        self.head_dim: int
        self.dropout: float
        self.batch_first: bool
        self.in_proj_weight: nn.Parameter | None
        self.in_proj_bias: nn.Parameter | None

    def reset_parameters(self) -> None:
        """Draw the projections anew, as `nn.MultiheadAttention` does."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (weight := self._parameters.get(name)) is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as `nn.MultiheadAttention.forward` does.

        Args:
            query: `(N, L, E)` if `batch_first`, else `(L, N, E)`; `(L, E)` without a batch.
            key: Likewise with length S.
            value: Likewise with length S.
            key_padding_mask: `(N, S)`, True (or minus infinity) where a key is padding.
            need_weights: Also return the attention.
            attn_mask: `(L, S)` or `(N * heads of the whole, L, S)`, True (or minus infinity) where attending is not allowed.
            average_attn_weights: Return the attention averaged over heads, not `(N, heads, L, S)`.
            is_causal: A hint that `attn_mask` is causal; the mask counts.

        Returns:
            The output in the query's layout, and the attention or None.
        """
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, got None")
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            attended = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if single:
            output = output.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Tensor, ...]
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = tuple(self.get_parameter(f"{x}_proj_weight") for x in "qkv")
        biases: tuple[Tensor | None, ...] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """Return the sum of the masks as numbers to add to the scores, `(N or 1, 1, L or 1, S)`; None without masks."""
        total = None
        if attention is not None:
            if attention.dim() == 3:
                raise ValueError(
                    f"attn_mask must be (L, S) after heads were removed, got {tuple(attention.shape)}, a mask per head"
                )
            total = _additive(attention, q.dtype)
        if padding is not None:
            added = _additive(padding, q.dtype)[:, None, None, :]
            total = added if total is None else total + added
        return total


def encoders_of(model: nn.Module, attention: nn.Module) -> list[nn.TransformerEncoder]:
    """List the encoders that contain an attention; they must not use nested tensors once it is slim."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    return [encoder for encoder in encoders if any(m is attention for m in encoder.modules())]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    return mask.to(dtype)
