"""Weights that are computed from parameters alone before a layer reads them, as weight standardisation does."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from fasterai.graph.rules.trace import called, shape_of

__all__ = ["computed_weights", "kernels_in"]

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def computed_weights(nodes: Iterable[Any], held: Collection[str]) -> frozenset[Any]:
    """Find the operations that read nothing but parameters, buffers, and each other.

    Args:
        nodes: All operations, in order.
        held: Names of the placeholders of parameters and buffers.
    """
    found: set[Any] = set()
    for node in nodes:
        given = node.all_input_nodes if node.op == "call_function" else ()
        if given and all(one in found or one.name in held for one in given):
            found.add(node)
    return frozenset(found)


def kernels_in(nodes: Iterable[Any], computed: Collection[Any]) -> frozenset[Any]:
    """Find the parameters that convolutions read in their own shape once something was computed from them.

    Whatever is done to them on the way, such a parameter is a kernel: behind its first two dimensions stand places.
    """
    found: set[Any] = set()
    for node in nodes:
        if called(node) in CONVOLUTIONS and node.args[1] in computed:
            seen = [node.args[1]]
            for one in seen:  # it grows on the way
                seen += [given for given in one.all_input_nodes if given not in seen]
            shape = shape_of(node.args[1])
            found.update(one for one in seen if one.op == "placeholder" and shape_of(one) == shape)
    return frozenset(found)
