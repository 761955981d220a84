"""Runs of traces in the place of modules' code: watched, marked for an export, or put right on the way.

Over 300 lines, since the three kinds of runs share their helpers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node, traceback
from torch.utils._pytree import tree_flatten, tree_leaves

from fasterai.graph.labels import Flags
from fasterai.model.running import copies, without_fast_path
from fasterai.prune.code_sizes import Known, factors, sized, wanted
from fasterai.prune.surgery.forks import cut_at, fork_at_end, traced_way
from fasterai.prune.surgery.rewriting import Edit, Path, Way, apply_edits, nested, replaced, rooted
from fasterai.prune.surgery.tracing import ASIDE, UntraceableError, filled, traced

__all__ = [
    "MARK",
    "Marked",
    "Repaired",
    "Traces",
    "Watched",
    "alike",
    "bound",
    "forward_of",
    "ordered",
    "outcome",
    "put_back",
    "quietly",
    "running",
]

MARK = "fasterai"


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's own code, or of its traced copy where it runs one."""
    cls = type(module)
    while "_runs_for" in vars(cls):
        cls = vars(cls)["_runs_for"]
    own = vars(module).get(ASIDE)
    return (
        cls.forward
        if own is None
        else cast(Callable[..., Any], getattr(own, "__func__", lambda _, *args, **kwargs: own(*args, **kwargs)))
    )


@contextmanager
def running(patched: Mapping[str, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let functions `(module, args, kwargs)` run in the place of modules' forwards for a while."""
    before = [(module, type(module)) for module, _ in patched.values()]
    try:
        for module, run in patched.values():
            module.__class__ = _patched(type(module), run)
            if "forward" in vars(module):
                vars(module)[ASIDE] = vars(module).pop("forward")
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls
            if ASIDE in vars(module):
                vars(module)["forward"] = vars(module).pop(ASIDE)


def _patched(base: type[nn.Module], run: Callable[..., Any]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, args, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    own = {"forward": forward, "_runs_for": base, "_stands_for": base}
    made: Any = type(base)
    return cast(type[nn.Module], made(base.__name__, (base,), own))


def quietly(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run a model as far as it runs."""
    with without_fast_path():
        try:
            model(*copies(inputs))
        except Exception:
            return


def bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a module's call by name, with defaults."""
    given = inspect.signature(forward_of(module)).bind(module, *args, **kwargs)
    given.apply_defaults()
    return dict([*given.arguments.items()][1:])


def ordered(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments of a module's call in the order of its signature."""
    return [*bound(module, args, kwargs).values()]


def apart(x: Any) -> Any:
    """Return a tensor in memory of its own, which takes gradients as it did."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def outcome(run: Callable[[], Any], module: nn.Module, given: Any) -> Any:
    """Return what a module gives, with its gradients, or the error's type where it fails."""
    try:
        result = run()
    except Exception as error:
        return type(error)
    leaves, spec = tree_flatten(result)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    read = [x for x in (*module.parameters(), *tree_leaves(given)) if isinstance(x, Tensor) and x.requires_grad]
    total: Any = sum((x.sum() * (i + 1) for i, x in enumerate(tensors) if x.requires_grad), start=0.0)
    slopes = torch.autograd.grad(total, read, allow_unused=True) if isinstance(total, Tensor) and read else ()
    return [str(spec).replace("immutable_", ""), *(x if isinstance(x, Tensor) else repr(x) for x in leaves), *slopes]


def alike(a: Any, b: Any) -> bool:
    """Tell if two outcomes are the same, bit for bit."""
    if not isinstance(a, list) or not isinstance(b, list):
        return a is b  # both fail on inputs that neither takes
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


@torch.no_grad()
def put_back(module: nn.Module, buffers: Sequence[Tensor]) -> None:
    """Give a module's buffers the values that they had."""
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(before)


class Traces:
    """Traces of a module's own code in one mode, of each way that its decisions by sizes can go; made as they are asked for.

    Args:
        module: The module.
        given: Arguments that it is traced for.
        training: The mode.
        forks: True where its code decides by sizes; else there is one trace, whatever the decisions.
        edits: The edits of its operations.
        ways: Ways whose traces are made at once.
    """

    def __init__(
        self,
        module: nn.Module,
        given: Mapping[str, Any],
        training: bool,
        forks: bool,
        edits: Sequence[Edit] = (),
        ways: Sequence[Way] = (),
    ) -> None:
        self._module, self._given, self._training, self.forks, self.edits = module, dict(given), training, forks, tuple(edits)
        self._plain: dict[Way, Graph] = {}
        self._edited: dict[Way, Graph] = {}
        for way in ways:
            self.at(way)

    def at(self, way: Way) -> Graph:
        """Return the trace of a way, up to the first decision that it does not have, with the edits.

        Raises:
            UntraceableError: There is none.
        """
        if way not in self._edited:
            longer = next((other for other in self._plain if len(other) > len(way) and other[: len(way)] == way), None)
            graph = self._new(way) if longer is None else cut_at(self._plain[longer], len(way))
            self._plain[way] = graph if not self.edits else cut_at(graph)
            names = {node.name for node in graph.nodes} if self.forks else {edit.node for edit in self.edits}
            apply_edits(graph, tuple(edit for edit in self.edits if edit.node in names))
            self._edited[way] = graph
        return self._edited[way]

    def _new(self, way: Way) -> Graph:
        if not self.forks:
            return traced(self._module, self._given, self._training)
        return traced_way(self._module, self._given, self._training, way)


class _Run(Interpreter):
    """Run of a trace operation by operation, on a module that may not be the one that it was made on.

    Attributes:
        way: The decisions that it has taken.
    """

    def __init__(self, module: nn.Module, traces: Traces) -> None:
        super().__init__(module, garbage_collect_values=not traces.forks, graph=traces.at(()))
        self._traces = traces
        self.way: Way = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run it from decision to decision; attributes that the module's own code has to fill are filled first."""
        try:
            return self._run(args, kwargs)
        except UntraceableError:
            if not filled(self.module, args, {}):
                raise
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        done: dict[str, Any] = {}
        self.way = ()
        while True:
            self.graph = self._traces.at(self.way)
            before = {node: done[node.name] for node in self.graph.nodes if node.name in done and node.op != "output"}
            result = super().run(*args, initial_env=before, **kwargs)
            if not self._traces.forks or fork_at_end(self.graph) is None:
                return result
            done = {node.name: value for node, value in self.env.items()}
            self.way = (*self.way, result)

    def _numbers(self, node: Node) -> list[tuple[Path, Any]]:
        """List the sizes that an operation is given: where they stand, and their values."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return [(path, nested((args, kwargs), rooted(path))) for path in sized(node, args)]

    def _factors(self, node: Node) -> list[tuple[Path, Any]]:
        """List the numbers, worked out of sizes, that an operation scales tensors by."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return [(path, nested((args, kwargs), rooted(path))) for path in factors(node, args, kwargs)]


class Watched(_Run):
    """Run that notes the sizes that operations are given."""

    def __init__(self, module: nn.Module, traces: Traces, seen: dict[tuple[str, Path], set[Any]]) -> None:
        super().__init__(module, traces)
        self._seen = seen

    def run_node(self, n: Node) -> Any:
        """Run an operation."""
        for path, value in self._numbers(n):
            self._seen.setdefault((n.name, path), set()).add(value if isinstance(value, int) else None)
        for path, value in self._factors(n):
            self._seen.setdefault((n.name, path), set()).add(value)
        return super().run_node(n)


class Marked(_Run):
    """Run that marks what it exports with the operations of the trace."""

    def __init__(self, module: nn.Module, traces: Traces, call: str) -> None:
        super().__init__(module, traces)
        self._call = call

    def run_node(self, n: Node) -> Any:
        """Run an operation; what the modules that it calls do has no mark."""
        with traceback.annotate({MARK: None if n.op == "call_module" else f"{self._call}|{n.name}"}):
            return super().run_node(n)


class Repaired(_Run):
    """Run that puts sizes right on the way, and notes the edits."""

    def __init__(
        self,
        module: nn.Module,
        traces: Traces,
        seen: Mapping[tuple[str, Path], set[Any]],
        expected: Mapping[str, Sequence[Known]],
        kept: Sequence[Flags],
        edits: list[Edit],
        examined: set[str],
    ) -> None:
        super().__init__(module, traces)
        self._seen, self._expected, self._kept, self._edits, self._examined = seen, expected, kept, edits, examined

    def run_node(self, n: Node) -> Any:
        """Run an operation with the sizes that its result has to have."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        known = self._expected.get(n.name, ())
        for path, value in self._numbers(n) if known else ():
            right = wanted(n, args, kwargs, path, value, known, self._kept)
            if right is not None:
                self._note(n, path, value, right)
                args, kwargs = replaced((args, kwargs), rooted(path), right)
        for path, value in self._factors(n):
            before = self._seen.get((n.name, path), ())
            if len(before) == 1 and value not in before:  # what depends on channels alone is as it was with all of them
                (right,) = before
                self._enter(n, Edit(n.name, "factor", path, None, right))
                args, kwargs = replaced((args, kwargs), rooted(path), right)
        self._examined.add(n.name)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _note(self, n: Node, path: Path, value: Any, right: Any) -> None:
        """Note the edit of a number that has to be another; one edit has to do for all calls of a module."""
        there = nested((n.args, n.kwargs), rooted(path))
        is_number = isinstance(there, int) and there >= 0
        if is_number or isinstance(right, tuple) or len(self._seen.get((n.name, path), (0, 1))) == 1:
            edit = Edit(n.name, "size", path, there if is_number else None, right)
        else:
            shared = math.gcd(value, right)
            edit = Edit(n.name, "share", path, value // shared, right // shared)
        self._enter(n, edit)

    def _enter(self, n: Node, edit: Edit) -> None:
        if n.name in self._examined and edit not in self._edits:
            raise ValueError("it is called again with other sizes")
        if edit not in self._edits:
            self._edits.append(edit)
