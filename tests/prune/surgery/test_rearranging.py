from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.rearranging import can_be_written_out, rearranged


@pytest.mark.parametrize(
    ("pattern", "lengths", "expected"),
    [
        ("b n (h d) -> b h n d", {"h": 2}, lambda x: x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)),
        ("b (n p) c -> (b n) (c p)", {"p": 3}, lambda x: x.reshape(2, 1, 3, 8).transpose(0, 1, 3, 2).reshape(2, 24)),
        (
            "b n (d1 d2 d3) -> d2 () b (n d3 d1)",
            {"d1": 2, "d3": 2},
            lambda x: x.reshape(2, 3, 2, 2, 2).transpose(3, 0, 1, 4, 2).reshape(2, 1, 2, 12),
        ),
    ],
)
def test_a_pattern_does_what_it_says(pattern, lengths, expected):
    x = np.arange(48.0).reshape(2, 3, 8)
    found = rearranged(SimpleNamespace(pattern=pattern, axes_lengths=lengths), torch.from_numpy(x))
    np.testing.assert_array_equal(found.numpy(), expected(x))


class Attention(nn.Module):
    """Heads by einops' layers, which have their number written into them."""

    def __init__(self) -> None:
        super().__init__()
        layers = pytest.importorskip("einops.layers.torch")
        self.qkv, self.out = nn.Linear(6, 24, bias=False), nn.Linear(8, 3)
        self.split, self.merge = layers.Rearrange("b n (h d) -> b h n d", h=4), layers.Rearrange("b h n d -> b n (h d)")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.merge((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def silent() -> Attention:
    """Heads 1 and 3 of queries, keys and values are zero."""
    net = Attention().double().eval()
    with torch.no_grad():
        net.qkv.weight.view(3, 4, 2, 6)[:, 1::2] = 0.0
    return net


def test_heads_go_where_einops_has_their_number(tmp_path):
    net, x = silent(), torch.randn(2, 5, 6, dtype=torch.float64)
    wanted, shorter, before = net(x), net(x[:1, :3]), type(net.split)
    result = remove(net, x, measure=False)
    assert result.refused == {} and net.qkv.weight.shape == (12, 6) and isinstance(net.split, before)
    assert list(result.plan.rewrites) == ["split"]
    for model in (net, copy.deepcopy(net)):
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x[:1, :3]), shorter, rtol=0, atol=1e-12)
    save_small(tmp_path / "small.safetensors", net)
    again = load_small(tmp_path / "small.safetensors", Attention().double().eval())
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=1e-12)


def test_a_pattern_that_leaves_axes_open_is_left_alone():
    layers = pytest.importorskip("einops.layers.torch")
    assert can_be_written_out(layers.Rearrange("b c -> c b"))
    assert not can_be_written_out(layers.Rearrange("b ... -> ... b"))
    assert not can_be_written_out(layers.Reduce("b c -> b", "mean"))
    assert not can_be_written_out(nn.Linear(1, 1))
