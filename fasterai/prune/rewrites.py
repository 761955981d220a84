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

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from fasterai.prune.code_sizes import Count, Known, count, ends, known_of, owners_of
from fasterai.prune.surgery.rewriting import GIVEN, Edit, Path, Rewrite, apply_edits
from fasterai.prune.surgery.tracing import edited, rewrite_of, traced
from fasterai.prune.traced_runs import (
    MARK,
    Marked,
    Repaired,
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
        known: Call and operation of the trace -> the exported operations that it comes down to.
        seen: Operation and path -> values there, on the probes.
        requests: Operation -> kind of edit that a rule has asked for, and the dimension.
    """

    module: nn.Module
    given: dict[str, Any]
    graph: Graph
    known: dict[tuple[int, str], list[Known]] = field(default_factory=dict)
    seen: dict[tuple[str, Path], set[Any]] = field(default_factory=dict)
    requests: dict[str, tuple[str, Count]] = field(default_factory=dict)


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
        self._cuts: dict[str, list[tuple[Count, ...]]] = {}
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
                calls[name].append(bound(module, args, kwargs))
                return forward_of(module)(module, *args, **kwargs)

            return run

        with at_rest(self._model), running({name: (m, noted(name)) for name, m in candidates.items()}):
            quietly(self._model, self._inputs)
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
                mine, own = (tree_map(apart, x) for x in ((args, kwargs), (args, kwargs)))
                state = torch.get_rng_state()
                with undisturbed(module):
                    found = outcome(lambda: Watched(module, graph, one.seen).run(*ordered(module, *mine)), module, mine)
                torch.set_rng_state(state)
                buffers = [b.detach().clone() for b in module.buffers()]
                wanted = outcome(lambda: forward_of(module)(module, *own[0], **own[1]), module, own)
                if training:  # what a norm has counted, it counts once
                    put_back(module, buffers)
                if not alike(found, wanted):
                    wrong[name] = "its code does something else on other inputs, or in training, than its trace"
                torch.set_rng_state(state)
                return forward_of(module)(module, *args, **kwargs)

            return run

        patched = {name: (one.module, compared(name, one)) for name, one in fresh.items()}
        with at_rest(self._model), in_mode(self._model, training), torch.set_grad_enabled(training), running(patched):
            at_half = torch.autocast(_device_type(self._model), torch.bfloat16, enabled=autocast)
            with at_half:
                quietly(self._model, inputs)
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
                return Marked(module, graph, f"{name}|{calls[name]}").run(*ordered(module, args, kwargs))

            return run

        features = dict(self._graph.input_sizes.keys())
        patched = {name: (one.module, marked(name, one)) for name, one in self.modules.items()}
        with running(patched), traceback.preserve_node_meta():
            _, trace, components, weights = followed(self._model, self._inputs, exact, features=features or None, rewrite=True)
        owners = owners_of(self._graph, trace, components, weights)
        first: dict[str, int] = {}
        for node, value in trace.values.items():
            if is_cut(node, value):
                self._cuts.setdefault(module_of(node), []).append(ends(node, value, trace, self._graph, owners))
            if node in trace.requests:
                self._cuts.setdefault(module_of(node), []).append((count(trace.requests[node][1], 0, self._graph, owners),))
            mark = (node.meta.get("custom") or {}).get(MARK)
            if mark is None:
                continue
            name, call, operation = mark.split("|")
            number = int(call) - first.setdefault(name, int(call))
            one = self.modules[name]
            one.known.setdefault((number, operation), []).append(known_of(node, value, trace, self._graph, owners))
            if node in trace.requests:
                kind, dim = trace.requests[node]
                one.requests[operation] = (kind, count(dim, 0, self._graph, owners))

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
                interpreter = Repaired(module, graph, one.seen, expected, kept, edits, calls[name] > 1)
                try:
                    return interpreter.run(*ordered(module, args, kwargs))
                except Exception:
                    found.pop(name, None)
                    raise

            return run

        model = self._model if model is None else model
        modules, patched = {name: model.get_submodule(name) for name in self.modules}, {}
        for name, one in self.modules.items():
            with suppress(ValueError):
                patched[name] = (modules[name], repaired(name, one))
        with at_rest(model), running(patched):
            quietly(model, inputs)
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
                raise ValueError(f"{name or 'its code'} cuts it, or averages over it, in code of its own ({why})")


def _requested(one: _Module, kept: Sequence[Flags]) -> Iterator[Edit]:
    """Give the edits that rules asked for, of dimensions that get shorter, counted from the size at first."""
    earlier = {(edit.node, edit.kind): edit for edit in (rewrite_of(one.module) or Rewrite()).edits}
    for node, (kind, length) in one.requests.items():
        before, after = length.now([np.ones_like(k) for k in kept]), length.now(kept)
        if (node, kind) in earlier:
            before = earlier[node, kind].before
        if before != after:
            yield Edit(node, kind, (), before, after)


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
