"""Traces of code that decides by sizes, such as `if H % window > 0`: one for each way that its decisions can go.

`torch.fx` stops at such a decision. Here it is a fork: a trace is made for decisions given in advance, and ends at the first
one that is not among them. A run starts with no decisions, goes as far as that trace does, decides by its own sizes, and goes
on in the trace that has this decision too:

    way              the trace
    ()               x = pad(x); H = x.shape[1]; fork(H > 7, [x, H])
    (True,)          x = pad(x); H = x.shape[1]; fork(H > 7, [x, H]); x = roll(x); ...; return x
    (False,)         x = pad(x); H = x.shape[1]; fork(H > 7, [x, H]); ...; return x

A fork hands on the values that the code still holds then. So a traced copy is made of stretches from fork to fork (`Tree`),
every decision is taken where the code takes it, and nothing is computed twice. Decisions by sizes and plain arguments alone are
taken like that; those by the values of tensors are refused.

Ways share operations, and an edit is one of all of them. So an operation is not named by its number, as in other traces, but by
its place: the lines and columns of the code that lead to it, and the how-manieth time it is done there.

Over 300 lines, since traces and the tree of stretches that they are cut into share the forks.
"""

from __future__ import annotations

import hashlib
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, _symbolic_trace
from torch.fx.proxy import Attribute, TraceError

from fasterai.prune.surgery.rewriting import Edit, Way, apply_edits
from fasterai.prune.surgery.tracing import READS, CodeTracer, UntraceableError, filled, plain_class, raw_trace

__all__ = ["Tree", "code_function", "cut_at", "fork_at_end", "holds_wholes", "operations", "traced_way"]

#: What can be read of a tensor without its values.
ATTRIBUTES = frozenset(
    {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "itemsize", "nbytes"}
)
METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex"})
PLAIN = frozenset({"_operator", "operator", "builtins", "math"})
TORCH = str(Path(torch.__file__).parent)
BETWEEN = (str(Path(torch.fx.__file__).parent), str(Path(torch.overrides.__file__)), __file__)


def fork(choice: Any, values: Sequence[Any]) -> Any:
    """Return a decision; the values are what is handed on."""
    return choice


def truth(x: Any) -> bool:
    """Decide by a number."""
    return bool(_plain(x))


def number(x: Any) -> int:
    """Return the whole number that code asks for."""
    return int(_plain(x))


def length(x: Any) -> int:
    """Return how many numbers code goes through."""
    return len(_plain(x))


def _plain(x: Any) -> Any:
    if isinstance(x, Tensor) and not torch._C._get_tracing_state():  # there sizes are tensors too
        raise UntraceableError("its code decides by the values of tensors")
    return x


# --- traces ----------------------------------------------------------------------------------------------------------


class _Undecided(BaseException):
    """End of a trace: the next decision is not known. No `except Exception` of the code's may take it."""


class _Value(Proxy):
    """Stand-in of a value, which code may write into, count, or take for a whole number."""

    def __getattr__(self, k: str) -> Attribute:
        return _Part(self, k)

    def __len__(self) -> int:
        return int(cast(_Forking, self.tracer).decide(length, self))

    def __int__(self) -> int:
        return int(cast(_Forking, self.tracer).decide(number, self))

    @property
    def ndim(self) -> int:
        """Number of dimensions, which code looks things up by."""
        return int(cast(Any, self.tracer.create_proxy("call_function", getattr, (self, "ndim"), {})))

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Part(_Value, Attribute):
    """Stand-in of an attribute, as a tensor's shape."""


class _Forking(CodeTracer):
    """Tracer that takes the given decisions, and ends at the next one."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self._left = iter(way)
        self._held: list[tuple[Node, weakref.ref[Proxy]]] = []

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """Make a trace of a module's code, and of functions that a library has given to `torch.fx.wrap`."""
        try:
            with _nothing_whole():
                return super().trace(root, concrete_args)
        except _Undecided:
            self.graph.output(next(iter(reversed(self.graph.nodes))))
            return self.graph

    def proxy(self, node: Node) -> Proxy:
        """Make the stand-in of an operation's result; code that drops it cannot use it later."""
        made = _Value(node, self)
        self._held.append((node, weakref.ref(made)))
        return made

    def create_node(self, kind: Any, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None) -> Node:
        """Add an operation, named by its place in the code."""
        if kind not in ("placeholder", "output", "get_attr"):
            name = f"{str(getattr(target, '__name__', target)).replace('.', '_')}_at{_place()}"
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def to_bool(self, obj: Proxy) -> bool:
        """Decide by a size."""
        return bool(self.decide(truth, obj))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Go through sizes."""
        values: Any = obj
        return iter([values[i] for i in range(self.decide(length, obj))])

    def decide(self, how: Callable[[Any], Any], obj: Proxy) -> Any:
        """Return the decision by a value, or end the trace there."""
        if not _is_size(obj.node):
            raise TraceError("symbolically traced variables cannot be used as inputs to control flow")
        choice = self.create_node("call_function", how, (obj.node,), {})
        held = tuple(node for node, proxy in self._held if proxy() is not None or node.target is getattr)
        self.create_node("call_function", fork, (choice, held), {})
        for decision in self._left:
            return decision
        raise _Undecided


def _is_size(node: Node) -> bool:
    """Tell if a value comes of sizes and plain arguments; which argument is a tensor, a run finds out."""
    if node.target is getattr:
        return node.args[1] in ATTRIBUTES
    if node.op == "call_method":
        return node.target in METHODS
    is_plain = node.target in (truth, number, length) or getattr(node.target, "__module__", "") in PLAIN
    return node.op == "placeholder" or (node.op == "call_function" and is_plain and all(map(_is_size, node.all_input_nodes)))


def _place() -> str:
    """Return the places of the calls that lead to an operation, in the module's code, as a short sum."""
    frame: FrameType | None = sys._getframe(2)
    outside, all_of_it = [], []
    while frame is not None and frame.f_code is not _TRACE:
        file = frame.f_code.co_filename
        if not file.startswith(BETWEEN):
            all_of_it.append(_position(frame.f_code, frame.f_lasti))
            if not file.startswith(TORCH):
                outside.append(all_of_it[-1])
        frame = frame.f_back
    return hashlib.sha256(repr(outside or all_of_it).encode()).hexdigest()[:8]


_TRACE = torch.fx.Tracer.trace.__code__


@lru_cache(4096)
def _position(code: CodeType, at: int) -> tuple[str, int | None, int | None]:
    """Return a place in code: the function, the line counted from its first one, and the column."""
    line, _, column, _ = next(islice(code.co_positions(), at // 2, None))
    if line is None or column is None:  # an interpreter that was told to keep none
        return code.co_name, None, at
    return code.co_name, line - code.co_firstlineno, column


def _wholes() -> dict[tuple[int, str], dict[str, Any]]:
    """Return the functions of libraries that `torch.fx` leaves whole, as it notes them; torch's own ones stay whole."""
    table: dict[tuple[int, str], dict[str, Any]] = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    return {
        key: space
        for key, space in table.items()
        if isinstance(space.get(key[1]), FunctionType) and not str(space.get("__name__")).startswith("torch.")
    }


def _is_patch(function: FunctionType) -> bool:
    return function.__code__.co_filename == _symbolic_trace.__file__ and hasattr(function, "__wrapped__")


@contextmanager
def _nothing_whole() -> Iterator[None]:
    """Let `torch.fx` go into functions of Python that libraries have given to `torch.fx.wrap`, for a while."""
    table = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    before, lifted = dict(table), _wholes()
    patched = [(space, name, space[name]) for (_, name), space in lifted.items() if _is_patch(space[name])]
    for key in lifted:
        del table[key]
    for space, name, function in patched:  # by a trace around this one, as of an export
        space[name] = function.__wrapped__
    try:
        yield
    finally:
        for space, name, function in patched:
            space[name] = function
        later = {key: space for key, space in table.items() if key not in before}
        table.clear()
        table.update(before | later)


def holds_wholes(graph: Graph) -> bool:
    """Tell if a trace calls functions that `torch.fx` leaves whole."""
    functions = [space[name] for (_, name), space in _wholes().items()]
    wholes = {id(one.__wrapped__ if _is_patch(one) else one) for one in functions}
    return any(id(node.target) in wholes for node in graph.nodes)


def traced_way(module: nn.Module, given: Mapping[str, Any], training: bool, way: Way) -> Graph:
    """Make the trace of one way through a module's code, up to the first decision that the way does not have.

    Raises:
        UntraceableError: As for `traced`; or its code decides by the values of tensors.
    """
    return cut_at(raw_trace(module, given, training, _Forking(way)))


def cut_at(graph: Graph, number: int | None = None) -> Graph:
    """Return a trace up to a fork, by its number, or the whole of it."""
    made, copied, forks = Graph(), dict[Node, Node](), 0
    for node in graph.nodes:
        copied[node] = _copy(made, node, copied)
        forks += node.target is fork
        if number is not None and forks > number:
            made.output(copied[node])
            break
    return made


def _copy(graph: Graph, node: Node, copied: Mapping[Node, Node]) -> Node:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copied.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)


def operations(graph: Graph) -> list[tuple[str, str, str]]:
    """List what a trace does, without sizes and devices that nobody reads."""
    unread = set[Node]()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if user.target is not fork or user.args[0] is node]
        if (node.op == "get_attr" or node.target in READS) and unread.issuperset(users):
            unread.add(node)
    return [(n.name, n.op, str(n.target)) for n in graph.nodes if n not in unread]


def fork_at_end(graph: Graph) -> Node | None:
    """Return the fork at which a trace ends; None where it goes on to the result."""
    last = graph.output_node().args[0]
    return last if isinstance(last, Node) and last.target is fork else None


# --- runs ------------------------------------------------------------------------------------------------------------


class _Stretch:
    """Part of a traced copy, from one fork to the next.

    Attributes:
        way: The decisions before it.
        run: Its code; takes the module and what the fork before it hands on, and returns the decision and what it hands on.
        held: Names of what its fork hands on; None where it returns the result.
        is_bare: True where all that was done up to its end is to read sizes.
        after: Decision -> what comes then.
    """

    def __init__(self, way: Way, run: Callable[..., Any], held: tuple[str, ...] | None, is_bare: bool) -> None:
        self.way, self.run, self.held, self.is_bare = way, run, held, is_bare
        self.after: dict[Any, _Stretch] = {}


class Tree:
    """Traced copy of a module's code, for one mode: stretches of code between decisions.

    A way on which the edits were not checked is traced when a run comes to it. It is taken where all of its operations stand on
    ways that were checked, as on another side of an oblong image; else the run ends with an error.

    Args:
        module: The module.
        given: Arguments that it is traced for.
        edits: The edits of its operations.
        ways: The ways on which they were checked.
        training: The mode.

    Raises:
        ValueError: The module cannot be traced, a way is none of it, or an edit does not fit.
    """

    def __init__(
        self, module: nn.Module, given: Mapping[str, Any], edits: Sequence[Edit], ways: Sequence[Way], training: bool
    ) -> None:
        self._given, self._edits, self._training = dict(given), tuple(edits), training
        graphs = {way: traced_way(module, given, training, way) for way in ways or [()]}
        known = {node.name for graph in graphs.values() for node in graph.nodes}
        self._first = self._made(cut_at(next(iter(graphs.values())), 0), (), None)
        for way, graph in graphs.items():
            if fork_at_end(graph) is not None and ways:
                raise UntraceableError(f"its code takes more decisions than {list(way)}")
            at = self._first
            for i, choice in enumerate(way):
                at = at.after.get(choice) or self._grown(at, cut_at(graph, i + 1), way[: i + 1])
        if lost := [edit.node for edit in edits if edit.node not in known]:
            raise ValueError(f"{lost[0]} is no operation of its code")
        self._known = known

    def run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run it."""
        at, may_fill = self._first, True
        found = at.run(module, *args, **kwargs)
        while at.held is not None:
            after = at.after.get(found[0]) or self._new(module, at, found[0], (args, kwargs), may_fill)
            if after is None:  # its attributes are filled now: once more
                at, may_fill = self._first, False
                found = at.run(module, *args, **kwargs)
            else:
                at = after
                found = at.run(module, *found[1:])
        return found

    def _new(self, module: nn.Module, at: _Stretch, choice: Any, given: tuple[Any, Any], may_fill: bool) -> _Stretch | None:
        """Make what comes after a decision that was not met before.

        Where that cannot be, the module's own code may fill attributes, such as a table for these sizes: None if it has.
        """
        way = (*at.way, choice)
        try:
            graph = traced_way(module, self._given, self._training, way)
            self._check_known(graph)
            return self._grown(at, graph, way)
        except ValueError as error:
            if may_fill and at.is_bare and filled(module, *given):
                return None
            what = plain_class(module).__name__
            raise ValueError(
                f"inputs must have sizes at which {what} goes a way that its removal was checked on, got others ({error}); "
                "remove its channels with example inputs of these sizes, or with rewrite=False"
            ) from error

    _new._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile leaves it to Python

    def _check_known(self, graph: Graph) -> None:
        """Check that all operations of a trace stand on ways that the edits were checked on, and which time each is done."""
        if new := next((node.name for node in graph.nodes if node.name not in self._known and node.op != "output"), None):
            raise UntraceableError(f"{new} was not met")
        forks = [_place_of(node.name) for node in graph.nodes if node.target is fork]
        if len(set(forks)) < len(forks):
            raise UntraceableError("a decision is taken several times")

    def _grown(self, at: _Stretch, graph: Graph, way: Way) -> _Stretch:
        at.after[way[-1]] = made = self._made(graph, way, at.held)
        return made

    def _made(self, graph: Graph, way: Way, held: tuple[str, ...] | None) -> _Stretch:
        """Make the stretch that a trace ends with."""
        nodes = {node.name: node for node in graph.nodes}
        forks = [node for node in graph.nodes if node.target is fork]
        if len(forks) < len(way) or not set(held or ()) <= nodes.keys():
            raise UntraceableError(f"its code takes other decisions than {list(way)}")
        begin = forks[len(way) - 1] if way else None
        if begin is not None:
            begin.args = (begin.args[0], tuple(nodes[name] for name in held or ()))
        end = fork_at_end(graph)
        if begin is not None and end is not None:
            _hand_on_what_is_there(graph, begin, end)
        hands_on = None if end is None else tuple(node.name for node in cast(Sequence[Node], end.args[1]))
        apply_edits(graph, tuple(edit for edit in self._edits if edit.node in nodes))
        is_bare = all(node.op in ("get_attr", "output") or node.target is fork or _is_size(node) for node in graph.nodes)
        return _Stretch(way, code_function(_stretch(graph, begin, end)), hands_on, is_bare)


def _hand_on_what_is_there(graph: Graph, begin: Node, end: Node) -> None:
    """Drop from what a fork hands on what the one before did not: Python held it by chance, in a cycle not collected yet."""
    order = list(graph.nodes)
    there = {*cast(Sequence[Node], begin.args[1]), *order[order.index(begin) + 1 :]}
    end.args = (end.args[0], tuple(node for node in cast(Sequence[Node], end.args[1]) if node in there))


def _place_of(name: str) -> str:
    """Return the place that an operation's name has, without the how-manieth time."""
    return name.rsplit("_at", maxsplit=1)[-1].partition("_")[0]


def _stretch(graph: Graph, begin: Node | None, end: Node | None) -> Graph:
    """Cut the part of a trace between two forks out."""
    made, copied, nodes = Graph(), dict[Node, Node](), list(graph.nodes)
    if begin is not None:
        copied = {node: made.placeholder(node.name) for node in cast(Sequence[Node], begin.args[1])}
        nodes = nodes[nodes.index(begin) + 1 :]
    for node in nodes:
        if end is not None and node is end:
            choice, values = cast(tuple[Node, Sequence[Node]], node.args)
            made.output((copied[choice], *(copied[value] for value in values)))
            break
        copied[node] = _copy(made, node, copied)
    return made


def code_function(graph: Graph) -> Callable[..., Any]:
    """Make a function of a trace: it takes the module, and what the trace takes."""
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<a module's code with its sizes put right>", "exec"), space)
    return cast(Callable[..., Any], space["forward"])
