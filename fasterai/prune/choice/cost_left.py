"""Cost that is left without some channels, as a share of a model's parameters, MACs or time; the model is not changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from fasterai.analyze.counting import rules
from fasterai.analyze.timing import by_turns, on_threads, seconds_per_pass
from fasterai.graph.channels import ChannelGraph
from fasterai.graph.inputs import InputCut, cut_inputs
from fasterai.graph.labels import Flags
from fasterai.model.names import unwrap
from fasterai.model.running import at_rest, copies, undisturbed, without_fast_path
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, make_plan, tensors_of

__all__ = ["Share", "macs_left", "parameters_left", "time_left"]

Inputs = tuple[Any, ...]
Share = Callable[[Sequence[Flags]], float]  # channels that stay, group by group -> the share of the dense model's cost
#: Seconds of timing and turns at least, after so many turns that do not count.
SECONDS, PAIRS, WARM_UP = 1.0, 7, 2


def parameters_left(model: nn.Module, graph: ChannelGraph, dense: nn.Module) -> Share:
    """Make the function that gives the share of the dense model's parameters which a choice leaves.

    The shapes of the plan are counted, no tensor is cut; `dense` may be `model` itself.
    """
    tensors = tensors_of(model)
    sizes = {n: p.numel() for n, (module, attribute) in tensors.items() if (p := module._parameters.get(attribute)) is not None}
    whole = sum(p.numel() for p in unwrap(dense).parameters())

    def left(kept: Sequence[Flags]) -> float:
        plan = make_plan(model, graph, kept)
        gone = sum(sizes[name] - math.prod(plan.shape_after(name)) for name in plan.shapes if name in sizes)
        return (sum(sizes.values()) - gone) / whole

    return left


def macs_left(
    model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...], dense: nn.Module, dense_inputs: Inputs | None = None
) -> Share:
    """Make the function that gives the share of the dense model's MACs which a choice leaves.

    They are counted on a copy without weights, if that runs; `dense` may be `model` itself.

    Of a model without MACs the share is 0. `dense_inputs` are those of the dense model, where it takes more.
    """
    shell, bare = _shell(model, inputs)
    whole = _count(shell, bare) if dense is model else _count(*_shell(dense, dense_inputs or inputs))

    def count(cuts: Sequence[InputCut]) -> float:
        return _count(shell, cut_inputs(shell, bare, cuts)) / max(1, whole)

    return partial(_of_cut, shell, graph, count)


def _shell(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Copy a model without its weights, so that running it costs little; with weights if its code needs their values."""
    model = unwrap(model)
    bare: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    bare.update({id(b): b.detach().to("meta") for b in model.buffers()})
    shell = copy.deepcopy(model, bare).eval()
    shapes = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)
    try:
        _count(shell, shapes)
    except Exception:
        return copy.deepcopy(model).eval(), copies(inputs)
    return shell, shapes


def _count(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=rules())
    with torch.no_grad(), undisturbed(model), without_fast_path(), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _of_cut(model: nn.Module, graph: ChannelGraph, cost: Callable[[Sequence[InputCut]], float], kept: Sequence[Flags]) -> float:
    """Return the cost of a model without the channels that are not kept; a function of what it then takes of its inputs.

    As in the check of a removal, sizes that its own classes keep change too where it does not run otherwise.
    """
    try:
        return _cost_of(model, make_plan(model, graph, kept), cost)
    except Exception:
        return _cost_of(model, make_plan(model, graph, kept, streams=True), cost)


def _cost_of(model: nn.Module, plan: Plan, cost: Callable[[Sequence[InputCut]], float]) -> float:
    surgery = Surgery(model, plan)
    try:
        return cost(plan.inputs)
    finally:
        surgery.undo()


def time_left(
    model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...], dense: nn.Module, dense_inputs: Inputs | None = None
) -> Share:
    """Make the function that gives the share of the dense model's time which a choice leaves.

    Both models are measured in turns on one thread; a copy of `model` is cut. `dense_inputs` are as for `macs_left`.
    """
    small = copy.deepcopy(unwrap(model))

    def time(cuts: Sequence[InputCut]) -> float:
        return _time_ratio(unwrap(dense), small, dense_inputs or inputs, cut_inputs(small, inputs, cuts))

    return partial(_of_cut, small, graph, time)


def _time_ratio(dense: nn.Module, small: nn.Module, inputs: Inputs, less: Inputs) -> float:
    """Return the time of the small model divided by that of the dense one, over passes in turns on one thread.

    Of each the fastest pass counts: other work on the machine adds to times and takes nothing away.
    """
    passes = {"dense": partial(seconds_per_pass, dense, inputs), "small": partial(seconds_per_pass, small, less)}
    with at_rest(dense), at_rest(small), on_threads(1):
        by_turns(passes, lambda times, _: len(times["small"]) >= WARM_UP)
        times = by_turns(passes, lambda times, seconds: len(times["small"]) >= PAIRS and seconds >= SECONDS)
    return min(times["small"]) / min(times["dense"])
