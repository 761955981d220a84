"""Operations of a network, as `torch.export` records them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.checks import warn
from fasterai.graph.inputs import input_names
from fasterai.graph.recorded import Recording, recorded
from fasterai.graph.regions import inline_, is_transformed
from fasterai.model.exporting import exporting
from fasterai.model.followed import as_followed
from fasterai.model.inputs import batch_of, listed_samples
from fasterai.model.names import plain_name
from fasterai.model.running import at_rest, copies, in_mode, undisturbed, without_fast_path
from fasterai.model.supported import check_runs, said

__all__ = ["Exported", "exported", "how_recorded", "unmet", "used_otherwise"]


@dataclass(frozen=True)
class Exported:
    """Exported network.

    Attributes:
        program: Its operations.
        names: Placeholder -> name of its parameter or buffer, the first one of a tensor that stands under several.
        inputs: Placeholder -> name of the input, by the argument of `forward`.
        refused: Why the operations were recorded from a run, and not exported; "" where they were exported.
    """

    program: ExportedProgram | Recording
    names: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    def uses(self) -> Counter[str]:
        """Count the operations that read each parameter or buffer, by name."""
        nodes = (node for node in self.program.graph.nodes if node.name in self.names)
        return Counter(self.names[node.name] for node in nodes for _ in node.users)

    def shared(self) -> frozenset[str]:
        """Return the names of parameters and buffers that several operations read, as they stand or views of them."""
        roots, readers = self.roots, Counter[Any]()
        for node in roots:
            if roots[node] is node:
                readers.update({roots[one] for one in node.all_input_nodes})
        twice = {self.names[n.name] for n, count in readers.items() if count > 1 and n.name in self.names}
        return frozenset(twice | {name for name, count in self.uses().items() if count > 1})

    def unread(self) -> list[str]:
        """List the parameters that no operation reads."""
        uses = self.uses()
        return [n for node in self.program.graph_signature.inputs_to_parameters if not uses[n := self.names[node]]]

    def idle_and_unused(self) -> tuple[set[Any], set[Any]]:
        """Find the operations whose results are unused: those without weights, and those with weights.

        The first, such as the mean over heads of attention weights, need not be followed. The second, such as a head whose
        result is returned in training alone, run in the model all the same: their weights have to fit what they read. A change
        in place is used if the tensor that it changes, or a view of it, is read later.
        """
        roots = self.roots
        idle, unused, read = set[Any](), set[Any](), set[Any]()
        for node in reversed(self.program.graph.nodes):
            if node.op == "call_function" and not _is_used(node, read, roots):
                if not any(n.name in self.names for n in node.all_input_nodes):
                    idle.add(node)
                    continue
                unused.add(node)
            read.update(node.all_input_nodes, [roots[n] for n in node.all_input_nodes])
        return idle, unused

    @cached_property
    def roots(self) -> dict[Any, Any]:
        """For each result the tensor that holds its memory: itself, or the one that it is a view of."""
        roots: dict[Any, Any] = {}
        for node in self.program.graph.nodes:
            returns = getattr(getattr(node.target, "_schema", None), "returns", ())
            is_view = node.target is operator.getitem or any(r.alias_info is not None for r in returns)
            roots[node] = roots[node.all_input_nodes[0]] if is_view and node.all_input_nodes else node
        return roots


def _is_used(node: Any, read: set[Any], roots: Mapping[Any, Any]) -> bool:
    """Tell if an operation's result is read later, or if it writes into the model, its inputs, or what is read later."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return node in read or node.is_impure()
    given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    written = tree_leaves([given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write])
    places = [roots[x] for x in written if isinstance(x, torch.fx.Node)]
    return node in read or any(place.op == "placeholder" or place in read for place in places)


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> list[Exported]:
    """Export the network in eval mode; if that leaves parameters unread, or training returns other tensors, in both modes.

    Where `torch.export` refuses, the operations are recorded from runs, one entry for each way that these have taken.

    Raises:
        ValueError: It does not run on the inputs, or cannot be followed; the message says where, and the repair.
    """
    with as_followed(model):
        found = _found(model, inputs)
    if sizes := unmet(found):
        warn(
            f"the way through the model's code depends on values, and no recorded run has met all parameters, such as "
            f"{next(iter(sizes.values()))}: channels that they fit stay"
        )
    return found


def _found(model: nn.Module, inputs: tuple[Any, ...]) -> list[Exported]:
    found = _exported_or_recorded(model, inputs)
    elsewhere = [set(one.unread()) for one in found[1:]]
    unread = [name for name in found[0].unread() if all(name in one for one in elsewhere)]
    if (is_other := _training_returns_other(model, inputs)) or unread:
        found += [one for one in _training(model, inputs, unread) if is_other or set(one.unread()) < set(unread)]
    return found


def _exported_or_recorded(model: nn.Module, inputs: tuple[Any, ...]) -> list[Exported]:
    """Export the network in eval mode, or record it where that fails, or where the export shows `vmap` and its like alone."""
    found: list[Exported] = []
    try:
        found = [_exported(model, inputs, training=False)]
        refused = "it hides the dimension that vmap runs over"
    except Exception as error:
        check_runs(model, inputs)
        refused = said(error)
    if found and not is_transformed(found[0].program.graph):
        return found
    try:
        return _recorded(model, inputs, training=False, refused=refused)
    except Exception as error:
        if found:
            return found
        raise ValueError(
            f"model must be one that torch.export can read on example_inputs, got {refused}, or whose operations a run shows, "
            f"got {said(error)}; remove branches and shapes that depend on data, or prune the part without them by itself"
        ) from error


def how_recorded(programs: Sequence[Exported]) -> str:
    """Say that operations were recorded from runs, and why; "" where all were exported."""
    refused = next((one.refused for one in programs if one.refused), "")
    if not refused:
        return ""
    ways = sum(bool(one.refused) for one in programs)
    took = "which took one way" if ways == 1 else f"which took {ways} ways"
    return f"operations recorded from runs, {took} through the code, as torch.export does not follow it: {refused}"


def unmet(programs: Sequence[Exported]) -> dict[int, str]:
    """Find the sizes of parameters that other values may bring into play: size -> such a parameter.

    Where code has read values, a parameter that no run has met may be used on others, with anything that fits its size.
    """
    if not any(isinstance(one.program, Recording) and one.program.reads_values for one in programs):
        return {}
    unread = set[str].intersection(*(set(one.unread()) for one in programs))
    nodes = {one.names[node.name]: node for one in programs for node in one.program.graph.nodes if node.name in one.names}
    return {int(n): name for name in sorted(unread) for n in nodes[name].meta["val"].shape[:2] if n > 1}


def used_otherwise(programs: Sequence[Exported]) -> set[str]:
    """Find the parameters that recorded runs use in different ways: what one of them reads with, another may make with."""
    uses: dict[str, set[Any]] = {}
    for one in (one for one in programs if one.refused):
        for node in (node for node in one.program.graph.nodes if node.name in one.names and node.users):
            at = [(str(u.target), tuple(i for i, a in enumerate(u.args) if a is node)) for u in node.users]
            uses.setdefault(one.names[node.name], set()).add(frozenset(at))
    return {name for name, several in uses.items() if len(several) > 1}


def _training_returns_other(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Tell if training mode returns other tensors than eval mode, by number or shape; False where it does not run."""
    for given in (inputs, _twice(inputs)):  # a batch norm in training mode fails on one sample
        shapes = []
        try:
            for training in (False, True):
                with at_rest(model), in_mode(model, training):
                    shapes.append([x.shape for x in tree_leaves(model(*copies(given))) if isinstance(x, torch.Tensor)])
        except Exception:  # it may ask for targets in training mode
            continue
        return shapes[0] != shapes[1]
    return False


def _twice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if count := listed_samples(inputs):
        return batch_of(inputs, 2 * count)
    several: tuple[Any, ...] = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x, inputs)
    return several


def _training(model: nn.Module, inputs: tuple[Any, ...], unread: Sequence[str]) -> list[Exported]:
    """Export the network in training mode, on two samples or else on the inputs as given; warn if both fail."""
    failures = []
    for given in (_twice(inputs), inputs):
        try:
            return [_exported(model, given, training=True)]
        except Exception as error:
            failures.append(said(error))
    for given in (_twice(inputs), inputs):
        try:
            return _recorded(model, given, training=True, refused=failures[0])
        except Exception:  # it may ask for targets in training mode
            continue
    cannot = f"training mode cannot be followed ({failures[0]})"
    if unread:
        warn(
            f"{len(unread)} parameters take no part in eval mode, such as {unread[0]}, and {cannot}: "
            "they keep their size, and may not fit their inputs when the model trains"
        )
    else:
        warn(f"training mode returns other outputs than eval mode, and {cannot}: what it alone returns may lose channels")
    return []


def _apart(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy inputs of which two are one tensor: an export would take them for one, and all that reads the one for the other."""
    given = [id(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    return copies(inputs) if len(set(given)) < len(given) else inputs


def _exported(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Exported:
    with exporting(), undisturbed(model), in_mode(model, training), torch.no_grad(), without_fast_path():
        program = torch.export.export(model, _apart(inputs), strict=False)
    inline_(program.graph_module)
    first: dict[int, str] = {}
    called: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        called[name] = first.setdefault(id(tensor), plain_name(name))
    signature = program.graph_signature
    found = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    names = input_names(model, inputs)
    arguments = {arg.name: name for arg, name in zip(given, names, strict=True)} if len(given) == len(names) else {}
    return Exported(program, {node: called.get(name, plain_name(name)) for node, name in found.items()}, arguments)


def _recorded(model: nn.Module, inputs: tuple[Any, ...], training: bool, refused: str) -> list[Exported]:
    return [Exported(one, one.names, one.inputs, refused) for one in recorded(model, inputs, training)]
