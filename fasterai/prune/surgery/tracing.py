"""Traced copies of modules, which run a trace of their code with edits instead of the code.

Code such as `x.reshape(B, N, C)`, with the width of its input where that of its heads is meant, cannot lose heads. So the
module's `forward` is traced by `torch.fx`, for training and for eval mode, the numbers in it are edited, and the module gets a
class of its own whose `forward` is the result. It stays the same object: parameters, names, hooks and attributes are as before,
and undoing is to give it its class back.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node

from fasterai.model.supported import said
from fasterai.prune.surgery.makers import traced_makers
from fasterai.prune.surgery.rearranging import can_be_written_out, rearranged
from fasterai.prune.surgery.rewriting import Rewrite, apply_edits

__all__ = ["ASIDE", "change_rewrites", "code_of", "edited", "plain_class", "put_class", "rewrite_of", "traced", "traced_class"]

PARTS = ("_parameters", "_buffers", "_modules")
CONTAINERS = (dict, list, set)
ASIDE = "_forward_aside"  # the same, while something else runs for a moment
KEPT = "_forward_before_trace"  # a module's `self.forward = self.forward_in_parts`, while a traced copy runs instead


class _Tracer(torch.fx.Tracer):
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


def rewrite_of(module: nn.Module) -> Rewrite | None:
    """Return how a module was rewritten; None where it runs its own code."""
    return type(module).rewrite if isinstance(module, _Traced) else None


def code_of(module: nn.Module) -> Callable[..., Any]:
    """Return the forward that a module runs by itself: that of its class, or the method that it has set in its place.

    Raises:
        ValueError: It runs something else, as a function that another library has put there.
    """
    own = next((vars(module)[key] for key in ("forward", KEPT, ASIDE) if key in vars(module)), None)
    if own is None:
        return rearranged if can_be_written_out(module) else plain_class(module).forward
    if getattr(own, "__self__", None) is not module:
        raise ValueError("it has a forward that is no code of its class")
    return cast(Callable[..., Any], own.__func__)


def traced(module: nn.Module, given: Mapping[str, Any], training: bool) -> Graph:
    """Make a trace of a module's own code, with its attributes as they are now; it is not changed.

    Args:
        module: The module.
        given: Arguments that it is traced for, by name; all others may differ from call to call.
        training: The mode.

    Raises:
        ValueError: Its code depends on the values that it is given, or notes something on the module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("it is a script")
    stand_in = _stand_in(module, training)
    before = _attributes(stand_in, training)
    try:
        with traced_makers():
            graph = _Tracer().trace(stand_in, dict(given) or None)
    except Exception as error:  # whatever code of the user's makes of a proxy
        raise ValueError(f"its code cannot be traced: {said(error)}") from error
    if _attributes(stand_in, training) != before:
        raise ValueError("its code notes something on the module in each forward pass")
    for node in graph.nodes:
        if node.op == "placeholder" and given:
            node.target = _argument(str(node.target), given, [*inspect.signature(type(stand_in).forward).parameters])
    return _tidy(graph)


def _tidy(graph: Graph) -> Graph:
    """Return a graph without sizes and devices that nobody reads, numbered anew: so both modes have the same names."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in (getattr, operator.getitem)):
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


def edited(module: nn.Module, rewrite: Rewrite) -> tuple[Graph, Graph]:
    """Return a module's traces for eval and training mode, edited.

    Raises:
        ValueError: It cannot be traced, does other operations in training, or an edit does not fit.
    """
    graphs = tuple(traced(module, dict(rewrite.given), training) for training in (False, True))
    first, second = ([(n.name, n.op, str(n.target)) for n in graph.nodes] for graph in graphs)
    if first != second:
        raise ValueError("its code does other operations in training")
    for graph in graphs:
        apply_edits(graph, rewrite.edits)
    return graphs[0], graphs[1]


class _Traced:
    """Parts that the classes of traced copies share: the rewrite, and how they are copied and pickled."""

    rewrite: Rewrite

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _waiting, (plain_class(cast(nn.Module, self)), self.rewrite), vars(self)


def _waiting(base: type[nn.Module], rewrite: Rewrite) -> Any:
    """Return a module that is traced once a pickle has given it its parts."""

    def restore(self: Any, state: dict[str, Any]) -> None:
        self.__class__ = base
        vars(self).update(state)
        put_class(self, traced_class(self, rewrite))

    return object.__new__(type(base.__name__, (base,), {"__setstate__": restore}))


def traced_class(module: nn.Module, rewrite: Rewrite) -> type[nn.Module]:
    """Make the class of a module's traced copy; to give it to the module is what puts the copy in its place.

    Raises:
        ValueError: The module cannot be traced, or an edit does not fit.
    """
    base = plain_class(module)
    codes = [graph.python_code("self") for graph in edited(module, rewrite)]
    in_eval, in_training = (_function(code) for code in codes)
    forward = in_eval if codes[0].src == codes[1].src else _by_mode(in_eval, in_training)
    code = code_of(module)
    forward.__signature__ = inspect.signature(code)  # type: ignore[attr-defined]
    forward.__doc__ = code.__doc__
    own = {"forward": forward, "rewrite": rewrite, "__module__": base.__module__, "__doc__": base.__doc__, "_stands_for": base}
    made: Any = type(base)
    return cast(type[nn.Module], made(f"Traced{base.__name__}", (_Traced, base), own))


def _function(code: Any) -> Callable[..., Any]:
    space = dict(code.globals)
    exec(compile(code.src, "<a module's code with its sizes put right>", "exec"), space)
    return cast(Callable[..., Any], space["forward"])


def _by_mode(in_eval: Callable[..., Any], in_training: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_training(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def change_rewrites(
    model: nn.Module, rewrites: Mapping[str, Rewrite]
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Give for each module a function that puts its traced copy in its place, and one that takes it back.

    Raises:
        ValueError: There is no such module, it cannot be traced, or an edit does not fit.
    """
    for name, rewrite in rewrites.items():
        try:
            module = model.get_submodule(name)
            before, after = type(module), traced_class(module, rewrite)
        except (AttributeError, ValueError) as error:
            which = name or "the model itself"
            raise ValueError(f"plan must be for this model, got one with edits of {which}, but {error}") from error
        yield _class_setter(module, after), _class_setter(module, before)


def _class_setter(module: nn.Module, to: type[nn.Module]) -> Callable[[], None]:
    return lambda: put_class(module, to)


def put_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module another class; a forward that it has set itself steps aside for a traced one."""
    module.__class__ = to
    held, now = (KEPT, "forward") if not issubclass(to, _Traced) else ("forward", KEPT)
    if held in vars(module):
        vars(module)[now] = vars(module).pop(held)
