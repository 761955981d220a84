"""Sizes written into code: which modules can run a traced copy, and what has to be put right in it for a removal.

1. The modules in whose code such sizes can stand, as the channel graph tells, are traced, and each trace is held against the
   module's own code: on all probes, in training with gradients, and under autocast. What differs is not used.
2. The model is exported again with the traces run operation by operation, each exported operation marked with the one of the
   trace that it comes from. So the labels of the channel graph say how long each dimension will be.
3. For a removal the traces run on the model as it is without the channels. Where an operation is given another size than its
   result has to have, that argument is edited.

Nothing of it is trusted: the check of the removal has the last word.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node, traceback
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fasterai.graph.channels import ChannelGraph, followed
from fasterai.graph.labels import Array, Components, Dim, Flags, plain
from fasterai.graph.rules.trace import Trace, Value, called, is_cut, module_of
from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import at_rest, copies, in_mode, undisturbed, without_fast_path
from fasterai.prune.surgery.rewriting import (
    GIVEN,
    Edit,
    Path,
    Rewrite,
    apply_edits,
    edited,
    nested,
    replaced,
    rewrite_of,
    rooted,
    traced,
)

__all__ = ["Rewriter"]

#: Operations -> where their sizes start, as `x.view(2, 3)` and `torch.zeros(2, 3)`.
SIZES = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), 0),
    "unflatten": 2,
}
SPLITS = ("split", "split_with_sizes")
MARK = "fasterai"


@dataclass(frozen=True)
class _Count:
    """How many entries of a dimension stay: those that always do, and those of channels of groups, by group."""

    fixed: int
    free: tuple[tuple[int, Array], ...]

    def now(self, kept: Sequence[Flags]) -> int:
        """Return the length of the dimension where only some channels of each group are kept."""
        return self.fixed + sum(int(counts[kept[group]].sum()) for group, counts in self.free)


@dataclass(frozen=True)
class _Known:
    """What the labels say of one exported operation: the lengths of its results, and where a slice begins and ends."""

    name: str
    results: tuple[tuple[_Count, ...], ...]
    bounds: tuple[_Count, _Count] | None = None


@dataclass
class _Module:
    """Module that can run a traced copy.

    Attributes:
        given: Arguments that it is traced for.
        known: Call and operation of the trace -> the exported operations that it comes down to.
        seen: Operation and path -> values there, on the probes.
        requests: Operation -> kind of edit that a rule has asked for, and the dimension.
    """

    module: nn.Module
    given: dict[str, Any]
    graph: Graph
    known: dict[tuple[int, str], list[_Known]] = field(default_factory=dict)
    seen: dict[tuple[str, Path], set[Any]] = field(default_factory=dict)
    requests: dict[str, tuple[str, _Count]] = field(default_factory=dict)


class Rewriter:
    """The modules of a model that can run traced copies, and the edits that a removal needs in them.

    Args:
        model: The model, its channels silent already; it is left as it was.
        graph: Its channel graph.
        probes: Positional arguments that it runs on; the first are those of the graph.
        exact: As for `channel_graph`.

    Attributes:
        modules: Name -> the module, where its trace does what its own code does.
        refused: Name of a module that cannot run a traced copy -> why.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, probes: Sequence[tuple[Any, ...]], exact: bool) -> None:
        self._model, self._graph, self._inputs = unwrap(model), graph, probes[0]
        self.modules: dict[str, _Module] = {}
        self.refused: dict[str, str] = {}
        self._cuts: dict[str, list[tuple[_Count, ...]]] = {}
        held = {plain_name(name): module for name, module in self._model.named_modules()}
        candidates = {name: held[name] for name in sorted(graph.sized) if name in held}
        candidates |= {name: module for name, module in held.items() if rewrite_of(module)}
        if not candidates or not hasattr(traceback, "annotate"):
            return
        self._trace(candidates)
        for probe in probes:
            self._verify(probe, training=False)
        self._verify(probes[min(1, len(probes) - 1)], training=True)
        self._verify(probes[0], training=False, autocast=True)
        if self.modules or any(graph.sized.values()):
            self._mark(exact)

    # --- traces that do what the code does ---------------------------------------------------------------------------

    def _trace(self, candidates: Mapping[str, nn.Module]) -> None:
        calls: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}

        def noted(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                calls[name].append(_bound(module, args, kwargs))
                return _forward(module)(module, *args, **kwargs)

            return run

        with at_rest(self._model), _running({name: (m, noted(name)) for name, m in candidates.items()}):
            _quietly(self._model, self._inputs)
        for name, module in candidates.items():
            try:
                given = _given(calls[name])
                graphs = [traced(module, given, training) for training in (False, True)]
                if len({str([(n.name, n.op, str(n.target)) for n in graph.nodes]) for graph in graphs}) > 1:
                    raise ValueError("its code does other operations in training")
            except ValueError as error:
                self.refused[name] = str(error)
            else:
                self.modules[name] = _Module(module, given, graphs[0])
                earlier = [edit for edit in (rewrite_of(module) or Rewrite()).edits if edit.kind == "size"]
                self.modules[name].seen.update({(edit.node, edit.path): {edit.after} for edit in earlier})

    def _verify(self, inputs: tuple[Any, ...], training: bool, autocast: bool = False) -> None:
        """Drop the modules whose traces do something else than their own code on some inputs; the others' numbers are noted."""
        fresh = {name: one for name, one in self.modules.items() if rewrite_of(one.module) is None}
        wrong: dict[str, str] = {}

        def compared(name: str, one: _Module) -> Callable[..., Any]:
            graph = traced(one.module, one.given, training)

            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                mine, own = (tree_map(_own, x) for x in ((args, kwargs), (args, kwargs)))
                state = torch.get_rng_state()
                with undisturbed(module):
                    found = _outcome(lambda: _Watched(module, graph, one.seen).run(*_ordered(module, *mine)), module, mine)
                torch.set_rng_state(state)
                buffers = [b.detach().clone() for b in module.buffers()]
                wanted = _outcome(lambda: _forward(module)(module, *own[0], **own[1]), module, own)
                if training:  # what a norm has counted, it counts once
                    _put_back(module, buffers)
                if not _alike(found, wanted):
                    wrong[name] = "its code does something else on other inputs, or in training, than its trace"
                torch.set_rng_state(state)
                return _forward(module)(module, *args, **kwargs)

            return run

        patched = {name: (one.module, compared(name, one)) for name, one in fresh.items()}
        with at_rest(self._model), in_mode(self._model, training), torch.set_grad_enabled(training), _running(patched):
            at_half = torch.autocast(_device_type(self._model), torch.bfloat16, enabled=autocast)
            with at_half:
                _quietly(self._model, inputs)
        self.refused |= wrong
        self.modules = {name: one for name, one in self.modules.items() if name not in wrong}

    # --- what the labels say -----------------------------------------------------------------------------------------

    def _mark(self, exact: bool) -> None:
        """Export the model with the traces run operation by operation, and note what the labels say of each."""
        calls: Counter[str] = Counter()

        def marked(name: str, one: _Module) -> Callable[..., Any]:
            graph = edited(one.module, rewrite_of(one.module) or Rewrite(tuple(one.given.items())))[0]

            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                calls[name] += 1
                return _Marked(module, graph, f"{name}|{calls[name]}").run(*_ordered(module, args, kwargs))

            return run

        features = dict(self._graph.input_sizes.keys())
        patched = {name: (one.module, marked(name, one)) for name, one in self.modules.items()}
        with _running(patched), traceback.preserve_node_meta():
            _, trace, components, weights = followed(self._model, self._inputs, exact, features=features or None, rewrite=True)
        owners = _channels(self._graph, trace, components, weights)
        first: dict[str, int] = {}
        for node, value in trace.values.items():
            if is_cut(node, value):
                self._cuts.setdefault(module_of(node), []).append(_ends(node, value, trace, self._graph, owners))
            mark = (node.meta.get("custom") or {}).get(MARK)
            if mark is None:
                continue
            name, call, operation = mark.split("|")
            number = int(call) - first.setdefault(name, int(call))
            one = self.modules[name]
            one.known.setdefault((number, operation), []).append(_known(node, value, trace, self._graph, owners))
            if node in trace.requests:
                kind, dim = trace.requests[node]
                one.requests[operation] = (kind, _count(dim, 0, self._graph, owners))

    # --- the edits of a removal --------------------------------------------------------------------------------------

    def find(self, inputs: tuple[Any, ...], kept: Sequence[Flags], model: nn.Module | None = None) -> dict[str, Rewrite]:
        """Find the edits that a removal needs, on the model without the channels.

        Args:
            inputs: Positional arguments of the model as it is now.
            kept: For each group the channels that were kept.
            model: A copy of the model, where that is what the channels were taken from.

        Raises:
            ValueError: Slices, or splits into unequal parts, have to be put right in a module that cannot run a traced copy.
        """
        found: dict[str, list[Edit]] = {}
        calls: Counter[str] = Counter()

        def repaired(name: str, one: _Module) -> Callable[..., Any]:
            graph = traced(modules[name], one.given, False)
            edits = [*_requested(one, kept)]
            apply_edits(graph, tuple(edits))
            found[name] = edits

            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                expected = {n: known for (call, n), known in one.known.items() if call == calls[name]}
                calls[name] += 1
                interpreter = _Repaired(module, graph, one.seen, expected, kept, edits, calls[name] > 1)
                try:
                    return interpreter.run(*_ordered(module, args, kwargs))
                except Exception:
                    found.pop(name, None)
                    raise

            return run

        model = self._model if model is None else model
        modules, patched = {name: model.get_submodule(name) for name in self.modules}, {}
        for name, one in self.modules.items():
            with suppress(ValueError):
                patched[name] = (modules[name], repaired(name, one))
        with at_rest(model), _running(patched):
            _quietly(model, inputs)
        self._check_cuts(found, kept)
        return {
            name: Rewrite(tuple(self.modules[name].given.items()), tuple(edits))
            for name, edits in found.items()
            if edits or rewrite_of(self.modules[name].module)
        }

    def _check_cuts(self, found: Mapping[str, Sequence[Edit]], kept: Sequence[Flags]) -> None:
        whole = [np.ones_like(k) for k in kept]
        for name, cuts in self._cuts.items():
            if name not in found and any(one.now(kept) != one.now(whole) for ends in cuts for one in ends):
                why = self.refused.get(name, "what it is given is not what it had at first")
                raise ValueError(f"{name or 'its code'} cuts it at positions that are written into its code ({why})")


def _requested(one: _Module, kept: Sequence[Flags]) -> Iterator[Edit]:
    """Give the edits that rules asked for, of dimensions that get shorter, counted from the size at first."""
    earlier = {(edit.node, edit.kind): edit for edit in (rewrite_of(one.module) or Rewrite()).edits}
    for node, (kind, count) in one.requests.items():
        before, after = count.now([np.ones_like(k) for k in kept]), count.now(kept)
        if (node, kind) in earlier:
            before = earlier[node, kind].before
        if before != after:
            yield Edit(node, kind, (), before, after)


# --- running a module's trace in its place ---------------------------------------------------------------------------


def _forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's own code, or of its traced copy where it runs one."""
    cls = type(module)
    while "_runs_for" in vars(cls):
        cls = cls.__mro__[1]
    return cls.forward


@contextmanager
def _running(patched: Mapping[str, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let functions `(module, args, kwargs)` run in the place of modules' forwards for a while."""
    before = [(module, type(module)) for module, _ in patched.values()]
    try:
        for module, run in patched.values():
            module.__class__ = _patched(type(module), run)
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


def _patched(base: type[nn.Module], run: Callable[..., Any]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, args, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    made: type[nn.Module] = type(base)(base.__name__, (base,), {"forward": forward, "_runs_for": base, "_stands_for": base})
    return made


def _quietly(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run a model as far as it runs."""
    with without_fast_path():
        try:
            model(*copies(inputs))
        except Exception:
            return


def _bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(_forward(module)).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return dict([*bound.arguments.items()][1:])


def _ordered(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    return [*_bound(module, args, kwargs).values()]


def _given(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Find the arguments of a module that are no tensors and the same in all of its calls.

    Raises:
        ValueError: It is not called, or with other such arguments from call to call.
    """
    if not calls:
        raise ValueError("it is not called as a module")
    given = [{name: value for name, value in call.items() if isinstance(value, GIVEN)} for call in calls]
    if any(one != given[0] for one in given):
        raise ValueError("it is called with other arguments from call to call")
    return given[0]


def _own(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _outcome(run: Callable[[], Any], module: nn.Module, given: Any) -> Any:
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


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, list) or not isinstance(b, list):
        return a is b  # both fail on inputs that neither takes
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


@torch.no_grad()
def _put_back(module: nn.Module, buffers: Sequence[Tensor]) -> None:
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


class _Run(Interpreter):
    """Run of a trace operation by operation, on a module that may not be the one that it was made on."""

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        super().__init__(module, graph=graph)

    def _numbers(self, node: Node) -> list[tuple[Path, Any]]:
        """List the sizes that an operation is given: where they stand, and their values."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return [(path, nested((args, kwargs), rooted(path))) for path in _sized(node, args)]


def _operation(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _sized(node: Node, args: Sequence[Any]) -> list[Path]:
    """List where the numbers of an operation stand that give sizes: the arguments, entries of a list, bounds of slices."""
    name = _operation(node) if node.op in ("call_method", "call_function") else ""
    if name in SIZES:
        at = SIZES[name]
        if len(args) > at and isinstance(args[at], list | tuple):
            return [("args", at, k) for k in range(len(args[at]))]
        return [("args", k) for k in range(at, len(args)) if isinstance(args[k], int)]
    if name in SPLITS and len(args) > 1:
        return [("args", 1, k) for k in range(len(args[1]))] if isinstance(args[1], list | tuple) else [("args", 1)]
    if name == "getitem" and isinstance(args[0], Tensor):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        where: list[Path] = [("args", 1, i) for i in range(len(index))] if isinstance(args[1], tuple) else [("args", 1)]
        slices = [path for path, one in zip(where, index, strict=True) if isinstance(one, slice) and one.step in (None, 1)]
        return [(*path, end) for path in slices for end in ("start", "stop")]
    return []


class _Watched(_Run):
    """Run that notes the sizes that operations are given."""

    def __init__(self, module: nn.Module, graph: Graph, seen: dict[tuple[str, Path], set[Any]]) -> None:
        super().__init__(module, graph)
        self._seen = seen

    def run_node(self, n: Node) -> Any:
        """Run an operation."""
        for path, value in self._numbers(n):
            self._seen.setdefault((n.name, path), set()).add(value if isinstance(value, int) else None)
        return super().run_node(n)


class _Marked(_Run):
    """Run that marks what it exports with the operations of the trace."""

    def __init__(self, module: nn.Module, graph: Graph, call: str) -> None:
        super().__init__(module, graph)
        self._call = call

    def run_node(self, n: Node) -> Any:
        """Run an operation; what the modules that it calls do has no mark."""
        with traceback.annotate({MARK: None if n.op == "call_module" else f"{self._call}|{n.name}"}):
            return super().run_node(n)


class _Repaired(_Run):
    """Run that puts sizes right on the way, and notes the edits."""

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        seen: Mapping[tuple[str, Path], set[Any]],
        expected: Mapping[str, Sequence[_Known]],
        kept: Sequence[Flags],
        edits: list[Edit],
        is_again: bool,
    ) -> None:
        super().__init__(module, graph)
        self._seen, self._expected, self._kept, self._edits, self._is_again = seen, expected, kept, edits, is_again

    def run_node(self, n: Node) -> Any:
        """Run an operation with the sizes that its result has to have."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        known = self._expected.get(n.name)
        for path, value in self._numbers(n) if known else ():
            wanted = _wanted(n, args, kwargs, path, value, known, self._kept)
            if wanted is None:
                continue
            self._note(n, path, value, wanted)
            args, kwargs = replaced((args, kwargs), rooted(path), wanted)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _note(self, n: Node, path: Path, value: Any, wanted: Any) -> None:
        """Note the edit of a number that has to be another; one edit has to do for all calls of a module."""
        there = nested((n.args, n.kwargs), rooted(path))
        is_number = isinstance(there, int) and there >= 0
        if is_number or isinstance(wanted, tuple) or len(self._seen.get((n.name, path), (0, 1))) == 1:
            edit = Edit(n.name, "size", path, there if is_number else None, wanted)
        else:
            shared = math.gcd(value, wanted)
            edit = Edit(n.name, "share", path, value // shared, wanted // shared)
        if self._is_again and edit not in self._edits:
            raise ValueError("it is called again with other sizes")
        if edit not in self._edits:
            self._edits.append(edit)


def _wanted(n: Node, args: Any, kwargs: Any, path: Path, value: Any, known: Sequence[_Known], kept: Sequence[Flags]) -> Any:
    """Return the number that has to stand at a path of an operation's arguments; None where it is right."""
    name = _operation(n)
    if name in SPLITS:
        return _wanted_part(args, kwargs, path, value, known, kept)
    if name == "getitem":
        return _wanted_bound(args, path, value, known, kept)
    first = SIZES[name] if len(path) == 2 else 0
    at = int(path[-1]) - first + (args[1] % (args[0].dim() + 1) if name == "unflatten" else 0)
    results = known[-1].results[0]
    if value == -1 or at >= len(results):
        return None
    wanted = results[at].now(kept)
    return None if value == wanted else wanted


def _wanted_part(args: Any, kwargs: Any, path: Path, value: Any, known: Sequence[_Known], kept: Sequence[Flags]) -> Any:
    """Return the size of a part of a split, or all of them where one size for all does not do."""
    parts = next((one.results for one in known if len(one.results) > 1), None)
    if parts is None:
        return None
    d = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    sizes = [part[d].now(kept) for part in parts]
    if len(path) == 3:
        wanted = sizes[int(path[-1])]
        return None if value == wanted else wanted
    if all(size == value for size in sizes[:-1]) and 0 < sizes[-1] <= value:
        return None
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _wanted_bound(args: Any, path: Path, value: Any, known: Sequence[_Known], kept: Sequence[Flags]) -> int | None:
    """Return where a slice has to begin or to end."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    cuts = [i for i, one in enumerate(index) if isinstance(one, slice) and (one.start or one.stop is not None)]
    bounds = [one.bounds for one in known if one.bounds]
    at = int(path[2]) if len(path) == 4 else 0
    if value is None or at not in cuts or len(bounds) != len(cuts):
        return None
    wanted = bounds[cuts.index(at)][path[-1] == "stop"].now(kept)
    return None if value == wanted else wanted


# --- labels as counts ------------------------------------------------------------------------------------------------


def _channels(graph: ChannelGraph, trace: Trace, components: Components, weights: Mapping[str, Value]) -> tuple[Array, Array]:
    """Return for each label the number of its group, or -1, and its channel there."""
    group_of = np.full(int(components.of.max(initial=-1)) + 1, -1)
    channel_of = np.zeros_like(group_of)
    for number, group in enumerate(graph.groups):
        for places, values in ((group.places, weights), (group.inputs, trace.inputs)):
            for (name, d), indices in places.items():
                labels = values[name].dims[d] if name in values else None
                if isinstance(labels, np.ndarray) and indices.max() < len(labels):
                    found = components.numbers(labels[indices])
                    group_of[found] = number
                    channel_of[found] = np.arange(group.channels)[:, None]
    return group_of[components.of], channel_of[components.of]


def _count(dim: Dim, size: int, graph: ChannelGraph, owners: tuple[Array, Array]) -> _Count:
    if not isinstance(dim, np.ndarray):
        return _Count(size, ())
    groups, channels = owners[0][plain(dim)], owners[1][plain(dim)]
    free = [
        (int(g), np.bincount(channels[groups == g], minlength=graph.groups[g].channels)) for g in np.unique(groups) if g >= 0
    ]
    return _Count(int((groups < 0).sum()), tuple(free))


def _ends(node: Any, found: Any, trace: Trace, graph: ChannelGraph, owners: tuple[Array, Array]) -> tuple[_Count, ...]:
    """Return the positions of a slice, or the lengths of the parts of a split."""
    known = _known(node, found, trace, graph, owners)
    return known.bounds or tuple(n for part in known.results for n in part)


def _known(node: Any, found: Any, trace: Trace, graph: ChannelGraph, owners: tuple[Array, Array]) -> _Known:
    values = [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, Value)]
    results = tuple(tuple(_count(d, n, graph, owners) for d, n in zip(v.dims, v.shape, strict=True)) for v in values)
    if called(node) != "slice" or not values:
        return _Known(called(node), results)
    x: Value = trace.values[node.args[0]]
    d, start, end = ((*node.args, *(0, None, None)[len(node.args) - 1 :]))[1:4]
    dim, size = x.dims[d], x.shape[d]
    begins, ends, _ = slice(start, end).indices(size)
    if (begins, ends) == (0, size):
        return _Known("slice", results)
    cut = [dim[:n] if isinstance(dim, np.ndarray) else dim for n in (begins, ends)]
    return _Known("slice", results, (_count(cut[0], begins, graph, owners), _count(cut[1], ends, graph, owners)))
