"""Norms behind layers: a layer whose output nothing but a norm reads is heard only as far as the norm lets it through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fasterai.graph.exported import Exported

__all__ = ["Norm", "norms_behind"]

LAYERS = frozenset(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in "123")))
#: Operation -> where its scale and shift stand among its arguments, and its running mean if it treats each channel by itself.
NORMS: Mapping[str, tuple[int, int, int | None]] = {
    **dict.fromkeys(("batch_norm", "instance_norm"), (1, 2, 3)),
    **dict.fromkeys(("group_norm", "layer_norm"), (2, 3, None)),
}


@dataclass(frozen=True)
class Norm:
    """A norm that alone reads the output of a layer.

    Attributes:
        layer: Names of the layer's weight and bias.
        scale: Name of the norm's weight.
        shift: Name of its bias.
        mean: Name of its running mean; None if it has none.
        is_by_channel: Whether it treats each channel by itself, so that one of zeros is worth `shift` where the mean is zero.
    """

    layer: tuple[str, ...]
    scale: str
    shift: str
    mean: str | None
    is_by_channel: bool


def norms_behind(network: Exported) -> Iterator[Norm]:
    """The norms of a network that stand right behind a layer."""
    names = network.names
    for node in network.program.graph.nodes:
        at = NORMS.get(_operation(node))
        if at is None:
            continue
        layer = node.args[0]
        if _operation(layer) not in LAYERS or len(layer.users) > 1:
            continue
        scale, shift, mean = (None if i is None else _name(node, i, names) for i in at)
        weights = [n for n in layer.all_input_nodes if n.name in names]
        if scale and shift and all(len(n.users) == 1 for n in weights):
            yield Norm(tuple(names[n.name] for n in weights), scale, shift, mean, at[2] is not None)


def _operation(node: Any) -> str:
    return str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""


def _name(node: Any, i: int, names: Mapping[str, str]) -> str | None:
    given = node.args[i] if i < len(node.args) else None
    return names.get(getattr(given, "name", ""))
