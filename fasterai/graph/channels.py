"""Channel graph: the groups of coupled channels of a network, and the reasons why other channels must stay.

A group of coupled channels holds channels that run through the same weights. To remove one channel is to remove its slice of
each of those weights: row i of one layer, entry i of the norm behind it, column i of the next layer.

Over 300 lines, since reading the operations and grouping their labels are two halves of one pass.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from fasterai.display import Shown, Table, counted
from fasterai.graph.exported import Exported, exported, how_recorded, unmet
from fasterai.graph.features import Asked, FeaturesLike, kept_inputs, read_features
from fasterai.graph.inputs import input_tensors
from fasterai.graph.labels import FIXED, FREE, Array, Components, Dim, Packed, is_zeroed, plain, zeroed
from fasterai.graph.reasons import summed_reasons
from fasterai.graph.rules import RULES, Trace, Value, unknown
from fasterai.graph.rules.trace import called, is_cut, module_of, unmarked, values_in
from fasterai.model.dataflow import VIEWS
from fasterai.model.inputs import positional
from fasterai.model.names import plain_name, unwrap
from fasterai.model.norms import Norm, norms_behind
from fasterai.model.slim_norms import slimmable
from fasterai.model.supported import check_model, recomputed

__all__ = ["ChannelGraph", "Group", "channel_graph"]

#: Modules that know the size of what they normalise, also where they have no parameters.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
#: Operations whose sizes code gives as numbers.
SIZED = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "unflatten", "expand", "repeat", "broadcast_to"),
        *("split", "split_with_sizes", "chunk", "tensor_split", "slice", "narrow", "unsafe_split", "unsafe_chunk"),
    )
)
Place = tuple[str, int]  # a parameter's or buffer's name, and one of its dimensions


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
        exact: True if channels that a norm, or a mean, averages over must stay: without them the average moves.
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
    settings = _Settings(programs, recomputed(inner), exact, asked, experts, slimmable(inner), rewrite)
    choices = _choose(settings)
    trace, weights = _follow(settings, choices)
    components = _components(trace, weights)
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


@dataclass(frozen=True)
class _Settings:
    """Settings of a pass: the operations, the parameters that stay, and those of `Trace`."""

    programs: Sequence[Exported]
    stay: Mapping[str, str]
    exact: bool
    asked: Sequence[Asked]
    experts: bool
    slim: Collection[str]
    rewrite: bool = False


def _choose(settings: _Settings) -> dict[str, int]:
    """Choose a way for each kind of operation that has several, so that as many weights as possible may be removed.

    Each kind is tried in each of its ways while the others stay as they are; the best of these is taken, until none is better.
    """
    choices: dict[str, int] = {}
    trace, weights = _follow(settings, choices)
    best = _removable(trace, weights)
    while True:
        ways = [(kind, way) for kind, count in sorted(trace.options.items()) for way in range(count)]
        trials = [{**choices, kind: way} for kind, way in ways if way != choices.get(kind, 0)]
        followed = [_tried(settings, trial) for trial in trials]
        scores = [_removable(*one) for one in followed]
        if max(scores, default=best) <= best:
            return choices
        best = max(scores)
        choices, trace = trials[scores.index(best)], followed[scores.index(best)][0]


def _tried(settings: _Settings, choices: dict[str, int]) -> tuple[Trace, dict[str, Value]]:
    """Follow a trial, of which no operation's result is needed any more."""
    trace, weights = _follow(settings, choices)
    trace.values.clear()
    return trace, weights


#: What may go by products of computed tensors counts less, so that of an attention's ways heads win over widths of heads.
BY_PRODUCTS = 0.75


def _removable(trace: Trace, weights: Mapping[str, Value]) -> tuple[float, int]:
    """Rate a pass: the amount of weights that may be removed, then the number of channels.

    A dimension of which a share f may go counts as if half of that share went: `(1 - f / 2)` of its weights are left.
    """
    components = _components(trace, weights)
    is_free = np.ones(int(components.of.max(initial=-1)) + 1, np.bool_)
    is_free[list(components.pinned)] = False
    counts = np.ones(is_free.size)
    counts[components.numbers(np.concatenate([*trace.products, np.zeros(0, np.int64)]))] = BY_PRODUCTS
    total, channels = 0.0, np.zeros(is_free.size, np.bool_)
    for value in weights.values():
        stays = 1.0
        for labels in value.dims:
            if isinstance(labels, np.ndarray):
                free = (of := components.numbers(labels))[is_free[of]]
                stays *= 1 - float(counts[free].sum()) / labels.size / 2
                channels[free] = True
        total += (1 - stays) * math.prod(value.shape)
    return total, int(channels.sum())


def _components(trace: Trace, weights: Mapping[str, Value]) -> Components:
    """Work out the connected labels, and pin every component that is a whole dimension: nothing of it would be left."""
    components = trace.labels.components()
    pinned = dict(components.pinned)
    for value in (*weights.values(), *trace.inputs.values()):
        for labels in value.dims:
            if isinstance(labels, np.ndarray) and ((of := components.numbers(labels)) == of[0]).all():
                pinned.setdefault(int(of[0]), "its channels can only be removed all together")
    return Components(components.of, pinned)


def _follow(settings: _Settings, choices: dict[str, int]) -> tuple[Trace, dict[str, Value]]:
    """Run over the operations once, and return the labels and the values of the parameters and buffers."""
    asked = {one.argument: one for one in settings.asked}
    written: set[Any] = set()
    sizes = unmet(settings.programs)
    while True:
        trace = Trace(choices, settings.exact, asked, settings.experts, settings.slim, settings.rewrite, frozenset(written))
        weights: dict[str, Value] = {}
        for program in settings.programs:
            _follow_one(trace, program, weights, sizes)
        if trace.written <= written:
            break
        written |= trace.written  # such tensors get labels from the start, so that all views of them learn what is written
    trace.pin_untaken()
    for name in weights.keys() - {name for program in settings.programs for name in program.uses()}:
        trace.labels.pin_all(weights[name].dims, "no operation reads it")
    for name in weights.keys() & settings.stay:
        trace.labels.pin_all(weights[name].dims, settings.stay[name])
    trace.settle()
    return trace, weights


def _follow_one(trace: Trace, program: Exported, weights: dict[str, Value], sizes: Mapping[int, str]) -> None:
    names, parameters = program.names, program.program.graph_signature.inputs_to_parameters
    given = program.inputs
    values = trace.values
    trace.roots = program.roots
    idle, unused = program.idle_and_unused()
    for node in program.program.graph.nodes:
        if node in idle:
            continue
        if node.op == "placeholder":
            name, is_parameter = names.get(node.name), node.name in parameters
            values[node] = _placeholder(trace, node, name, weights, is_parameter, given.get(node.name, ""))
        elif node.op == "output":
            for value in (v for a in node.args[0] if isinstance(v := values.get(a), Value)):
                trace.labels.pin_all(value.dims, "it is an output of the network")
        else:
            values[node] = _apply(trace, node, values)
        for value in values_in(values.get(node)) if sizes else ():
            _keep_fit(trace, value, sizes)
        for value in values_in(values[node]) if node in unused else ():
            trace.labels.pin_all(value.dims, f"{node.name} is returned in training alone, or not at all")


def _keep_fit(trace: Trace, value: Value, sizes: Mapping[int, str]) -> None:
    """Pin the dimensions that a parameter fits which no recorded run has met: on other values it may read them."""
    for n, dim in zip(value.shape, value.dims, strict=True):
        if n in sizes:
            trace.labels.pin(dim, f"{sizes[n]}, which no recorded run has met, may read it on other values")


def _placeholder(
    trace: Trace, node: Any, name: str | None, weights: dict[str, Value], is_parameter: bool, argument: str
) -> Any:
    shown = node.meta.get("val")
    if not isinstance(shown, torch.Tensor):
        return shown
    shape = tuple(int(n) for n in shown.shape)
    if name is None:
        return trace.input(argument, shape)
    if name not in weights:
        fresh = [trace.labels.new(n) if n > 1 else FREE for n in shape]
        dims: tuple[Dim, ...] = tuple(zeroed(x) if is_parameter and isinstance(x, np.ndarray) else x for x in fresh)
        weights[name] = Value(shape, dims, tuple((name, d) for d in range(len(shape))), is_parameter)
    return weights[name]


def _apply(trace: Trace, node: Any, values: dict[Any, Any]) -> Any:
    arguments, keywords = tree_map(lambda a: values.get(a, a) if isinstance(a, torch.fx.Node) else a, (node.args, node.kwargs))
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    name = getattr(node.target, "__name__", "").partition(".")[0]
    found: Callable[..., Any] | None = RULES.get(name)
    result = trace.fitted(node, _ruled(trace, found or unknown, node, arguments, keywords))
    if name.endswith("_") and not name.endswith("__") and isinstance(result, Value) and isinstance(arguments[0], Value):
        _written(trace, node, arguments[0], result, trace.roots[node.args[0]])
        values[node.args[0]] = result
        _forget(trace, node, arguments[0], result, values)
    if found is None or (isinstance(result, Value) and result.is_blend and not any(result is a for a in arguments)):
        return result
    shown = arguments[0] if name.lstrip("_") in VIEWS and isinstance(arguments[0], Value) else None
    return [_seen(v, shown) for v in result] if isinstance(result, list) else _seen(result, shown)


def _ruled(trace: Trace, rule: Callable[..., Any], node: Any, arguments: Any, keywords: Any) -> Any:
    """Return what a rule makes of an operation; where it does not know how the operation is called, pin what it reads.

    Tensors without dimensions, alone, have no channels to follow.
    """
    made, read = node.meta.get("val"), values_in([arguments, keywords])
    if isinstance(made, torch.Tensor) and not made.dim() and not any(value.shape for value in read):
        return Value((), ())
    try:
        return rule(trace, node, *_separate(trace, node, arguments), **tree_map(partial(_settle, trace), keywords))
    except Exception as error:
        note = f"{node.target} is called as its rule does not know ({node.name}, {type(error).__name__})"
        trace.labels.pin_all([dim for value in read for dim in value.dims], note)
        return unknown(trace, node, *arguments, **keywords)


#: Operations that leave a dimension that was merged of several as it is.
UNPACKING = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "to", "_to_copy", "contiguous")


def _separate(trace: Trace, node: Any, arguments: Any) -> Any:
    """Pin dimensions that were merged of several, but for views, and for the columns of a matrix that is multiplied."""
    name = called(node)
    if name in UNPACKING:
        return arguments
    if name not in ("matmul", "mm") or not isinstance(last := arguments[1].dims[-1], Packed):
        return tree_map(partial(_settle, trace), arguments)
    a, b = arguments
    return _settle(trace, a), replace(b, dims=(*_settle(trace, Value(b.shape[:-1], b.dims[:-1])).dims, last))


def _settle(trace: Trace, value: Any) -> Any:
    """Return a value without dimensions that were merged of several: these stay as they are."""
    if not isinstance(value, Value) or not any(isinstance(d, Packed) for d in value.dims):
        return value
    trace.labels.pin_all([d for d in value.dims if isinstance(d, Packed)], "")
    return replace(value, dims=tuple(FIXED if isinstance(d, Packed) else d for d in value.dims))


def _written(trace: Trace, node: Any, before: Value, after: Value, root: Any) -> None:
    """Note labels that are written in place into a tensor of unlabelled size, whose other views have to learn of them.

    The next pass gives that tensor labels; where it cannot, what is written is pinned.
    """
    if len(before.shape) != len(after.shape):  # `unsqueeze_` and the like give the tensor another shape, and write nothing
        return
    for size, was, now in zip(before.shape, before.dims, after.dims, strict=True):
        if size > 1 and was is FREE and now is not FREE:
            trace.written.add(root)
            trace.labels.pin(now, f"{node.name} writes it into another tensor")


def _forget(trace: Trace, node: Any, before: Value, after: Value, values: dict[Any, Any]) -> None:
    """Forget what is known to be zero of the tensor that is written in place and of its views, where that may be lost."""
    same = len(before.shape) == len(after.shape)
    if same and all((is_zeroed(b) <= is_zeroed(a)).all() for b, a in zip(before.dims, after.dims, strict=True)):
        return
    for other, value in values.items():
        if trace.roots.get(other) is trace.roots[node.args[0]] and isinstance(value, Value | list):
            values[other] = unmarked(value) if isinstance(value, Value) else [unmarked(v) for v in values_in(value)]


def _seen(result: Any, shown: Value | None) -> Any:
    """Return a result with the places of the weight that it is a view of; with none if it is no view."""
    if not isinstance(result, Value):
        return result
    places = _viewed_places(shown, result) if shown is not None and shown.is_weight and shown.places else ()
    return replace(result, places=places, is_weight=bool(places), is_blend=bool(places) and bool(shown and shown.is_blend))


def _viewed_places(before: Value, after: Value) -> tuple[Place, ...]:
    """Find for each dimension of a view the weight's dimension with the same labels; () unless each has one."""
    places = []
    for dim in after.dims:
        if isinstance(dim, Packed):
            return ()
        found = [p for p, d in zip(before.places, before.dims, strict=True) if _carries(d, dim)]
        if not found:
            return ()
        places.append(found[0])
    return tuple(places)


def _carries(whole: Dim, part: Dim) -> bool:
    if not isinstance(part, np.ndarray):
        return True
    return isinstance(whole, np.ndarray) and (part is whole or bool(np.isin(plain(part), plain(whole)).all()))


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
