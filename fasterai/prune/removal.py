"""L4. Exact removal: take out what is silent, check that nothing has changed, take back what has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.targets import unwrap
from fasterai.core.undisturbed import evaluating, undisturbed
from fasterai.prune.graph import ChannelGraph, Group, channel_graph
from fasterai.prune.labels import Flags
from fasterai.prune.plan import Plan, make_plan, tensors_of
from fasterai.prune.surgery import Surgery

__all__ = ["Removal", "mask_channels_", "remove", "remove_channels", "removable", "silent_channels"]

#: How far an output may move, as a share of the outputs' scale: rounding in another order of summation, no more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Removal:
    """What was taken out, and what was not.

    Attributes:
        plan: What was done; it can be replayed on a fresh model.
        removed: Group's name -> (channels before, channels after), for groups that lost some.
        refused: Group's name -> why its silent channels stayed.
        pinned: Name of a parameter's dimension -> why none of it may go.
        difference: How far the outputs moved at most, as a share of their scale.
        parameters: (before, after).
    """

    plan: Plan
    removed: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str]
    pinned: Mapping[tuple[str, int], str]
    difference: float
    parameters: tuple[int, int]

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{name}: {n:,} -> {m:,} channels" for name, (n, m) in self.removed.items()]
        lines += [f"{name}: stays, {why}" for name, why in self.refused.items()]
        if not self.removed:
            lines.append("nothing was removed: " + ("see above" if self.refused else "no channel that may go is silent"))
        lines.append(f"parameters: {before:,} -> {after:,} ({after / max(1, before):.1%})")
        lines.append(f"outputs moved by at most {self.difference:.1e} of their scale")
        return "\n".join(lines)


def remove(model: nn.Module, example_inputs: Any, *, optimizer: Any = None) -> Removal:
    """Take out every channel that is provably silent; the model computes the same, with less.

    A channel is silent if everything that makes it is zero and stays zero on its way, or if everything that reads it is
    zero: after masks of coupled channels, after masks of filters, or in weights that were zeroed by hand.

    Args:
        model: The model; changed in place. Parameters stay the same objects.
        example_inputs: A tensor or tuple that the model runs on.
        optimizer: Whose state is cut alike; torch's or fastai's.

    Returns:
        What was taken out, what could not go and why, and how far the outputs moved.

    Raises:
        ValueError: The model does not run on the inputs or cannot be exported. Nothing is changed then.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    graph = channel_graph(model, inputs)
    return remove_channels(model, graph, [~s for s in silent_channels(model, graph)], inputs, optimizer=optimizer)


def silent_channels(model: nn.Module, graph: ChannelGraph) -> list[Flags]:
    """For each group which channels are zero at all places that make them, or at all that read them."""
    return [_silent(model, group, graph) for group in graph.groups]


@torch.no_grad()
def _silent(model: nn.Module, group: Group, graph: ChannelGraph) -> Flags:
    tensors = tensors_of(model)
    makes, reads = np.ones(group.channels, np.bool_), np.ones(group.channels, np.bool_)
    is_made = is_read = False
    for (name, d), indices in group.places.items():
        parameter = tensors[name][0]._parameters.get(tensors[name][1])
        if parameter is None:
            continue
        zero = (parameter.detach().movedim(d, 0).reshape(parameter.shape[d], -1) == 0).all(1).cpu().numpy()[indices].all(1)
        if (name, d) in graph.readers:
            reads, is_read = reads & zero, True
        else:
            makes, is_made = makes & zero, True
    return (makes & is_made) | (reads & is_read)


@torch.no_grad()
def mask_channels_(model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags]) -> None:
    """Zero every slice of the channels that are not kept, in place."""
    tensors = tensors_of(model)
    for group, keep in zip(graph.groups, kept, strict=True):
        for (name, d), indices in group.places.items() if not keep.all() else ():
            parameter = tensors[name][0]._parameters.get(tensors[name][1])
            if parameter is not None:
                parameter.index_fill_(d, torch.as_tensor(indices[~keep].ravel(), device=parameter.device), 0.0)


def remove_channels(
    model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags], inputs: tuple[Any, ...], *, optimizer: Any = None
) -> Removal:
    """Take out the channels that are not kept; a group with which the outputs would move, or the model fail, stays.

    Args:
        model: The model, its channels that go silent already; changed in place.
        graph: Its channel graph.
        kept: For each group a bool array over its channels; at least one of each group stays.
        inputs: Positional arguments of the model.
        optimizer: Whose state is cut alike.
    """
    before = sum(p.numel() for p in unwrap(model).parameters())
    chosen, refused, worst = removable(model, graph, kept, inputs)
    plan = make_plan(model, graph, chosen)
    Surgery(model, plan, optimizer)
    removed = {g.name: (g.channels, int(k.sum())) for g, k in zip(graph.groups, chosen, strict=True) if not k.all()}
    after = sum(p.numel() for p in unwrap(model).parameters())
    return Removal(plan, removed, refused, graph.pinned, worst, (before, after))


def removable(
    model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags], inputs: tuple[Any, ...]
) -> tuple[list[Flags], dict[str, str], float]:
    """What may be taken out without the outputs moving: the channels to keep, why groups stay, and how far outputs move."""
    probes = [inputs, *_other_inputs(inputs)]
    wanted = [_outputs(model, p) for p in probes]
    return _largest_sound(model, graph, [_at_least_one(k) for k in kept], probes, wanted)


def _at_least_one(keep: Flags) -> Flags:
    if keep.any():
        return keep
    result = keep.copy()
    result[-1] = True
    return result


def _largest_sound(
    model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags], probes: Sequence[Any], wanted: Sequence[Any]
) -> tuple[list[Flags], dict[str, str], float]:
    """The groups with which all goes well; halves of what fails are tried until single groups are found that do not."""
    chosen = [np.ones_like(k) for k in kept]
    refused: dict[str, str] = {}
    worst = 0.0
    stack = [[i for i, k in enumerate(kept) if not k.all()]]
    while stack:
        some = stack.pop()
        if not some:
            continue
        trial = [kept[i] if i in some else k for i, k in enumerate(chosen)]
        difference, reason = _try(model, graph, trial, probes, wanted)
        if reason is None:
            chosen, worst = trial, max(worst, difference)
        elif len(some) == 1:
            refused[graph.groups[some[0]].name] = reason
        else:
            stack += [some[len(some) // 2 :], some[: len(some) // 2]]
    return chosen, refused, worst


def _try(
    model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags], probes: Sequence[Any], wanted: Sequence[Any]
) -> tuple[float, str | None]:
    """Carry it out, compare, and take it back: how far the outputs move, and why it will not do."""
    try:
        surgery = Surgery(model, make_plan(model, graph, kept))
    except ValueError as error:
        return 0.0, str(error)
    try:
        worst = 0.0
        for probe, outputs in zip(probes, wanted, strict=True):
            if outputs is not None:
                found = _outputs(model, probe)
                if found is None:
                    return 0.0, f"the model fails without them: {_failure(model, probe)}"
                worst = max(worst, _moved(outputs, found))
    finally:
        surgery.undo()
    limit = TOLERANCE.get(next((x.dtype for x in wanted[0]), torch.float32), 1e-2)
    return worst, None if worst <= limit else f"the outputs would move by {worst:.1e} of their scale: it is not silent"


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    with undisturbed(model), evaluating(model), torch.no_grad():
        yield


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """The tensors among the outputs; None if the model does not run."""
    with _quietly(model):
        try:
            output = unwrap(model)(*inputs)
        except Exception:
            return None
    return [x.detach().clone() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _failure(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What the model raises, and in which line of its code."""
    with _quietly(model):
        try:
            unwrap(model)(*inputs)
        except Exception as error:
            trace, last = error.__traceback__, None
            while trace is not None:
                if (
                    "torch/nn/" not in trace.tb_frame.f_code.co_filename
                    and "/fasterai/" not in trace.tb_frame.f_code.co_filename
                ):
                    last = trace
                trace = trace.tb_next
            place = f" ({last.tb_frame.f_code.co_name}, line {last.tb_lineno})" if last is not None else ""
            return f"{type(error).__name__}: {str(error).splitlines()[0]}{place}"
    return "it fails now and then"


def _moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference as a share of the scale; infinity if shapes differ."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0 or torch.equal(a, b):
            continue
        scale = float(a.abs().where(a.isfinite(), 0).max())
        # Equal infinities, as in masked scores, are equal; a NaN equals nothing.
        difference = float((a - b).abs().where(a != b, 0).max()) / max(scale, 1e-30)
        worst = max(worst, float("inf") if math.isnan(difference) else difference)
    return worst


def _other_inputs(inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Random inputs with another batch size."""
    generator = torch.Generator().manual_seed(0)

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        if not x.is_floating_point():
            return torch.cat([x, x[:1]])
        return torch.randn((x.shape[0] + 1, *x.shape[1:]), generator=generator).to(x.device, x.dtype)

    return [tree_map(other, inputs)]
