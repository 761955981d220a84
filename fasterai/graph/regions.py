"""Regions of an exported network, such as `torch.autocast(enabled=False)`: their operations in the place of their call.

`torch.export` writes what stands in a region as a graph of its own, and a call of it: `wrap_with_autocast(..., body, x)`. The
labels of channels run through such a body as through any other operations, so that it is copied to where it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["inline_", "is_transformed"]

#: Calls of one body, once, on what stands behind it among the arguments.
ONCE = frozenset(
    (
        *("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "wrap_activation_checkpoint", "strict_mode"),
        *("tag_activation_checkpoint", "invoke_subgraph", "hints_wrapper", "dynamo_bypassing_wrapper"),
    )
)


def is_transformed(graph: fx.Graph) -> bool:
    """Tell if operations stand in the graph as `vmap` and its like show them, without the dimension that they run over."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return any(str(getattr(target, "__module__", "")).startswith("torch._functorch") for target in targets)


def inline_(module: fx.GraphModule) -> None:
    """Put the operations of all regions, nested ones too, in the place of their calls.

    Of `torch.cond` both branches are followed: what they give is joined, as by `where`. A call of another kind stays.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        bodies = [found for a in node.args if isinstance(found := _body(module, a), fx.GraphModule)]
        name = node.target.__name__
        if name in ONCE and len(bodies) == 1:
            _replace(node, bodies, None)
        elif name == "cond" and len(bodies) == 2:
            _replace(node, bodies, node.args[0])


def _body(module: fx.GraphModule, argument: Any) -> Any:
    is_attribute = isinstance(argument, fx.Node) and argument.op == "get_attr"
    return getattr(module, str(argument.target), None) if is_attribute else None


def _replace(call: fx.Node, bodies: Sequence[fx.GraphModule], condition: Any) -> None:
    """Copy bodies before a call, and let those that read the call read what they give."""
    if any(user.target.__name__ != "getitem" for user in call.users if callable(user.target)):
        return
    given = tree_leaves(call.args[1 + max(i for i, a in enumerate(call.args) if _is_body(a)) :])
    results = []
    with call.graph.inserting_before(call):
        for body in bodies:
            inline_(body)
            results.append(_copied(body.graph, given, call.graph))
        for user in list(call.users):
            made = [result[user.args[1]] for result in results]
            one = made[0] if condition is None else _either(call.graph, condition, made, user)
            user.replace_all_uses_with(one)
            call.graph.erase_node(user)
    call.graph.erase_node(call)


def _is_body(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _either(graph: fx.Graph, condition: Any, made: Sequence[Any], user: fx.Node) -> fx.Node:
    """Make a node for what one of two branches gives."""
    node = graph.call_function(torch.ops.aten.where.self, (condition, *made))
    node.meta.update(user.meta)
    return node


def _copied(body: fx.Graph, given: Sequence[Any], graph: fx.Graph) -> Any:
    """Copy a body's operations to where a graph inserts, and return what stands for its results."""
    inputs = [node for node in body.nodes if node.op == "placeholder"]
    values: dict[Any, Any] = dict(zip(inputs, given[len(given) - len(inputs) :], strict=True))
    for node in body.nodes:
        if node.op == "output":
            return tree_map(lambda a: values.get(a, a), node.args[0])
        if node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise ValueError("a body must have an output, got none")
