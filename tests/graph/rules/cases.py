"""Small networks around single operations, and what must hold of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.graph import channels
from fasterai.graph.exported import exported
from fasterai.graph.labels import is_zeroed
from fasterai.graph.recorded import Recording
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

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A network around some operations.

    `goes`: place -> how many channels its group has. `stays`: place -> what the reason says. `where`: which of the
    operation's names must stand in the exported program. `rewrite`: sizes in the code may be put right.
    """

    ops: tuple[str, ...]
    run: Callable[..., Any]
    layers: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    goes: dict[Place, int] = field(default_factory=dict)
    stays: dict[Place, str] = field(default_factory=dict)
    name: str = ""
    rewrite: bool = False

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


def over_zeros(op: str, f: Callable[[Tensor], Tensor], stays: str = "") -> Case:
    """An operation that runs over channels which are zero where they are silent: they go, if nothing makes more of them."""
    run, why = lambda m, x: m.b(f(m.a(x))), {("a.weight", 0): stays} if stays else {}
    return Case((op,), run, linears(), (4, 6), {} if stays else both, why, f"{op} over {'others' if stays else 'zeros'}")


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
    stays = {(n.replace(".", f"{i}.", 1), d): why for i, case in enumerate(cases) for (n, d), why in case.stays.items()}
    return Case(ops, run, layers, cases[0].shape, goes, stays, ", ".join(map(str, cases)))


one = {("a.weight", 0): 8}
both = {("a.weight", 0): 8, ("b.weight", 1): 8}


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(net(x))
    return [y.clone() for y in found]


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


class Run(torch.fx.Interpreter):
    """A run of an exported program that notes what each operation makes."""

    def __init__(self, program: Any) -> None:
        super().__init__(program.graph_module)
        self.made: dict[Any, Any] = {}

    def run_node(self, node: Any) -> Any:
        self.made[node] = super().run_node(node)
        return self.made[node]


def wrongly_zero(net: nn.Module, x: Tensor, rewrite: bool = False) -> tuple[channels.ChannelGraph, list[str], int]:
    """Run with half of what makes each channel at zero; list what is marked as zero and is not, and count the marks."""
    programs: list[Any] = []
    with patch.object(channels, "exported", lambda *given: programs.extend(exported(*given)) or programs):
        graph, trace, components, weights = channels.followed(net, (x,), rewrite=rewrite)
    if isinstance(programs[-1].program, Recording):  # it holds no constants to run with
        return graph, [], 0
    held = {name: tensor.detach().clone() for name, tensor in tensors(net).items()}
    silent: set[int] = set()
    for group in graph.groups:
        for (name, d), indices in group.places.items():
            off = indices[::2].ravel()
            silent |= set(components.numbers(weights[name].dims[d][off]).tolist())
            if (name, d) not in graph.readers or name in graph.shared:
                held[name].index_fill_(d, torch.as_tensor(off), 0.0) if name in dict(net.named_parameters()) else None
    program, given = programs[-1].program, []
    for node in program.graph.find_nodes(op="placeholder"):
        name = programs[-1].names.get(node.name)
        constants = program.graph_signature.inputs_to_lifted_tensor_constants
        given.append(held[name] if name else program.constants[constants[node.name]] if node.name in constants else x.clone())
    along = {place for group in graph.groups for place in group.along}
    run, found, count = Run(program), [], 0
    with torch.no_grad():
        run.run(*given, enable_io_processing=False)
    for node, value in ((node, value) for node, value in trace.values.items() if node in run.made):
        made = run.made[node] if isinstance(run.made[node], list | tuple) else [run.made[node]]
        for one, tensor in zip(value if isinstance(value, list) else [value], made, strict=False):
            for d, dim in enumerate(one.dims if hasattr(one, "dims") else ()):
                place = one.places[d] if d < len(one.places) else None
                if place in along or (place in graph.readers and place[0] not in graph.shared):
                    continue  # what only reads a channel need not be zero
                marked = is_zeroed(dim) & np.isin(components.numbers(dim), list(silent)) if isinstance(dim, np.ndarray) else []
                count += int(np.sum(marked))
                found += [f"{node.name}.{d}"] if np.any(marked) and tensor.movedim(d, 0)[marked].any() else []
    return graph, found, count


def goes_as_it_says(case: Case) -> None:
    """What goes is not missed and computes the same without it; what stays says why."""
    net, x = case.net(), case.inputs()
    graph, wrong, _ = wrongly_zero(net, x, case.rewrite)
    counts = {place: group.channels for group in graph.groups for place in group.places}
    assert {place: counts.get(place) for place in case.goes} == case.goes
    assert wrong == []
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
