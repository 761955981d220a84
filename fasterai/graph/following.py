"""Pass over a network's operations: labels of every tensor's dimensions, by the rules, in the ways that leave most to go.

Over 300 lines, since what a pass notes beside the rules stands in one place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from fasterai.graph.exported import Exported, unmet
from fasterai.graph.features import Asked
from fasterai.graph.kernels import computed_weights, kernels_in
from fasterai.graph.labels import FIXED, FREE, Components, Dim, Packed, is_zeroed, plain, zeroed
from fasterai.graph.rules import RULES, Trace, Value, unknown
from fasterai.graph.rules.trace import all_fixed, called, shape_of, unmarked, values_in
from fasterai.model.dataflow import VIEWS

__all__ = ["MADE", "Place", "Settings", "choose", "components_of", "follow"]

Place = tuple[str, int]  # a parameter's or buffer's name, and one of its dimensions


@dataclass(frozen=True)
class Settings:
    """Settings of a pass: the operations, the parameters that stay, and those of `Trace`.

    `kernels` are parameters that convolutions make weights of, whose further dimensions stay. `fitted` are the tensors made to
    fit that need labels, as passes have found: each begins with what the others know.
    """

    programs: Sequence[Exported]
    stay: Mapping[str, str]
    exact: bool
    asked: Sequence[Asked]
    experts: bool
    slim: Collection[str]
    rewrite: bool = False
    kernels: Collection[str] = ()
    fitted: set[Any] = field(default_factory=set)


def choose(settings: Settings) -> dict[str, int]:
    """Choose a way for each kind of operation that has several, so that as many weights as possible may be removed.

    Each kind is tried in each of its ways while the others stay as they are; the best of these is taken, until none is better.
    """
    choices: dict[str, int] = {}
    trace, weights = follow(settings, choices)
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


def _tried(settings: Settings, choices: dict[str, int]) -> tuple[Trace, dict[str, Value]]:
    """Follow a trial, of which no operation's result is needed any more."""
    trace, weights = follow(settings, choices)
    trace.values.clear()
    return trace, weights


#: What may go by products of computed tensors counts less, so that of an attention's ways heads win over widths of heads.
BY_PRODUCTS = 0.75


def _removable(trace: Trace, weights: Mapping[str, Value]) -> tuple[float, int]:
    """Rate a pass: the amount of weights that may be removed, then the number of channels.

    A dimension of which a share f may go counts as if half of that share went: `(1 - f / 2)` of its weights are left.
    """
    components = components_of(trace, weights)
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


def components_of(trace: Trace, weights: Mapping[str, Value]) -> Components:
    """Work out the connected labels, and pin every component that is a whole dimension: nothing of it would be left."""
    components = trace.labels.components()
    pinned = dict(components.pinned)
    for value in (*weights.values(), *trace.inputs.values()):
        for labels in value.dims:
            if isinstance(labels, np.ndarray) and ((of := components.numbers(labels)) == of[0]).all():
                pinned.setdefault(int(of[0]), "its channels can only be removed all together")
    return Components(components.of, pinned)


def follow(settings: Settings, choices: dict[str, int]) -> tuple[Trace, dict[str, Value]]:
    """Run over the operations once, and return the labels and the values of the parameters and buffers."""
    asked = {one.argument: one for one in settings.asked}
    written = settings.fitted
    sizes = unmet(settings.programs)
    while True:
        trace = Trace(choices, settings.exact, asked, settings.experts, settings.slim, settings.rewrite, frozenset(written))
        weights: dict[str, Value] = {}
        for program in settings.programs:
            _follow_one(trace, program, weights, sizes, settings.kernels)
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


def _follow_one(
    trace: Trace, program: Exported, weights: dict[str, Value], sizes: Mapping[int, str], kernels: Collection[str]
) -> None:
    names, parameters = program.names, program.program.graph_signature.inputs_to_parameters
    given = program.inputs
    values = trace.values
    trace.roots = program.roots
    idle, unused = program.idle_and_unused()
    nodes = list(program.program.graph.nodes)
    trace.computed = computed_weights(nodes, names)
    computed = kernels_in(nodes, trace.computed)
    for node in nodes:
        if node in idle:
            continue
        if node.op == "placeholder":
            name, is_parameter = names.get(node.name), node.name in parameters
            value = _placeholder(trace, node, name, weights, is_parameter, given.get(node.name, ""))
            values[node] = _without_kernel(trace, node, value) if name in kernels or node in computed else value
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


def _without_kernel(trace: Trace, node: Any, weight: Value) -> Value:
    trace.labels.pin_all(weight.dims[2:], f"{node.name}'s kernel size")
    return replace(weight, dims=(*weight.dims[:2], *all_fixed(weight.shape[2:])))


def _apply(trace: Trace, node: Any, values: dict[Any, Any]) -> Any:
    arguments, keywords = tree_map(lambda a: values.get(a, a) if isinstance(a, torch.fx.Node) else a, (node.args, node.kwargs))
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    name = getattr(node.target, "__name__", "").partition(".")[0]
    found: Callable[..., Any] | None = RULES.get(name)
    result = trace.fitted(node, _ruled(trace, found or unknown, node, arguments, keywords))
    _note_made(trace, node, values, result)
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


#: Operations that make a tensor of a size that code gives, and those in which it meets others.
MADE = frozenset(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"))
MEETINGS = frozenset(("cat", "add", "sub", "mul", "lstm", "gru", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))


def _note_made(trace: Trace, node: Any, values: Mapping[Any, Any], result: Any) -> None:
    """Note tensors made to fit, as first states are, that meet what may shrink: the next pass gives them labels."""
    if not trace.rewrite or called(node) not in MEETINGS:
        return
    for one in node.all_input_nodes:
        root, found, dims = trace.roots[one], values_in(values.get(one)), values_in(result)[0].dims
        value = found[0] if found and called(root) in MADE else Value((), ())
        for d in range(-min(len(value.dims), len(dims)), 0):
            is_met = isinstance(dims[d], np.ndarray) or (called(node) == "cat" and value.shape[d] != shape_of(node)[d])
            if is_met and value.dims[d] is FREE and value.shape[d] > 1:
                trace.written.add(root)


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
