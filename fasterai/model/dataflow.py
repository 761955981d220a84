"""Which batch norm belongs to which weight, and which weights make the outputs: read off autograd's graph.

One forward pass in eval mode with the given inputs; what depends on what then stands in the graph, whatever the order in which
layers were registered, and functional calls are seen as well. The model's parameters, buffers, modes and the random
generators stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = ["Flow", "watch"]

# Operations that may read a parameter of two or more dimensions without mixing channels.
ELEMENTWISE = ("Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Where", "Copy", "ToCopy", "Expand", "Cat", "Stack")
# Operations that hand a parameter on unchanged but for its shape and type; any other reads it.
VIEWS = (
    *("Alias", "AsStrided", "Clone", "Copy", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes"),
    *("Squeeze", "T", "ToCopy", "Transpose", "Unbind", "Unflatten", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
)


@dataclass(frozen=True)
class Flow:
    """What the graph shows.

    Attributes:
        norms: Weight name -> (scale, shift) names of the batch norms that read that weight's output and nothing else.
        outputs: Names of the weights between which and an output no other weight stands.
    """

    norms: Mapping[str, tuple[tuple[str | None, str | None], ...]]
    outputs: frozenset[str]


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as fresh leaves that share their memory, and copies of the buffers."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    result = {n: p.requires_grad_() if p.is_floating_point() else p for n, p in parameters.items()}
    return result | {n: b.clone() for n, b in model.named_buffers()}


def watch(model: nn.Module, inputs: tuple[Any, ...], part: nn.Module | None = None) -> Flow:
    """Run the model once and read the graph.

    Args:
        model: The model, wrapped or not.
        inputs: Its positional arguments, on its device.
        part: A module of the model: its parameters go by their names in it, all others by names that nothing else has.

    Raises:
        ValueError: The model does not run on these inputs, or its outputs depend on no parameter.
    """
    model = unwrap(model)
    held = leaves(model)
    with undisturbed(model), evaluating(model), torch.enable_grad():
        try:
            output = torch.func.functional_call(model, held, inputs)
        except Exception as error:
            raise ValueError(f"example_inputs must be arguments that the model runs on, got an error: {error}") from error
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
    if not roots:
        raise ValueError("example_inputs must give outputs that depend on the parameters, got outputs without a graph")
    inner = unwrap(part) if part is not None else model
    own = {id(parameter): plain_name(name) for name, parameter in inner.named_parameters()}
    names = {id(held[n]): own.get(id(p), f"outside of the part: {n}") for n, p in model.named_parameters()}
    return Flow(_norms(roots, names), frozenset(_outputs(roots, names)))


def _parameter(node: Any) -> Tensor | None:
    """The parameter that a node hands on unchanged but for its shape and type, None if it is no such node."""
    for _ in range(8):
        if node is None:
            return None
        if hasattr(node, "variable"):
            variable: Tensor = node.variable
            return variable
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1 or _operation(node) not in VIEWS:
            return None
        node = following[0]
    return None


def _operation(node: Any) -> str:
    """The operation's name, without the number of its overload."""
    name: str = node.name()
    return name.rstrip("0123456789").removesuffix("Backward")


def _weights(node: Any, names: Mapping[int, str]) -> list[str]:
    """The names of the weights that an operation mixes channels with."""
    if _operation(node) in ELEMENTWISE:
        return []
    read = [p for n, _ in node.next_functions if (p := _parameter(n)) is not None and p.dim() > 1]
    return [names[id(p)] for p in read if id(p) in names]


def _inputs(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None and _parameter(n) is None]


def _outputs(roots: list[Any], names: Mapping[int, str]) -> set[str]:
    """The first weights on every way back from the outputs."""
    found: set[str] = set()
    seen, stack = set(roots), list(roots)
    while stack:
        node = stack.pop()
        weights = _weights(node, names)
        found.update(weights)
        following = [] if weights else [n for n in _inputs(node) if n not in seen]
        seen.update(following)
        stack += following
    return found


def _norms(roots: list[Any], names: Mapping[int, str]) -> dict[str, tuple[tuple[str | None, str | None], ...]]:
    """Which batch norms read which weight's output."""
    readers: dict[tuple[str | None, str | None], set[str]] = {}
    seen, stack = set(roots), list(roots)
    while stack:
        node = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(following)
        stack += following
        if "BatchNorm" in node.name():
            scale, shift = (_name(n, names) for n, _ in node.next_functions[1:3])
            source = _skip_casts(node.next_functions[0][0])
            weights = _weights(source, names) if source is not None else []
            # A norm that reads anything but one weight's output belongs to none.
            readers.setdefault((scale, shift), set()).update(weights if len(weights) == 1 else [""])
    norms: dict[str, tuple[tuple[str | None, str | None], ...]] = {}
    for norm, sources in readers.items():
        if len(sources) == 1 and "" not in sources and norm != (None, None):
            (source,) = sources
            norms[source] = (*norms.get(source, ()), norm)
    return norms


def _name(node: Any, names: Mapping[int, str]) -> str | None:
    parameter = _parameter(node)
    return None if parameter is None else names.get(id(parameter))


def _skip_casts(node: Any) -> Any:
    while node is not None and node.name().startswith("ToCopy"):
        node = node.next_functions[0][0]
    return node
