"""Traces of modules' own code by `torch.fx`: the modules that it calls stay calls, and nothing is noted on the module."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node

from fasterai.model.supported import said
from fasterai.prune.surgery.makers import traced_makers

__all__ = [
    "ASIDE",
    "KEPT",
    "READS",
    "CodeTracer",
    "UntraceableError",
    "code_of",
    "filled",
    "plain_class",
    "raw_trace",
    "traced",
]

PARTS = ("_parameters", "_buffers", "_modules")
CONTAINERS = (dict, list, set)
ASIDE = "_forward_aside"  # the same, while something else runs for a moment
READS = (getattr, operator.getitem)
KEPT = "_forward_before_trace"  # a module's `self.forward = self.forward_in_parts`, while a traced copy runs instead


class UntraceableError(ValueError):
    """Code that no trace can stand for."""


class CodeTracer(torch.fx.Tracer):
    """Tracer of a module's own code; the modules that it calls stay as they are."""

    trace_asserts = True
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was made of; a traced copy has one of its own."""
    cls = type(module)
    while "_stands_for" in vars(cls):
        cls = vars(cls)["_stands_for"]
    return cls


def code_of(module: nn.Module) -> Callable[..., Any]:
    """Return the forward that a module runs by itself: that of its class, or the method that it has set in its place.

    Raises:
        UntraceableError: It runs something else, as a function that another library has put there.
    """
    own = next((vars(module)[key] for key in ("forward", KEPT, ASIDE) if key in vars(module)), None)
    if own is None:
        return plain_class(module).forward
    if getattr(own, "__self__", None) is not module:
        raise UntraceableError("it has a forward that is no code of its class")
    return cast(Callable[..., Any], own.__func__)


def traced(module: nn.Module, given: Mapping[str, Any], training: bool) -> Graph:
    """Make a trace of a module's own code, with its attributes as they are now; it is not changed.

    Args:
        module: The module.
        given: Arguments that it is traced for, by name; all others may differ from call to call.
        training: The mode.

    Raises:
        UntraceableError: Its code depends on the values that it is given, or notes something on the module.
    """
    return _tidy(raw_trace(module, given, training, CodeTracer()))


def raw_trace(module: nn.Module, given: Mapping[str, Any], training: bool, tracer: CodeTracer) -> Graph:
    """Make a trace by a tracer, as it comes; arguments and errors as for `traced`."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UntraceableError("it is a script")
    stand_in = _stand_in(module, training)
    before = _attributes(stand_in, training)
    try:
        with traced_makers():
            graph = tracer.trace(stand_in, dict(given) or None)
    except Exception as error:  # whatever code of the user's makes of a proxy
        raise UntraceableError(f"its code cannot be traced: {said(error)}") from error
    if _attributes(stand_in, training) != before:
        raise UntraceableError("its code notes something on the module in each forward pass")
    for node in graph.nodes:
        if node.op == "placeholder" and given:
            node.target = _argument(str(node.target), given, [*inspect.signature(type(stand_in).forward).parameters])
    return graph


def _tidy(graph: Graph) -> Graph:
    """Return a graph without sizes and devices that nobody reads, numbered anew: so both modes have the same names."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in READS):
            graph.erase_node(node)
    tidy, copied = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copied.__getitem__)
        base = node.name.rstrip("0123456789").removesuffix("_") or node.name
        copied[node] = tidy.create_node(node.op, node.target, args, kwargs, base, node.type)
    return tidy


def _argument(target: str, given: Mapping[str, Any], names: list[str]) -> str:
    """Return an argument's own name; `torch.fx` numbers those that it is given a value of."""
    return next((name for name in names if name in given and target.rpartition("_")[0] == name), target)


def _stand_in(module: nn.Module, training: bool) -> nn.Module:
    """Make a module with the same parts that a trace may write into."""
    base = plain_class(module)
    stand_in: nn.Module = object.__new__(type(base.__name__, (base,), {"forward": code_of(module)}))
    own = {key: copy.copy(value) if isinstance(value, CONTAINERS) else value for key, value in vars(module).items()}
    vars(stand_in).update({**own, "training": training})
    for key in ("forward", KEPT, ASIDE):
        vars(stand_in).pop(key, None)
    return stand_in


def filled(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Run a module's own code for the attributes that it sets, whatever else comes of it; tell if it has set any.

    Neither random numbers nor what norms count are moved by it.
    """
    other = _stand_in(module, module.training)
    other._buffers = dict(other._buffers)
    before = [(b, b.detach().clone()) for b in module.buffers()]
    parts = (vars(module), module._buffers), (vars(other), other._buffers)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with suppress(Exception):  # sizes in the code are not those of the weights
            other(*args, **kwargs)
        for buffer, values in before:
            buffer.copy_(values)
    found = False
    for own, new in zip(*parts, strict=True):
        for key in new.keys() - {*PARTS, "training"}:
            if own.get(key) is not new[key] and not isinstance(new[key], CONTAINERS):
                own[key], found = new[key], True
    return found


def _attributes(module: nn.Module, training: bool) -> dict[str, Any]:
    """Return what tells if a module was changed: its attributes and their entries.

    A dict that eval mode alone adds to is a cache, which its trace does without.
    """
    found = {key: id(value) if not isinstance(value, CONTAINERS) else _entries(value) for key, value in vars(module).items()}
    caches = [] if training else [key for key, value in vars(module).items() if isinstance(value, dict) and key not in PARTS]
    return {key: value for key, value in found.items() if key not in caches}


def _entries(container: Any) -> list[Any]:
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    return [(key, id(value)) for key, value in pairs]
