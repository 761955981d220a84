"""Traced copies of modules: sizes that are written into a module's code are put right in a trace of it, which then runs.

Code such as `x.reshape(B, N, C)`, with the width of its input where that of its heads is meant, cannot lose heads. So the
module's `forward` is traced by `torch.fx`, for training and for eval mode, the numbers in it are edited, and the module gets a
class of its own whose `forward` is the result. It stays the same object: parameters, names, hooks and attributes are as before,
and undoing is to give it its class back. What a module is traced for, and the edits, are plain data (`Rewrite`), so that they
can be repeated on a fresh model.

To add a kind of edit: a function `(graph, node, edit)` that changes the graph of a trace, registered by `kind`.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node

from fasterai.model.supported import said

__all__ = [
    "GIVEN",
    "KINDS",
    "Edit",
    "Path",
    "Rewrite",
    "apply_edits",
    "change_rewrites",
    "edited",
    "kind",
    "nested",
    "plain_class",
    "replaced",
    "rewrite_of",
    "rooted",
    "traced",
    "traced_class",
]

#: Types of arguments that a trace is made for, where a module is called with the same ones each time.
GIVEN = (type(None), bool, str)
PARTS = ("_parameters", "_buffers", "_modules")
CONTAINERS = (dict, list, set)
Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Edit:
    """One change of a module's trace.

    Attributes:
        node: The operation, by its name in the trace.
        kind: What is done to it, by its name in `KINDS`.
        path: Which argument: `args` or `kwargs`, then indices, keys, or a slice's bound; empty where the operation is meant.
        before: The number before; None where it was worked out in each forward pass.
        after: The number after; for the parts of a split all of them.
    """

    node: str
    kind: str
    path: Path
    before: Any
    after: Any

    def to_list(self) -> list[Any]:
        """Return plain data, ready for JSON."""
        return [self.node, self.kind, list(self.path), _listed(self.before), _listed(self.after)]

    @classmethod
    def from_list(cls, data: Any) -> Edit:
        """Make an edit from the data of `to_list`.

        Raises:
            ValueError: It is no such data.
        """
        if not isinstance(data, list | tuple) or len(data) != 5 or not isinstance(data[0], str) or data[1] not in KINDS:
            raise ValueError(f"an edit must be [node, kind, path, before, after], its kind one of {[*KINDS]}, got {data!r}")
        node, name, path, before, after = data
        if not isinstance(path, list | tuple) or not all(isinstance(key, str) or _is_count(key) for key in path):
            raise ValueError(f"an edit's path must be a list of names and indices, got {path!r}")
        if not (before is None or _is_sizes(before)) or not _is_sizes(after):
            raise ValueError(f"an edit's numbers must be whole numbers from 0 on, got {before!r} and {after!r}")
        return cls(node, name, tuple(path), _tupled(before), _tupled(after))


@dataclass(frozen=True)
class Rewrite:
    """How a module is traced, and the edits of its trace.

    Attributes:
        given: Arguments that it is traced for, by name; called with others it raises an error.
        edits: The changes of its trace.
    """

    given: tuple[tuple[str, Any], ...] = ()
    edits: tuple[Edit, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"given": [list(pair) for pair in self.given], "edits": [edit.to_list() for edit in self.edits]}

    @classmethod
    def from_dict(cls, data: Any) -> Rewrite:
        """Make it from the data of `to_dict`.

        Raises:
            ValueError: It is no such data.
        """
        if not isinstance(data, Mapping) or not all(isinstance(data.get(part), list) for part in ("given", "edits")):
            raise ValueError(f"a rewrite must be a dict of given and edits, got {data!r}")
        for pair in data["given"]:
            if not isinstance(pair, list) or len(pair) != 2 or not (isinstance(pair[0], str) and isinstance(pair[1], GIVEN)):
                raise ValueError(f"what a rewrite is given must be [argument, None, bool or text], got {pair!r}")
        return cls(tuple((name, value) for name, value in data["given"]), tuple(map(Edit.from_list, data["edits"])))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list | tuple) and all(map(_is_count, value)))


# --- kinds of edits --------------------------------------------------------------------------------------------------

Kind = Callable[[Graph, Node, Edit], None]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of edits."""

    def enter(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return enter


@kind("size")
def _size(graph: Graph, node: Node, edit: Edit) -> None:
    """Put a number in the place of another, or of what is worked out there."""
    _put(node, edit.path, edit.after)


@kind("share")
def _share(graph: Graph, node: Node, edit: Edit) -> None:
    """Take a share of what is worked out, as of `B * heads` where heads are fewer: times `after`, divided by `before`."""
    with graph.inserting_before(node):
        worked_out = nested((node.args, node.kwargs), rooted(edit.path))
        times = graph.call_function(_times, (worked_out, edit.after, edit.before))
    _put(node, edit.path, times)


def _times(x: int, after: int, before: int) -> int:
    return x * after // before


@kind("mean")
def _mean(graph: Graph, node: Node, edit: Edit) -> None:
    """Make a mean over n of N entries, of which the others were zero, the mean over all N: times n / N."""
    with graph.inserting_after(node):
        times = graph.call_function(torch.mul, (node, edit.after / edit.before))
    node.replace_all_uses_with(times, delete_user_cb=lambda user: user is not times)


def rooted(path: Path) -> Path:
    """Return a path as one of the pair of an operation's positional and keyword arguments."""
    return ({"args": 0, "kwargs": 1}[str(path[0])], *path[1:])


def nested(value: Any, path: Path) -> Any:
    """Return what stands at a path of nested lists, dicts and slices.

    >>> nested([5, (6, slice(None, 7))], (1, 1, "stop"))
    7
    """
    for key in path:
        value = getattr(value, str(key)) if isinstance(value, slice) else value[key]
    return value


def _put(node: Node, path: Path, value: Any) -> None:
    args, kwargs = replaced((node.args, node.kwargs), rooted(path), value)
    node.args, node.kwargs = tuple(args), dict(kwargs)


def replaced(whole: Any, path: Path, value: Any) -> Any:
    """Return nested lists, dicts and slices with another value at a path.

    >>> replaced(((1, (2, 3)), {}), (0, 1, 0), 5)
    ((1, (5, 3)), {})
    """
    if not path:
        return value
    key, inner = path[0], replaced(nested(whole, path[:1]), path[1:], value)
    if isinstance(whole, slice):
        bounds = {"start": whole.start, "stop": whole.stop, "step": whole.step, str(key): inner}
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    if isinstance(whole, Mapping):
        return {**whole, key: inner}
    made = [inner if i == key else x for i, x in enumerate(whole)]
    return tuple(made) if isinstance(whole, tuple) else made


# --- traces ----------------------------------------------------------------------------------------------------------


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


def traced(module: nn.Module, given: Mapping[str, Any], training: bool) -> Graph:
    """Trace a module's own code, as its class has it, with its attributes as they are now; it is not changed.

    Args:
        module: The module.
        given: Arguments that it is traced for, by name; all others may differ from call to call.
        training: The mode.

    Raises:
        ValueError: Its code depends on the values that it is given, or notes something on the module.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise ValueError("it has a forward of its own that is no code of its class")
    stand_in = _stand_in(module, training)
    before = _attributes(stand_in, training)
    try:
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
    stand_in = cast(nn.Module, object.__new__(plain_class(module)))
    own = {key: copy.copy(value) if isinstance(value, CONTAINERS) else value for key, value in vars(module).items()}
    vars(stand_in).update({**own, "training": training})
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


def apply_edits(graph: Graph, edits: tuple[Edit, ...]) -> None:
    """Change a trace in place.

    Raises:
        ValueError: An edit names an operation or an argument that there is not, or that has another number.
    """
    nodes = {node.name: node for node in graph.nodes}
    for edit in edits:
        try:
            there = nested((nodes[edit.node].args, nodes[edit.node].kwargs), rooted(edit.path)) if edit.path else edit.before
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{edit.node} has no argument {edit.path}") from error
        if edit.kind == "size" and edit.before is not None and there != edit.before:
            raise ValueError(f"{edit.node} has {there} where the edit has {edit.before}")
        KINDS[edit.kind](graph, nodes[edit.node], edit)


# --- classes ---------------------------------------------------------------------------------------------------------


class _Traced:
    """What the classes of traced copies share: the rewrite, and how they are copied and pickled."""

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
        self.__class__ = traced_class(self, rewrite)

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
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    own = {"forward": forward, "rewrite": rewrite, "__module__": base.__module__, "__doc__": base.__doc__, "_stands_for": base}
    return cast(type[nn.Module], type(base)(f"Traced{base.__name__}", (_Traced, base), own))


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
    def put() -> None:
        module.__class__ = to

    return put
