"""Cost that is left without some channels, as a share of a model's parameters, MACs or time; the model is not changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from fasterai.prune.rewrites import Rewriter
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

    return partial(_of_cut, shell, graph, count, _Code(model, graph, inputs, bare))


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


@dataclass
class _Code:
    """Sizes in a model's code: what finds them on the model, and the inputs of the copy that is cut."""

    model: nn.Module
    graph: ChannelGraph
    inputs: Inputs
    bare: Inputs

    @cached_property
    def rewriter(self) -> Rewriter:
        return Rewriter(self.model, self.graph, [self.inputs], True)

    def put_right(self, surgery: Surgery, small: nn.Module, cuts: Sequence[InputCut], kept: Sequence[Flags]) -> None:
        """Put sizes in the code of a copy without the channels right."""
        surgery.rewrite(self.rewriter.find([cut_inputs(small, self.bare, cuts)], kept, small))


def _of_cut(
    model: nn.Module,
    graph: ChannelGraph,
    cost: Callable[[Sequence[InputCut]], float],
    code: _Code,
    kept: Sequence[Flags],
) -> float:
    """Return the cost of a model without the channels that are not kept; a function of what it then takes of its inputs.

    As in the check of a removal, sizes that its own classes keep change too where it does not run otherwise, then those that
    are written into its code.
    """
    ways = [(False, None), (True, None), *([(False, code), (True, code)] if graph.sized else [])]
    for streams, used in ways[:-1]:
        try:
            return _cost_of(model, make_plan(model, graph, kept, streams=streams), cost, used, kept)
        except Exception:  # whatever the user's code raises on other sizes
            continue
    streams, used = ways[-1]
    return _cost_of(model, make_plan(model, graph, kept, streams=streams), cost, used, kept)


def _cost_of(
    model: nn.Module,
    plan: Plan,
    cost: Callable[[Sequence[InputCut]], float],
    code: _Code | None,
    kept: Sequence[Flags],
) -> float:
    if code is not None:
        _ = code.rewriter  # it looks at the model as it was
    surgery = Surgery(model, plan)
    try:
        if code is not None:
            code.put_right(surgery, model, plan.inputs, kept)
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

    return partial(_of_cut, small, graph, time, _Code(model, graph, inputs, inputs))


def _time_ratio(dense: nn.Module, small: nn.Module, inputs: Inputs, less: Inputs) -> float:
    """Return the time of the small model divided by that of the dense one, over passes in turns on one thread.

    Of each the fastest pass counts: other work on the machine adds to times and takes nothing away.
    """
    passes = {"dense": partial(seconds_per_pass, dense, inputs), "small": partial(seconds_per_pass, small, less)}
    with at_rest(dense), at_rest(small), on_threads(1):
        by_turns(passes, lambda times, _: len(times["small"]) >= WARM_UP)
        times = by_turns(passes, lambda times, seconds: len(times["small"]) >= PAIRS and seconds >= SECONDS)
    return min(times["small"]) / min(times["dense"])
