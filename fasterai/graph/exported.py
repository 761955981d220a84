"""Operations of a network, as `torch.export` records them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from fasterai.core.checks import warn
from fasterai.model.names import plain_name
from fasterai.model.running import in_mode, undisturbed, without_fast_path
from fasterai.model.supported import check_runs, said

__all__ = ["Exported", "exported"]


@dataclass(frozen=True)
class Exported:
    """Exported network.

    Attributes:
        program: Its operations.
        names: Placeholder -> name of its parameter or buffer, the first one of a tensor that stands under several.
    """

    program: ExportedProgram
    names: Mapping[str, str]

    def uses(self) -> Counter[str]:
        """Count the operations that read each parameter or buffer, by name."""
        nodes = (node for node in self.program.graph.nodes if node.name in self.names)
        return Counter(self.names[node.name] for node in nodes for _ in node.users)

    def shared(self) -> frozenset[str]:
        """Return the names of parameters and buffers that several operations read."""
        return frozenset(name for name, count in self.uses().items() if count > 1)

    def unread(self) -> list[str]:
        """List the parameters that no operation reads."""
        uses = self.uses()
        return [n for node in self.program.graph_signature.inputs_to_parameters if not uses[n := self.names[node]]]

    def idle(self) -> set[Any]:
        """Find the operations without weights whose results are unused, such as the mean over heads of attention weights.

        Those with weights run in the model all the same: their weights have to fit what they read.
        """
        idle: set[Any] = set()
        for node in reversed(self.program.graph.nodes):
            is_pure = node.op == "call_function" and not node.is_impure()
            if is_pure and idle.issuperset(node.users) and not any(n.name in self.names for n in node.all_input_nodes):
                idle.add(node)
        return idle


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> list[Exported]:
    """Export the network in eval mode; if that leaves parameters unread, in training mode as well.

    Raises:
        ValueError: It does not run on the inputs, or cannot be exported; the message says where, and the repair.
    """
    try:
        found = [_exported(model, inputs, training=False)]
    except Exception as error:
        check_runs(model, inputs)
        raise ValueError(
            f"model must be one that torch.export can read on example_inputs, got {said(error)}; "
            "remove branches and shapes that depend on data, or prune the part without them by itself"
        ) from error
    if unread := found[0].unread():
        found += [one for one in _training(model, inputs, unread) if set(one.unread()) < set(unread)]
    return found


def _training(model: nn.Module, inputs: tuple[Any, ...], unread: Sequence[str]) -> list[Exported]:
    """Export the network in training mode, on two samples or else on the inputs as given; warn if both fail."""
    several = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x, inputs)
    failures = []
    for given in (several, inputs):
        try:
            return [_exported(model, given, training=True)]
        except Exception as error:
            failures.append(said(error))
    warn(
        f"{len(unread)} parameters take no part in eval mode, such as {unread[0]}, and training mode cannot be "
        f"followed ({failures[0]}): they keep their size, and may not fit their inputs when the model trains"
    )
    return []


def _exported(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Exported:
    with undisturbed(model), in_mode(model, training), torch.no_grad(), without_fast_path(), _plain():
        program = torch.export.export(model, inputs, strict=False)
    first: dict[int, str] = {}
    called: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        called[name] = first.setdefault(id(tensor), plain_name(name))
    signature = program.graph_signature
    found = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return Exported(program, {node: called.get(name, plain_name(name)) for node, name in found.items()})


@contextmanager
def _plain() -> Iterator[None]:
    """Keep tensors free of subclasses for a while: fastai's layers cast to its own class, which export cannot handle."""
    cast = torch.Tensor.as_subclass
    torch.Tensor.as_subclass = _as_it_is  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.as_subclass = cast  # type: ignore[method-assign]


def _as_it_is(tensor: Any, cls: Any) -> Any:
    return tensor
