"""L4. Exact removal: take out what is silent, check that nothing has changed, take back what has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fasterai.core.checks import warn
from fasterai.core.cuts import announce, noted_optimizers
from fasterai.core.targets import unwrap
from fasterai.prune.admission import check_whole, positional, shapes_of_inputs
from fasterai.prune.carry import check_optimizer, check_trained
from fasterai.prune.check import Sound, largest_sound
from fasterai.prune.copies import Copies, matching_copies
from fasterai.prune.graph import ChannelGraph, Group, channel_graph
from fasterai.prune.labels import Flags
from fasterai.prune.measure import Measurement, measured
from fasterai.prune.plan import make_plan, tensors_of
from fasterai.prune.report import Removal
from fasterai.prune.surgery import operate

__all__ = ["Removal", "mask_channels_", "remove", "silent_channels", "take_out"]


def remove(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: Any = None,
    copies: Copies = None,
    exact: bool = True,
    measure: bool = True,
) -> Removal:
    """Take out every channel that is provably silent; the model computes the same, with less.

    A channel is silent if everything that makes it is zero and stays zero on its way, or if everything that reads it is
    zero: after masks of coupled channels, after masks of filters, or in weights that were zeroed by hand.

    Args:
        model: The model; changed in place. Parameters stay the same objects.
        example_inputs: A tensor or tuple that the model runs on.
        optimizer: Whose state is cut alike; torch's or fastai's. One that a sparsifier has seen train the model is known.
        copies: Models of the same structure, such as moving averages of the weights, that lose the same channels.
        exact: Whether the outputs have to stay. If not, channels that a norm averages over may go as well: the average is then
            one of fewer channels, and the outputs move; the result says how far.
        measure: Whether to count and time the model before and after, which takes about 0.2 seconds or ten forward passes.

    Returns:
        What was taken out, what could not go and why, how far the outputs moved, and what it brought.

    Raises:
        TypeError: The model is no module, or the optimizer keeps no state by parameter.
        ValueError: The model is wrapped, does not run on the inputs or cannot be exported, or a copy is another model. Nothing
            is changed then.
    """
    inputs = positional(example_inputs)
    check_optimizer(optimizer)
    check_trained(check_whole(model), optimizer)
    graph = channel_graph(check_whole(model), inputs, exact)
    matching_copies(copies, unwrap(model))
    kept = [~silent for silent in silent_channels(model, graph)]
    sound = largest_sound(model, graph, kept, inputs, exact=exact)
    result = take_out(model, graph, sound, inputs, optimizer=optimizer, copies=copies, exact=exact, measure=measure)
    if not result.removed:
        why = (
            "see its refused" if result.refused else "no channel that may go is silent; masks hold only while they are applied"
        )
        warn(f"nothing was removed: {why}")
    return result


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


def take_out(
    model: nn.Module,
    graph: ChannelGraph,
    sound: Sound,
    inputs: tuple[Any, ...],
    *,
    optimizer: Any = None,
    copies: Copies = None,
    exact: bool = True,
    measure: bool = True,
) -> Removal:
    """Take out what was found sound, of the model as it is now.

    Args:
        model: The model; changed in place.
        graph: Its channel graph.
        sound: What `largest_sound` found for it.
        inputs: Positional arguments of the model.
        optimizer: Whose state is cut alike.
        copies: As for `remove`.
        exact: As for `remove`, for the report.
        measure: As for `remove`.
    """
    others = matching_copies(copies, unwrap(model))
    before = sum(p.numel() for p in unwrap(model).parameters())
    plan = make_plan(model, graph, sound.kept, streams=sound.streams)
    surgery = operate(model, plan, _trainers(model, optimizer), others)
    for cut in [model, *others]:
        announce(cut, plan.keep)
    measurement = Measurement()
    if measure and plan:
        measurement = measured(model, surgery, inputs, shapes_of_inputs(inputs))
    groups = {g.name: (g.channels, int(k.sum())) for g, k in zip(graph.groups, sound.kept, strict=True)}
    return Removal(
        plan=plan,
        removed={name: (n, m) for name, (n, m) in groups.items() if m < n},
        refused=sound.refused,
        pinned=graph.pinned,
        difference=sound.difference,
        parameters=(before, sum(p.numel() for p in unwrap(model).parameters())),
        stayed=sound.stayed,
        groups=groups,
        exact=exact,
        measurement=measurement,
    )


def _trainers(model: nn.Module, optimizer: Any) -> list[Any] | None:
    """The optimizer given, and those that a sparsifier has seen train the model, less any whose state cannot be cut."""
    noted = [one for one in noted_optimizers(model) if _can_be_cut(one)]
    return [one for one in (optimizer, *noted) if one is not None] or None


def _can_be_cut(optimizer: Any) -> bool:
    try:
        check_optimizer(optimizer)
    except (TypeError, ValueError):
        return False
    return True
