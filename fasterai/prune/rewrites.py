"""Sizes written into code: which modules can run a traced copy, and what has to be put right in it for a removal.

1. The modules in whose code such sizes can stand, as the channel graph tells, are traced, and each trace is held against the
   module's own code: on all probes, in training with gradients, and under autocast. What differs is not used. Where code
   decides by sizes, or hands them to functions that `torch.fx` leaves whole, there is one trace for each way that it goes.
2. The model is exported again, on each probe that takes a new way, with the traces run operation by operation; each exported
   operation is marked with the one of the trace that it comes from. So the labels of the channel graph say how long each
   dimension will be.
3. For a removal the traces run on the model as it is without the channels. Where an operation is given another size than its
   result has to have, that argument is edited.

Nothing of it is trusted: the check of the removal has the last word.

Over 300 lines, since these are three steps of one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, traceback
from torch.utils._pytree import tree_map

from fasterai.graph.channels import ChannelGraph, followed
from fasterai.graph.labels import Flags
from fasterai.graph.rules.trace import is_cut, module_of
from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import at_rest, in_mode, undisturbed
from fasterai.prune.code_sizes import Asked, Known, asked_of, edit_of, ends, known_of, owners_of
from fasterai.prune.surgery.forks import holds_wholes, operations, traced_way
from fasterai.prune.surgery.rewriting import GIVEN, Edit, Path, Rewrite, Way
from fasterai.prune.surgery.traced_copies import rewrite_of
from fasterai.prune.surgery.tracing import UntraceableError, traced
from fasterai.prune.traced_runs import (
    MARK,
    Marked,
    Repaired,
    Traces,
    Watched,
    alike,
    apart,
    bound,
    forward_of,
    ordered,
    outcome,
    put_back,
    quietly,
    running,
)

__all__ = ["Rewriter"]


@dataclass
class _Module:
    """Module that can run a traced copy.

    Attributes:
        given: Arguments that it is traced for.
        forks: True where there is one trace for each way that its decisions by sizes go.
        known: Probe, call and operation of the trace -> the exported operations that it comes down to.
        seen: Operation and path -> values there, on the probes.
        requests: Operation -> kind of edit that a rule has asked for, and the dimension.
        ways: The ways that it has gone on the probes.
    """

    module: nn.Module
    given: dict[str, Any]
    forks: bool
    known: dict[tuple[int, int, str], list[Known]] = field(default_factory=dict)
    seen: dict[tuple[str, Path], set[Any]] = field(default_factory=dict)
    requests: dict[str, tuple[str, Asked]] = field(default_factory=dict)
    ways: list[Way] = field(default_factory=list)

    @cached_property
    def traces(self) -> tuple[Traces, Traces]:
        """Traces of its code for eval and for training mode."""
        return Traces(self.module, self.given, False, self.forks), Traces(self.module, self.given, True, self.forks)


class Rewriter:
    """The modules of a model that can run traced copies, and the edits that a removal needs in them.

    Args:
        model: The model, its channels silent already; it is left as it was.
        graph: Its channel graph.
        probes: Positional arguments that it runs on; the first are those of the graph.
        exact: As for `channel_graph`.
        further: Gives more probes, where code decides by sizes.

    Attributes:
        modules: Name -> the module, where its trace does what its own code does.
        refused: Name of a module that cannot run a traced copy -> why.
        looked_at: The probes on which edits are found: the first, and those on which code goes another way.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        probes: Sequence[tuple[Any, ...]],
        exact: bool,
        further: Callable[[], Iterable[tuple[Any, ...]]] = tuple,
    ) -> None:
        self._model, self._graph = unwrap(model), graph
        self.looked_at = [probes[0]]
        self.modules: dict[str, _Module] = {}
        self.refused: dict[str, str] = {}
        self._cuts: dict[str, list[tuple[Asked, ...]]] = {}
        held = {plain_name(name): module for name, module in self._model.named_modules()}
        candidates = {name: held[name] for name in sorted(graph.sized) if name in held}
        candidates |= {name: module for name, module in held.items() if rewrite_of(module)}
        if not candidates or not hasattr(traceback, "annotate"):
            return
        self._trace(candidates, probes[0])
        probes = [*probes, *(further() if any(one.forks for one in self.modules.values()) else ())]
        whole = self._hold(self.modules, probes)
        self.modules |= whole
        self._hold(whole, probes)
        if self.modules or any(graph.sized.values()):
            for number in range(len(self.looked_at)):
                self._mark(number, exact)

    # --- traces that do what the code does ---------------------------------------------------------------------------

    def _trace(self, candidates: Mapping[str, nn.Module], inputs: tuple[Any, ...]) -> None:
        calls: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}

        def noted(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                calls[name].append(bound(module, args, kwargs))
                return forward_of(module)(module, *args, **kwargs)

            return run

        with at_rest(self._model), running({name: (m, noted(name)) for name, m in candidates.items()}):
            quietly(self._model, inputs)
        for name, module in candidates.items():
            try:
                given = _given(calls[name])
                self.modules[name] = _Module(module, given, _forks(module, given))
            except ValueError as error:
                self.refused[name] = str(error)
            else:
                earlier = [edit for edit in (rewrite_of(module) or Rewrite()).edits if edit.kind in ("size", "factor")]
                self.modules[name].seen.update({(edit.node, edit.path): {edit.after} for edit in earlier})

    def _hold(self, modules: Mapping[str, _Module], probes: Sequence[tuple[Any, ...]]) -> dict[str, _Module]:
        """Drop the modules whose traces do something else than their own code.

        Returns:
            Those of them that can be traced with the functions left whole that `torch.fx` leaves so.
        """
        before = dict(modules)
        for inputs in probes:
            ways = {name: len(one.ways) for name, one in self.modules.items()}
            self._verify(before, inputs, training=False)
            is_new = any(len(one.ways) > ways[name] for name, one in self.modules.items())
            if is_new and all(inputs is not one for one in self.looked_at):
                self.looked_at.append(inputs)
        self._verify(before, probes[min(1, len(probes) - 1)], training=True)
        self._verify(before, probes[0], training=False, autocast=True)
        for name, one in [*self.modules.items()]:
            if any(_differs_in_training(one, way) for way in one.ways):
                self._drop(name, DIFFERS)
        return {
            name: _Module(one.module, one.given, False, seen=one.seen)
            for name, one in before.items()
            if name not in self.modules and one.forks and not isinstance(_in_one(one.module, one.given), ValueError)
        }

    def _drop(self, name: str, why: str) -> None:
        self.refused[name] = why
        self.modules.pop(name, None)

    def _verify(self, modules: Mapping[str, _Module], inputs: tuple[Any, ...], training: bool, autocast: bool = False) -> None:
        """Drop the modules whose traces do something else than their own code on some inputs; the others' numbers are noted."""
        fresh = {name: one for name, one in modules.items() if name in self.modules}
        wrong: dict[str, str] = {}

        patched = {
            name: (
                one.module,
                _compared(name, one, training, wrong)
                if (rewrite := rewrite_of(one.module)) is None
                else _followed(one, training, rewrite),
            )
            for name, one in fresh.items()
        }
        with at_rest(self._model), in_mode(self._model, training), torch.set_grad_enabled(training), running(patched):
            at_half = torch.autocast(_device_type(self._model), torch.bfloat16, enabled=autocast)
            with at_half:
                quietly(self._model, inputs)
        for name, why in wrong.items():
            self._drop(name, why)

    # --- what the labels say -----------------------------------------------------------------------------------------

    def _mark(self, probe: int, exact: bool) -> None:
        """Export the model on a probe with the traces run operation by operation, and note what the labels say of each."""
        calls: Counter[str] = Counter()

        def marked(name: str, one: _Module) -> Callable[..., Any]:
            edits = (rewrite_of(one.module) or Rewrite()).followed().edits
            traces = Traces(one.module, one.given, False, one.forks, edits, one.ways) if edits else one.traces[False]

            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                calls[name] += 1
                return Marked(module, traces, f"{name}|{calls[name]}").run(*ordered(module, args, kwargs))

            return run

        features = dict(self._graph.input_sizes.keys())
        patched = {name: (one.module, marked(name, one)) for name, one in self.modules.items()}
        inputs = self.looked_at[probe]
        with undisturbed(self._model):
            with torch.no_grad(), in_mode(self._model, False):
                quietly(self._model, inputs)  # what a first run fills is filled
            with running(patched), traceback.preserve_node_meta():
                found = followed(self._model, inputs, exact, features=features or None, rewrite=True)
        _, trace, components, weights = found
        owners = owners_of(self._graph, trace, components, weights)
        first: dict[str, int] = {}
        for node, value in trace.values.items():
            if is_cut(node, value):
                self._cuts.setdefault(module_of(node), []).append(ends(node, value, trace, self._graph, owners))
            if node in trace.requests:
                self._cuts.setdefault(module_of(node), []).append((asked_of(node, trace, self._graph, owners),))
            mark = (node.meta.get("custom") or {}).get(MARK)
            if mark is None:
                continue
            name, call, operation = mark.split("|")
            number = int(call) - first.setdefault(name, int(call))
            one = self.modules[name]
            one.known.setdefault((probe, number, operation), []).append(known_of(node, value, trace, self._graph, owners))
            if node in trace.requests:
                one.requests[operation] = (trace.requests[node][0], asked_of(node, trace, self._graph, owners))

    # --- the edits of a removal --------------------------------------------------------------------------------------

    def find(
        self, given: Sequence[tuple[Any, ...]], kept: Sequence[Flags], model: nn.Module | None = None
    ) -> dict[str, Rewrite]:
        """Find the edits that a removal needs, on the model without the channels.

        Args:
            given: The probes that it looks at, as the model takes them now.
            kept: For each group the channels that were kept.
            model: A copy of the model, where that is what the channels were taken from.

        Raises:
            ValueError: Slices, or splits into unequal parts, have to be put right in a module that cannot run a traced copy.
        """
        found: dict[str, list[Edit]] = {}
        calls: Counter[str] = Counter()

        def repaired(name: str, one: _Module, probe: list[int]) -> Callable[..., Any]:
            edits = [*_requested(one, kept)]
            traces = Traces(modules[name], one.given, False, one.forks, edits, one.ways or [()])
            found[name] = edits
            examined = set[str]()

            def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
                now = (probe[0], calls[name])
                expected = {n: known for (*when, n), known in one.known.items() if tuple(when) == now}
                calls[name] += 1
                try:
                    return Repaired(module, traces, one.seen, expected, kept, edits, examined).run(
                        *ordered(module, args, kwargs)
                    )
                except Exception:
                    found.pop(name, None)
                    raise

            return run

        model = self._model if model is None else model
        modules, patched = {name: model.get_submodule(name) for name in self.modules}, {}
        probe = [0]
        for name, one in self.modules.items():
            with suppress(ValueError):
                patched[name] = (modules[name], repaired(name, one, probe))
        with at_rest(model), running(patched):
            for number, inputs in enumerate(given):
                probe[0] = number
                calls.clear()
                quietly(model, inputs)
        self._check_cuts(found, kept)
        return {
            name: Rewrite(tuple(one.given.items()), tuple(found[name]), tuple(one.ways) if one.forks else None)
            for name, one in self.modules.items()
            if name in found and (found[name] or rewrite_of(one.module))
        }

    def _check_cuts(self, found: Mapping[str, Sequence[Edit]], kept: Sequence[Flags]) -> None:
        whole = [np.ones_like(k) for k in kept]
        for name, cuts in self._cuts.items():
            if name not in found and any(one.now(kept) != one.now(whole) for ends in cuts for one in ends):
                why = self.refused.get(name, "what it is given is not what it had at first")
                raise ValueError(f"{name or 'its code'} cuts it, or averages over it, in code of its own ({why})")


def _requested(one: _Module, kept: Sequence[Flags]) -> Iterator[Edit]:
    """Give the edits that rules asked for, of dimensions that get shorter, counted from the size at first."""
    earlier = {(edit.node, edit.kind): edit for edit in (rewrite_of(one.module) or Rewrite()).edits}
    for node, (kind, asked) in one.requests.items():
        edit = edit_of(node, kind, asked, kept, earlier.get((node, kind)))
        if edit is not None:
            yield edit


DIFFERS = "its code does other operations in training"


def _in_one(module: nn.Module, given: Mapping[str, Any]) -> Graph | ValueError:
    """Return the trace of a module's code in one, or why there is none."""
    try:
        graphs = [traced(module, given, training) for training in (False, True)]
    except ValueError as error:
        return error
    return graphs[0] if operations(graphs[0]) == operations(graphs[1]) else ValueError(DIFFERS)


def _forks(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Tell if a module has to be traced by the ways that its code goes, and not in one.

    Raises:
        ValueError: It cannot be traced in either manner.
    """
    if (earlier := rewrite_of(module)) is not None:
        return earlier.ways is not None
    graph = _in_one(module, given)
    if not isinstance(graph, ValueError) and not holds_wholes(graph):
        return False
    try:
        for training in (False, True):
            traced_way(module, given, training, ())
    except ValueError:
        if isinstance(graph, ValueError):
            raise graph from None
        return False
    return True


def _differs_in_training(one: _Module, way: Way) -> bool:
    try:
        first, second = (operations(traces.at(way)) for traces in one.traces)
    except ValueError:
        return True
    return first != second


def _compared(name: str, one: _Module, training: bool, wrong: dict[str, str]) -> Callable[..., Any]:
    """Make the run that holds a module's trace against its own code, and goes on with the latter."""
    traces = one.traces[training]

    def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mine, own = (tree_map(apart, x) for x in ((args, kwargs), (args, kwargs)))
        state = torch.get_rng_state()

        def watched() -> Any:
            try:
                watch = Watched(module, traces, one.seen)
                result = watch.run(*ordered(module, *mine))
            except UntraceableError as error:
                wrong[name] = str(error)
                raise
            _note_way(one, watch.way)
            return result

        with undisturbed(module):
            found = outcome(watched, module, mine)
        torch.set_rng_state(state)
        buffers = [b.detach().clone() for b in module.buffers()]
        wanted = outcome(lambda: forward_of(module)(module, *own[0], **own[1]), module, own)
        if training:  # what a norm has counted, it counts once
            put_back(module, buffers)
        if not alike(found, wanted):
            wrong.setdefault(name, "its code does something else on other inputs, or in training, than its trace")
        torch.set_rng_state(state)
        return forward_of(module)(module, *args, **kwargs)

    return run


def _followed(one: _Module, training: bool, rewrite: Rewrite) -> Callable[..., Any]:
    """Make the run of a module that runs a traced copy already, which notes its numbers and its way."""
    traces = Traces(one.module, one.given, training, one.forks, rewrite.edits)

    def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
        watch = Watched(module, traces, one.seen)
        try:
            return watch.run(*ordered(module, args, kwargs))
        finally:
            _note_way(one, watch.way)

    return run


def _note_way(one: _Module, way: Way) -> None:
    if one.forks and way not in one.ways:
        one.ways.append(way)


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


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")
