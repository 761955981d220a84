from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.model.slim_averages import Counting
from fasterai.model.slim_norms import can_be_slim, dense_size, is_slim, put_dense_size, slimmable


class ByHand(nn.Module):
    """A layer norm as people write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


class AsTransformers(nn.Module):
    """An RMS norm as most of the transformers have it, but for the names of variables."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))
        self.variance_epsilon = 1e-3

    def forward(self, hidden: Tensor) -> Tensor:
        given = hidden.dtype
        hidden = hidden.to(torch.float32)
        square = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(square + self.variance_epsilon)
        return self.weight * hidden.to(given)


class AlmostAsTransformers(AsTransformers):
    """One that multiplies by eps: its code has the same names and numbers in the same order."""

    def forward(self, hidden: Tensor) -> Tensor:
        given = hidden.dtype
        hidden = hidden.to(torch.float32)
        square = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(square * self.variance_epsilon)
        return self.weight * hidden.to(given)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer without scale": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "rms": nn.RMSNorm,
    "by hand": ByHand,
    "as transformers": AsTransformers,
    "almost": AlmostAsTransformers,
}


def small(norm: nn.Module, size: int | None) -> nn.Module:
    put_dense_size(norm, size)
    return norm


@pytest.mark.parametrize("kind", NORMS)
def test_a_slim_norm_is_as_good_as_the_wide_one(kind: str) -> None:
    """The same call, names and copies; with None it is as it was."""
    norm, x = NORMS[kind](6), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    names, before, dense = list(norm.state_dict()), norm(x), type(norm)
    wide = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(wide, name, nn.Parameter(F.pad(parameter.detach(), (0, 4))))
    wide.normalized_shape = (10,)
    put_dense_size(norm, 10)
    wanted = wide(F.pad(x, (0, 4)))[..., :6]
    for one in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert isinstance(one, dense) and is_slim(one) and dense_size(one) == 10
        assert list(one.state_dict()) == names
        torch.testing.assert_close(one(x), wanted)
    put_dense_size(norm, None)
    assert type(norm) is dense and not is_slim(norm) and "dense_size" not in vars(norm)
    assert torch.equal(norm(x), before)


@pytest.mark.parametrize("kind", [AsTransformers, AlmostAsTransformers])
def test_code_that_is_known_is_not_watched_and_gives_the_same_bits(kind: type[nn.Module], monkeypatch: Any) -> None:
    norm, x = kind(6), torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Counting(10):
        wanted = norm(x)
    watched: list[int] = []
    monkeypatch.setattr("fasterai.model.slim_norms.Counting", lambda size: watched.append(size) or Counting(size))
    assert torch.equal(small(norm, 10)(x), wanted) and not torch.equal(small(norm, None)(x), wanted)
    assert watched == ([] if kind is AsTransformers else [10])


def test_a_slim_group_norm_remembers_the_channels_of_a_group() -> None:
    norm, x = nn.GroupNorm(2, 6), torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    put_dense_size(norm, 5)
    wide = F.group_norm(F.pad(x.view(2, 2, 3, 4), (0, 0, 0, 2)).flatten(1, 2), 2).view(2, 2, 5, 4)
    torch.testing.assert_close(norm(x), wide[:, :, :3].flatten(1, 2))
    assert dense_size(norm) == 5 and dense_size(nn.GroupNorm(2, 6)) == 3


def test_a_slim_module_of_ones_own_runs_in_every_other_form() -> None:
    """`torch.export` with other sizes, `torch.compile` as one graph, and training give the same."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 6), small(ByHand(6), 10), small(nn.LayerNorm(6), 10), small(nn.RMSNorm(6), 9))
    x, other = torch.randn(2, 5, 3), torch.randn(4, 7, 3)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(net, (x,), dynamic_shapes=sizes, strict=False)
    torch.testing.assert_close(program.module()(other), net(other))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).square().sum().backward()
    first = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(x).square().sum().backward()
    torch.testing.assert_close(first, [p.grad for p in net.parameters() if p.grad is not None])


def test_an_exported_program_has_their_gradients_and_takes_other_sizes() -> None:
    net = nn.Sequential(small(nn.LayerNorm(6), 10), small(nn.GroupNorm(2, 4), 3))
    x, other = (torch.randn(2, 4, 6, requires_grad=True), torch.randn(5, 4, 6, requires_grad=True))
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False).module()
    (wanted,) = torch.autograd.grad(net(other).sin().sum(), other)
    found = program(other)
    torch.testing.assert_close(found, net(other))
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), other)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_under_autocast_the_type_is_that_of_the_dense_norm(kind: str, dtype: torch.dtype) -> None:
    norm, x = NORMS[kind](6), torch.randn(2, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = norm(x)
        found = small(norm, 6)(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


def test_modules_that_cannot_be_told_are_left_out() -> None:
    net = nn.ModuleDict({
        "own": ByHand(4),
        "norm": nn.LayerNorm(4),
        "two": nn.LayerNorm((4, 4)),
        "linear": nn.Linear(4, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "graph": torch.fx.symbolic_trace(ByHand(4)),
    })  # fmt: skip
    assert slimmable(net) == {"own", "norm"}
    assert not can_be_slim(None)
    assert not can_be_slim(nn.utils.parametrizations.weight_norm(ByHandMatrix()))


class ByHandMatrix(nn.Module):
    """A module whose weight can be parametrised."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
