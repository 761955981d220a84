"""Small networks around single operations, and what must hold of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove

aten = torch.ops.aten
Place = tuple[str, int]


@torch.library.custom_op("tests::grouped_mm_fallback", mutates_args=())
def grouped_mm_fallback(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows by experts, as one opaque operation, as libraries of language models have it."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[i:j] @ w for i, j, w in zip(starts, ends.tolist(), weight, strict=True)])


@grouped_mm_fallback.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


class Net(nn.Module):
    """Layers by name, and a forward pass as a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
            elif isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.register_buffer(name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A network around some operations.

    `goes`: place -> how many channels its group has. `stays`: place -> what the reason says. `where`: which of the
    operation's names must stand in the exported program.
    """

    ops: tuple[str, ...]
    run: Callable[..., Any]
    layers: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    goes: dict[Place, int] = field(default_factory=dict)
    stays: dict[Place, str] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or "-".join(self.ops[:2])

    def net(self) -> Net:
        torch.manual_seed(0)
        net = Net(self.run, **self.layers()).double().eval()
        with torch.no_grad():
            for tensor in [*net.parameters(), *(b for n, b in net.named_buffers() if "running" in n)]:
                tensor.add_(torch.rand_like(tensor), alpha=0.3)
        return net

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linears(middle: int = 8, back: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": nn.Linear(6, middle), "b": nn.Linear(back, 3)}


def convs(dims: int = 2, middle: int = 8, back: int = 8, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: {"a": conv(3, middle, 3, padding=1), "b": conv(back, 4, 1), **{n: make() for n, make in more.items()}}


def around(op: str, f: Callable[[Tensor], Tensor]) -> Case:
    """An elementwise operation between two linear layers; its input stays within (0.5, 1.5)."""
    return Case((op,), lambda m, x: m.b(f(m.a(x).sigmoid() + 0.5)), linears(), (4, 6), {("a.weight", 0): 8, ("b.weight", 1): 8})


def on_images(op: str, f: Callable[[Tensor], Tensor], dims: int = 2) -> Case:
    """An operation over the picture between two convolutions."""
    size = (6, 8, 6)[:dims]
    goes = {("a.weight", 0): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(f(m.a(x)).contiguous()), convs(dims), (2, 3, *size), goes)


def over_channels(op: str, f: Callable[[Tensor], Tensor], back: int = 8) -> Case:
    """An operation that runs over the channels, which stay."""
    stays = {("a.weight", 0): op.strip("_")}
    run = lambda m, x: m.b(f(m.a(x)))  # noqa: E731
    return Case((op,), run, linears(8, back), (4, 6), {}, stays, f"{op} over channels")


def beside(op: str, f: Callable[[Tensor], Tensor]) -> Case:
    """An operation along another dimension than the channels of (N, T, C)."""
    goes = {("a.weight", 0): 8, ("b.weight", 1): 8}
    return Case((op,), lambda m, x: m.b(f(m.a(x))), linears(), (2, 4, 6), goes, {}, f"{op} beside channels")


def side_by_side(cases: Sequence[Case], at_once: int = 8) -> list[Case]:
    """Put cases of equal inputs into networks of several branches, each of which is exported once; the last may have fewer."""
    return [_joined(cases[i : i + at_once]) for i in range(0, len(cases), at_once)]


def _joined(cases: Sequence[Case]) -> Case:
    def layers() -> dict[str, Any]:
        return {f"{name}{i}": layer for i, case in enumerate(cases) for name, layer in case.layers().items()}

    def run(m: Any, x: Tensor) -> list[Any]:
        branches = [{name: getattr(m, f"{name}{i}") for name in names} for i in range(len(cases))]
        return [case.run(SimpleNamespace(**own), x) for case, own in zip(cases, branches, strict=True)]

    names = cases[0].layers().keys()
    assert len({case.shape for case in cases}) == 1 and all(case.layers().keys() == names for case in cases)
    goes = {(n.replace(".", f"{i}.", 1), d): count for i, case in enumerate(cases) for (n, d), count in case.goes.items()}
    ops = tuple(op for case in cases for op in case.ops)
    return Case(ops, run, layers, cases[0].shape, goes, {}, ", ".join(map(str, cases)))


one = {("a.weight", 0): 8}
both = {("a.weight", 0): 8, ("b.weight", 1): 8}


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(net(x))
    return [y.clone() for y in found]


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


def goes_as_it_says(case: Case) -> None:
    """What goes is not missed and computes the same without it; what stays says why."""
    net, x = case.net(), case.inputs()
    graph = channel_graph(net, (x,))
    channels = {place: group.channels for group in graph.groups for place in group.places}
    assert {place: channels.get(place) for place in case.goes} == case.goes
    for place, reason in case.stays.items():
        assert reason in graph.pinned[place]

    generator = np.random.default_rng(0)
    kept = [generator.permutation(np.arange(g.channels) % 2 == 0) for g in graph.groups]
    mask_channels_(net, graph, kept)
    probes = [x, torch.cat([x, x.flip(0)])] if x.dim() != 3 else [x]
    wanted = [y for probe in probes for y in outputs(net, probe)]
    sizes = {n: list(t.shape) for n, t in tensors(net).items()}
    for group, keep in zip(graph.groups, kept, strict=True):
        for (name, d), indices in (*group.places.items(), *group.along.items()):
            sizes[name][d] -= int((~keep).sum()) * indices.shape[1]

    assert remove(net, x).refused == {}
    assert {n: list(t.shape) for n, t in tensors(net).items()} == sizes
    found = [y for probe in probes for y in outputs(net, probe)]
    for before, after in zip(wanted, found, strict=True):
        assert before.shape == after.shape
        limit = 1e-9 if before.dtype == torch.float64 else 1e-5
        assert float((before - after).abs().max()) <= limit * max(1.0, float(before.abs().max()))


def stands_in_the_program(case: Case) -> None:
    """The operations that a case is about are in the exported network."""
    net, x = case.net(), case.inputs()
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=False)
    names = {str(node.target).split(".")[1].removesuffix("_") for node in program.graph.nodes if "." in str(node.target)}
    assert {op.removesuffix("_") if op != "_to_copy" else op for op in case.ops} <= names
