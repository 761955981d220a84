"""The slim attention is compared with torch's own, whose heads are silenced."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention

KINDS: list[dict[str, Any]] = [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 5, "batch_first": True}]


def masked_and_slim(**how: Any) -> tuple[nn.MultiheadAttention, SlimMultiheadAttention]:
    """Four heads of two features, the second and the last silent, and what is left of them."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(8, 4, **how).double().eval()
    stays = torch.tensor([0, 1, 4, 5])
    silent = torch.tensor([2, 3, 6, 7])
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.rand_like(parameter))
        whole.out_proj.weight[:, silent] = 0
        slim = SlimMultiheadAttention(copy.deepcopy(whole), 2)
        for name, parameter in slim.named_parameters():
            if name.startswith("in_proj"):
                parameter.data = parameter[torch.cat([stays, stays + 8, stays + 16])]
            elif name.endswith("proj_weight"):
                parameter.data = parameter[stays]
        slim.out_proj.weight.data = slim.out_proj.weight[:, stays]
        slim.out_proj.in_features = 4
    return whole, slim


def inputs(kind: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, n, f, dtype=torch.float64, generator=generator)
        for n, f in ((3, 8), (5, kind.get("kdim", 8)), (5, kind.get("vdim", 8)))
    )
    return (q, k, v) if kind.get("batch_first") else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


PADDING = torch.tensor([[False, False, True, False, True], [False] * 5])
CALLS: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"attn_mask": torch.ones(3, 5).triu(2).bool()},
    {"attn_mask": torch.randn(3, 5, dtype=torch.float64), "need_weights": False},
    {"attn_mask": torch.ones(3, 5).triu(2).bool(), "key_padding_mask": PADDING},
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: " ".join(c) or "plain")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_attends_as_the_whole_one_with_silent_heads_does(kind: dict[str, Any], call: dict[str, Any]) -> None:
    whole, slim = masked_and_slim(**kind)
    wanted, wanted_weights = whole(*inputs(kind), **call)
    found, found_weights = slim(*inputs(kind), **call)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (found_weights is None) == (wanted_weights is None)
    if found_weights is not None and "average_attn_weights" in call:
        torch.testing.assert_close(found_weights, wanted_weights[:, [0, 2]], rtol=0, atol=1e-12)
    elif found_weights is not None:
        assert found_weights.shape == wanted_weights.shape
        torch.testing.assert_close(found_weights.sum(-1), torch.ones_like(found_weights[..., 0]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(kind: dict[str, Any], need_weights: bool) -> None:
    whole, slim = masked_and_slim(**kind)
    single = tuple(x[0] if kind.get("batch_first") else x[:, 0] for x in inputs(kind))
    for call in ({}, {"key_padding_mask": PADDING[0]}):
        wanted = whole(*single, need_weights=need_weights, **call)
        found = slim(*single, need_weights=need_weights, **call)
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-12)
        assert (found[1] is None) == (wanted[1] is None)
        assert found[1] is None or found[1].shape == wanted[1].shape


def test_parameters_hooks_and_attributes_are_those_of_the_whole() -> None:
    whole = nn.MultiheadAttention(8, 4, dropout=0.1).train()
    whole.note = "mine"
    calls: list[int] = []
    handle = whole.register_forward_hook(lambda *_: calls.append(1))
    slim = SlimMultiheadAttention(whole, 4)
    assert [(n, id(p)) for n, p in slim.named_parameters()] == [(n, id(p)) for n, p in whole.named_parameters()]
    assert (slim.note, slim.training, slim.dropout) == ("mine", True, 0.1)
    slim(*(torch.randn(2, 3, 8) for _ in range(3)))
    handle.remove()
    slim(*(torch.randn(2, 3, 8) for _ in range(3)))
    assert calls == [1]


def test_it_can_be_copied_and_pickled() -> None:
    _, slim = masked_and_slim()
    x = inputs({})
    for other in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(other(*x)[0], slim(*x)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_torchs_encoder_layer_runs_with_it(grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    wanted = layer(x, src_key_padding_mask=PADDING)
    layer.self_attn = SlimMultiheadAttention(layer.self_attn, 4)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x, src_key_padding_mask=PADDING), wanted)


def test_masks_that_it_cannot_read_are_refused() -> None:
    _, slim = masked_and_slim()
    with pytest.raises(ValueError, match=r"attn_mask must be \(L, S\)"):
        slim(*inputs({}), attn_mask=torch.zeros(8, 3, 5))
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True, got None"):
        slim(*inputs({}), is_causal=True)


@pytest.mark.parametrize("how", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attention must be without bias_k and add_zero_attn"):
        SlimMultiheadAttention(nn.MultiheadAttention(8, 4, **how), 2)
