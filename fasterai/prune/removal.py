"""Exact removal: silent channels are removed, the outputs are checked, and channels that would change them are put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.graph.channels import ChannelGraph, Group, Place, channel_graph
from fasterai.graph.features import FeaturesLike, check_may_go
from fasterai.graph.inputs import input_cuts
from fasterai.graph.labels import Array, Flags
from fasterai.graph.reasons import AS_PART, kept_shares
from fasterai.model.cuts import noted_optimizers
from fasterai.model.inputs import positional
from fasterai.model.names import unwrap
from fasterai.model.norms import Norm
from fasterai.model.optimizers import check_optimizer, check_trained
from fasterai.model.supported import check_whole, shapes_of_inputs
from fasterai.prune.check import Sound, largest_sound, plan_of
from fasterai.prune.measure import Measurement, measured
from fasterai.prune.removal_report import Removal
from fasterai.prune.surgery.model_copies import Copies, matching_copies
from fasterai.prune.surgery.operate import operate
from fasterai.prune.surgery.plan import Plan, tensor_of, tensors_of

__all__ = ["Removal", "mask_channels_", "remove", "silent_channels", "take_out"]


def remove(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: Any = None,
    copies: Copies = None,
    exact: bool = True,
    measure: bool = True,
    features: FeaturesLike = None,
    rewrite: bool = True,
) -> Removal:
    """Remove every channel that is provably silent; the model computes the same, with less.

    A channel is silent if everything that makes it is zero and stays zero on its way, or if everything that reads it is
    zero: after masks of coupled channels, after masks of filters, in weights that were zeroed by hand, or behind a norm whose
    scale and shift are zero.

    Args:
        model: The model; changed in place. Parameters stay the same objects.
        example_inputs: A tensor or tuple that the model runs on.
        optimizer: The optimizer whose state is cut alike; torch's or fastai's. One that a sparsifier has seen train the model
            is known.
        copies: Models of the same structure, such as moving averages of the weights, that lose the same channels.
        exact: True if the outputs have to stay the same. If not, channels may go as well that are averaged over where they are
            not zero: the average is then one of fewer channels, and the outputs move; the result says how far.
        measure: True to count and time the model before and after, which takes about 0.2 seconds or ten forward passes.
        features: The dimensions of inputs that may lose what no layer reads any more, by argument, as `{"x": 1}`, or `Features`
            with indices that stay all the same. The small model takes the inputs cut alike: the result's `inputs` says how.
        rewrite: True if a module whose code has sizes written into it may run a traced copy of it, in which they are right.

    Returns:
        The removed channels, those that had to stay and why, the movement of the outputs, and the gain.

    Raises:
        TypeError: The model is no module, or the optimizer keeps no state by parameter.
        ValueError: The model is wrapped, does not run on the inputs or cannot be exported, or a copy is another model. Nothing
            is changed then.
    """
    inputs = positional(example_inputs)
    check_optimizer(optimizer)
    check_trained(check_whole(model), optimizer)
    graph = channel_graph(check_whole(model), inputs, exact, features=features, rewrite=rewrite)
    check_may_go(features, model, inputs, graph.inputs)
    matching_copies(copies, unwrap(model))
    kept = [~silent for silent in silent_channels(model, graph)]
    sound = largest_sound(model, graph, kept, inputs, exact=exact, rewrite=rewrite)
    result = take_out(model, graph, sound, inputs, optimizer=optimizer, copies=copies, exact=exact, measure=measure)
    if not result.removed:
        why = "see its refused" if result.refused else "no removable channel is silent; masks hold only while they are applied"
        warn(f"nothing was removed: {why}")
    return result


@torch.no_grad()
def silent_channels(model: nn.Module, graph: ChannelGraph) -> list[Flags]:
    """Find for each group the channels that are zero in all weights that make them, or in all that read them.

    A layer that only a norm reads is as good as zero where the norm's scale and shift are, and a norm where its shift is, its
    running mean, and the layer.
    """
    tensors = tensors_of(model)
    norms: dict[str, list[Norm]] = {}
    for norm in graph.norms:
        norms.setdefault(norm.scale, []).append(norm)
    return [np.zeros(g.channels, np.bool_) | _silent(tensors, g, graph, norms) for g in graph.groups]


def _silent(
    tensors: Mapping[str, tuple[nn.Module, str]], group: Group, graph: ChannelGraph, norms: Mapping[str, Sequence[Norm]]
) -> Flags | bool:
    zeros = {place: _zero(tensor_of(tensors, place[0]), place[1], indices) for place, indices in group.places.items()}
    reads = [z for place, z in zeros.items() if place in graph.readers]
    makes = {
        place: z
        for place, z in zeros.items()
        if _is_parameter(tensors, place[0]) and (place not in graph.readers or place[0] in graph.shared)
    }
    if group.inputs:  # what enters is not zero, whatever is added to it or scales it; its products are, which may be summed
        return _all([*reads, *(makes.values() if group.is_summed else ())])
    by_name: dict[str, list[Place]] = {}
    for place in makes:
        by_name.setdefault(place[0], []).append(place)
    for norm in (norm for name in by_name for norm in norms.get(name, ())):
        scale, shift, layer = (norm.scale, 0), (norm.shift, 0), [p for name in norm.layer for p in by_name.get(name, ())]
        if not (layer and scale in makes and shift in makes):
            continue
        is_off = zeros[scale] & zeros[shift]
        if norm.is_by_channel:
            makes[scale] = zeros[scale] | _all([zeros[p] for p in (shift, (norm.mean, 0), *layer) if p in zeros])
        for place in layer if norm.scale.rpartition(".")[0] not in graph.counted else ():
            makes[place] = zeros[place] | is_off
    if group.is_summed and group.is_shown:
        return _all(makes.values()) & (_all(reads) if reads else True)
    return _all(makes.values()) | (_all(reads) if not group.is_summed else False)


def _all(flags: Collection[Flags]) -> Flags | bool:
    """Combine flags by logical and; an empty collection gives False."""
    return cast(Flags, np.logical_and.reduce(list(flags))) if flags else False


def _zero(tensor: Tensor, d: int, indices: Array) -> Flags:
    """Find the channels whose slices of a tensor are all zero; `indices` is `(channels, indices per channel)` along `d`."""
    rows = tensor.detach().movedim(d, 0).reshape(tensor.shape[d], -1) == 0
    return cast(Flags, rows.all(1).cpu().numpy()[indices].all(1))


def _is_parameter(tensors: Mapping[str, tuple[nn.Module, str]], name: str) -> bool:
    module, attribute = tensors[name]
    return module._parameters.get(attribute) is not None


@torch.no_grad()
def mask_channels_(model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags]) -> None:
    """Set every slice of the channels that are not kept to zero, in place."""
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
    plan: Plan | None = None,
    otherwise: str = AS_PART,
) -> Removal:
    """Remove the channels that `largest_sound` found, from the model as it is now.

    Args:
        model: The model; changed in place.
        graph: Its channel graph.
        sound: The result of `largest_sound` for it.
        inputs: Positional arguments of the model.
        optimizer: The optimizer whose state is cut alike.
        copies: As for `remove`.
        exact: As for `remove`, for the report.
        measure: As for `remove`.
        plan: The plan that does it; made here if left out.
        otherwise: The reason of what is in no group of the graph, and is not pinned.
    """
    others = matching_copies(copies, unwrap(model))
    before = sum(p.numel() for p in unwrap(model).parameters())
    kept_because = kept_shares(shapes_of_parameters(model), graph, _stayed(graph, sound), otherwise)
    plan = plan or plan_of(model, graph, sound)
    surgery = operate(model, plan, _trainers(model, optimizer), others)
    measurement = Measurement()
    if measure and plan:
        measurement = measured(model, surgery, inputs, shapes_of_inputs(inputs), plan.inputs)
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
        is_blank=sound.is_blank,
        inputs=input_cuts(model),
        recorded=graph.recorded,
        kept_because=kept_because,
    )


def shapes_of_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, tied ones once, by the names that a channel graph has."""
    tensors = tensors_of(model)
    return {name: tuple(tensor_of(tensors, name).shape) for name in tensors if _is_parameter(tensors, name)}


def _stayed(graph: ChannelGraph, sound: Sound) -> dict[str, tuple[float, str]]:
    """Return for groups that have to keep silent channels the share of these, and why."""
    kept = {g.name: k for g, k in zip(graph.groups, sound.kept, strict=True)}
    return {
        name: (len(stay) / max(1, len(stay) + int((~kept[name]).sum())), sound.refused.get(name, ""))
        for name, stay in sound.stayed.items()
    }


def _trainers(model: nn.Module, optimizer: Any) -> list[Any] | None:
    """List the given optimizer and those that a sparsifier has noted, without those whose state cannot be cut."""
    noted = [one for one in noted_optimizers(model) if _can_be_cut(one)]
    return [one for one in (optimizer, *noted) if one is not None] or None


def _can_be_cut(optimizer: Any) -> bool:
    try:
        check_optimizer(optimizer)
    except (TypeError, ValueError):
        return False
    return True
