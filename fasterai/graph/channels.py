"""Channel graph: the groups of coupled channels of a network, and the reasons why other channels must stay.

A group of coupled channels holds channels that run through the same weights. To remove one channel is to remove its slice of
each of those weights: row i of one layer, entry i of the norm behind it, column i of the next layer.

Over 300 lines, since a graph is described, and made of labels, in one place; `following.py` has the pass that finds these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from fasterai.display import Shown, Table, counted
from fasterai.graph.exported import Exported, exported, how_recorded
from fasterai.graph.features import FeaturesLike, kept_inputs, read_features
from fasterai.graph.following import MADE, Place, Settings, choose, components_of, follow
from fasterai.graph.inputs import input_tensors
from fasterai.graph.labels import FIXED, Array, Components, Dim
from fasterai.graph.reasons import summed_reasons
from fasterai.graph.rules import Trace, Value
from fasterai.graph.rules.trace import called, is_cut, module_of, values_in
from fasterai.model.inputs import positional
from fasterai.model.names import plain_name, unwrap
from fasterai.model.norms import Norm, norms_behind
from fasterai.model.slim_norms import slimmable
from fasterai.model.supported import check_model, kernels, recomputed

__all__ = ["ChannelGraph", "Group", "Place", "channel_graph"]

#: Modules that know the size of what they normalise, also where they have no parameters.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
#: Operations whose sizes code gives as numbers, or whose results it divides by them.
SIZED = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "unflatten", "expand", "repeat", "broadcast_to"),
        *("split", "split_with_sizes", "chunk", "tensor_split", "slice", "narrow", "unsafe_split", "unsafe_chunk"),
        *MADE,
        *("sum", "norm", "linalg_vector_norm"),
    )
)


@dataclass(frozen=True, repr=False)
class Group(Shown):
    """Group of coupled channels: each channel is a slice of the same dimensions of the same tensors.

    Attributes:
        places: Parameter or buffer name and dimension -> the indices there, `(channels, indices per channel)`.
        name: The first weight that makes them, or the input and its dimension, as `x.1`; a number behind it tells groups of
            one weight apart.
        inputs: Input and dimension -> the indices there, in the same way, where the channels are features of an input.
        along: Like places, for what goes with the channels and is not masked: rows whose lengths are held elsewhere.
        is_summed: True if operations sum or average over the channels, so that a silent one has to be zero all the way.
        is_shown: True if norms without a scale hand on what is not zero for a silent channel, so that what reads it has to be.
    """

    places: Mapping[Place, Array]
    name: str = ""
    inputs: Mapping[Place, Array] = field(default_factory=dict)
    is_summed: bool = False
    is_shown: bool = False
    along: Mapping[Place, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or first_maker(self.places, frozenset()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle; those of earlier versions know of no inputs."""
        vars(self).update({"inputs": {}, "is_summed": False, "is_shown": False, "along": {}, **state})

    @property
    def channels(self) -> int:
        """Number of channels of the group."""
        return len(next(iter(self.places.values())))

    def _line(self) -> str:
        tensors = counted(len({name for name, _ in self.places}), "tensor")
        return f"<Group {self.name}: {counted(self.channels, 'channel')} in {tensors}>"

    def _parts(self) -> Iterator[Table | str]:
        yield f"{self.name}: {counted(self.channels, 'channel')}"
        body = [(name, str(dim), str(indices.size // len(indices))) for (name, dim), indices in self.places.items()]
        body += [(f"input {name}", str(dim), str(indices.size // len(indices))) for (name, dim), indices in self.inputs.items()]
        yield Table(("tensor", "dimension", "indices per channel"), body)


@dataclass(frozen=True, repr=False)
class ChannelGraph(Shown):
    """Channels of a network that may be removed, group by group, and those that must stay.

    Attributes:
        groups: The channels that may go.
        pinned: Parameter or buffer name and dimension -> why it stays, where all of it does.
        readers: The places that multiply what a channel carries and hand on something else.
        normed: Name of a module that normalises without parameters -> for each index of what it normalises a place, and the
            index there, with which it goes; None where it stays.
        rescaled: Names of weights of norms that average over what may go: the more of it goes, the more they have to grow.
        counted: Names of modules that average over what may go -> over how many channels, and the places of these.
        norms: Those that alone read the output of a layer.
        shared: Names of parameters that several operations use: one may make channels that another reads.
        inputs: Input and dimension -> why it stays, where all of it does; inputs are named by their arguments.
        input_sizes: Input and dimension -> its size, where it may lose indices.
        recorded: Where `torch.export` refuses the model: that its operations were recorded from runs, and why.
        partly: Parameter or buffer name and dimension -> why some of it stays, where the rest is in groups.
        sized: Names of modules whose own code views, splits or slices what may lose channels -> True where slices, or splits
            into unequal parts, cut it, so that the code has to be put right.
    """

    groups: tuple[Group, ...]
    pinned: Mapping[Place, str]
    readers: frozenset[Place]
    normed: Mapping[str, tuple[tuple[Place, int] | None, ...]] = field(default_factory=dict)
    rescaled: frozenset[str] = frozenset()
    norms: tuple[Norm, ...] = ()
    shared: frozenset[str] = frozenset()
    inputs: Mapping[Place, str] = field(default_factory=dict)
    input_sizes: Mapping[Place, int] = field(default_factory=dict)
    counted: Mapping[str, tuple[int, frozenset[Place]]] = field(default_factory=dict)
    recorded: str = ""
    partly: Mapping[Place, str] = field(default_factory=dict)
    sized: Mapping[str, bool] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle; those of earlier versions know less."""
        later = {"inputs": {}, "input_sizes": {}, "counted": {}, "recorded": "", "partly": {}, "sized": {}}
        vars(self).update({**later, **state})

    def _line(self) -> str:
        channels = counted(sum(group.channels for group in self.groups), "channel")
        groups = counted(len(self.groups), "group")
        return f"<ChannelGraph: {channels} in {groups} may go, {counted(len(self.pinned), 'dimension')} must stay>"

    def _parts(self) -> Iterator[Table | str]:
        body = [(g.name, str(g.channels), str(len({name for name, _ in g.places}))) for g in self.groups]
        yield Table(("group", "channels", "tensors"), body) if body else "no channel may go"
        yield from summed_reasons([why for why in self.pinned.values() if not why.endswith("kernel size")])
        yield from [self.recorded] if self.recorded else []


def channel_graph(
    model: nn.Module,
    inputs: tuple[Any, ...],
    exact: bool = True,
    *,
    features: FeaturesLike = None,
    rewrite: bool = True,
) -> ChannelGraph:
    """Find the groups of coupled channels from the network's operations.

    The network is exported in eval mode (`torch.export`); the labels of every tensor's dimensions are followed through its
    operations. An operation without a rule pins what it reads. Where eval mode leaves weights out, as of auxiliary classifiers,
    or training mode returns other tensors, the network of training mode is followed as well, if it can be exported. The
    model is not changed.

    Args:
        model: The model, wrapped or not.
        inputs: Its positional arguments.
        exact: True if channels must stay that are averaged over where they are not zero: without them the average moves.
        features: The dimensions of inputs that may lose indices, by argument, as `{"x": 1}`; by default all inputs stay whole.
        rewrite: False if sizes that are written into code stay as they are, so that unequal splits and slices pin.

    Raises:
        TypeError: The model is no module, or `features` names no dimensions.
        ValueError: It is lazy, does not run on the inputs, or cannot be exported; the message says where, and a repair. Or
            `features` names an input or a dimension that there is not, or that several could be.
    """
    return followed(model, inputs, exact, features=features, rewrite=rewrite)[0]


def followed(
    model: nn.Module,
    inputs: tuple[Any, ...],
    exact: bool = True,
    *,
    features: FeaturesLike = None,
    experts: bool = False,
    rewrite: bool = False,
) -> tuple[ChannelGraph, Trace, Components, dict[str, Value]]:
    """Find the groups of a network, and the labels that they are made of; with `experts`, those of its mixtures too."""
    inner, inputs = unwrap(check_model(model)), positional(inputs)
    asked = read_features(features, inner, inputs) if features is not None else ()
    programs = exported(inner, inputs)
    bare = frozenset(plain_name(f"{n}.{own}" if n else own) for n, module in inner.named_modules() for own in kernels(module))
    settings = Settings(programs, recomputed(inner), exact, asked, experts, slimmable(inner), rewrite, bare)
    choices = choose(settings)
    trace, weights = follow(settings, choices)
    components = components_of(trace, weights)
    graph = _graph(inner, trace, weights, components)
    may_go = {place for group in graph.groups for place in group.inputs}
    whole = kept_inputs(input_tensors(inner, inputs), may_go, graph.inputs)
    summed = {name for group in graph.groups if group.is_summed for name, _ in group.places}
    shared: frozenset[str] = frozenset(trace.blends & summed).union(*(p.shared() for p in programs))
    sized: dict[str, bool] = {}
    for name, cuts in _sized(trace, components) if rewrite else ():
        sized[name] = sized.get(name, False) or cuts
    norms, recorded = _norms(programs), how_recorded(programs)
    graph = replace(graph, norms=norms, shared=shared, inputs=whole, recorded=recorded, sized=sized)
    return graph, trace, components, weights


def _norms(programs: Sequence[Exported]) -> tuple[Norm, ...]:
    """Find the norms that alone read the output of a layer, on each way through the code that was seen."""
    first, *others = [list(norms_behind(one)) for one in programs if one is programs[0] or one.refused]
    return tuple(norm for norm in first if all(norm in other for other in others))


def _sized(trace: Trace, components: Components) -> Iterator[tuple[str, bool]]:
    """Find the modules in whose code sizes of what may lose channels can stand, and those of which edits were asked for."""
    for node, value in trace.values.items():
        if node in trace.requests or (node.op == "call_function" and called(node) in SIZED):
            read = values_in([trace.values.get(n) for n in node.all_input_nodes])
            labelled = [d for v in (*read, *values_in(value)) for d in v.dims if isinstance(d, np.ndarray)]
            if any(components.free(d).size for d in labelled):
                yield module_of(node), node in trace.requests or is_cut(node, value)


def _graph(model: nn.Module, trace: Trace, weights: Mapping[str, Value], components: Components) -> ChannelGraph:
    """Collect the components that may be removed into groups: those that are slices of the same dimensions."""
    touched: dict[int, list[tuple[Place, Array]]] = {}
    pinned: dict[Place, str] = {}
    partly: dict[Place, str] = {}
    for name, value in weights.items():
        for d, labels in enumerate(value.dims):
            if not isinstance(labels, np.ndarray):
                continue
            of = components.numbers(labels)
            order = np.argsort(of, kind="stable")
            numbers, starts = np.unique(of[order], return_index=True)
            free = [c not in components.pinned for c in numbers.tolist()]
            if not any(free):
                pinned[name, d] = components.pinned[int(numbers[0])]
            elif not all(free):
                partly[name, d] = components.pinned[int(numbers[free.index(False)])]
            for number, where, may_go in zip(numbers.tolist(), np.split(order, starts[1:]), free, strict=True):
                if may_go:
                    touched.setdefault(number, []).append(((name, d), where))
    entering = _entering(trace, components)
    kinds = [_numbers(components, dims) for dims in (trace.summed, trace.shown)]
    groups, readers = _grouped(touched, entering, kinds, trace.lengths), frozenset(trace.readers)
    whole = {place: components.pinned.get(n, "no weight reads it") for n, slices in entering.items() for place, _ in slices}
    return ChannelGraph(
        tuple(_named(groups, readers)),
        pinned,
        readers,
        dict(_normed(model, trace, components, touched)),
        frozenset(trace.rescaled),
        inputs=whole,
        counted={name: (_size(dims), _places(components, dims, touched)) for name, dims in trace.counted.items()},
        input_sizes={(name, d): v.shape[d] for name, v in trace.inputs.items() for d, x in enumerate(v.dims) if x is not FIXED},
        partly=partly,
    )


def _numbers(components: Components, dims: Iterable[Dim]) -> set[int]:
    return {int(n) for dim in dims if isinstance(dim, np.ndarray) for n in np.unique(components.numbers(dim))}


def _size(dims: Sequence[Dim]) -> int:
    return next(len(dim) for dim in dims if isinstance(dim, np.ndarray))


def _places(components: Components, dims: Iterable[Dim], touched: Mapping[int, Slices]) -> frozenset[Place]:
    """Return the first place of each component among some dimensions that may go."""
    return frozenset(touched[n][0][0] for n in _numbers(components, dims) if n in touched)


Slices = list[tuple[Place, Array]]  # of one component: a place, and the indices there


def _entering(trace: Trace, components: Components) -> dict[int, Slices]:
    """Return for each component of an input's labels the dimensions of inputs, and the indices there."""
    found: dict[int, Slices] = {}
    for argument, value in trace.inputs.items():
        for d, labels in enumerate(value.dims):
            if isinstance(labels, np.ndarray):
                of = components.numbers(labels)
                for number in np.unique(of).tolist():
                    found.setdefault(number, []).append(((argument, d), np.flatnonzero(of == number)))
    return found


def _grouped(
    touched: Mapping[int, Slices],
    entering: Mapping[int, Slices],
    kinds: Sequence[Collection[int]],
    lengths: Collection[Place],
) -> list[Group]:
    """Make groups of the components that are slices of the same dimensions of the same weights and inputs."""
    found: dict[tuple[Any, ...], list[tuple[Slices, Slices]]] = {}
    for number, places in touched.items():
        inputs = entering.get(number, [])
        slices = (tuple((place, where.size) for place, where in slices) for slices in (places, inputs))
        flags = tuple(number in of for of in kinds)
        found.setdefault((flags, *slices), []).append((places, inputs))
    return [_group(members, kind[0][0], kind[0][1], lengths) for kind, members in found.items()]


def _group(members: Sequence[tuple[Slices, Slices]], is_summed: bool, is_shown: bool, lengths: Collection[Place]) -> Group:
    places, inputs = _stacked([slices for slices, _ in members]), _stacked([slices for _, slices in members])
    order = np.argsort(next(iter((inputs or places).values()))[:, 0], kind="stable")
    return Group(
        {place: indices[order] for place, indices in places.items() if place not in lengths},
        ".".join(map(str, next(iter(inputs), ()))),
        {place: indices[order] for place, indices in inputs.items()},
        is_summed,
        is_shown,
        {place: indices[order] for place, indices in places.items() if place in lengths},
    )


def _stacked(members: Sequence[Slices]) -> dict[Place, Array]:
    return {place: np.stack([m[i][1] for m in members]) for i, (place, _) in enumerate(members[0])}


def _normed(
    model: nn.Module, trace: Trace, components: Components, touched: Mapping[int, Sequence[tuple[Place, Array]]]
) -> Iterator[tuple[str, tuple[tuple[Place, int] | None, ...]]]:
    """Find for each norm without parameters the group and channel of each index that it normalises.

    They are told by the first place, and the index there, of the same component; None stands for an index that stays.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, dims in trace.normed.items():
        module = modules.get(plain_name(name))
        if not isinstance(module, NORMS) or module._parameters.get("weight") is not None:
            continue
        streams = {tuple(components.numbers(labels).tolist()) for labels in dims if isinstance(labels, np.ndarray)}
        if len(streams) == 1:  # else it is called on several: where their sizes part, the check finds it
            (numbers,) = streams
            firsts = {n: (touched[n][0][0], int(touched[n][0][1][0])) for n in numbers if n in touched}
            yield plain_name(name), tuple(firsts.get(n) for n in numbers)


def first_maker(places: Iterable[Place], readers: frozenset[Place]) -> str:
    """Return the name of the first weight that makes the channels; if none does, the first that they run through."""
    names = [n for n, d in places if (n, d) not in readers] or [n for n, _ in places]
    return next((n for n in names if n.endswith("weight")), next((n for n in names if not n.endswith("bias")), names[0]))


def _named(groups: Iterable[Group], readers: frozenset[Place]) -> Iterator[Group]:
    """Give each group a name of its own, such as `conv.weight` and `conv.weight #2`."""
    seen: Counter[str] = Counter()
    for group in groups:
        name = group.name if group.inputs else first_maker(group.places, readers)
        seen[name] += 1
        yield replace(group, name=name if seen[name] == 1 else f"{name} #{seen[name]}")
