"""Edits of traces as data: sizes that are written into a module's code, put right in a trace of it.

To add a kind of edit: a function `(graph, node, edit)` that changes the graph of a trace, registered by `kind`. A rule of the
channel graph asks for it by `trace.request(node, kind, dim)`; the edit has the sizes of that dimension before and after.

Over 300 lines, since all kinds of edits stand beside what an edit is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from fasterai.model.slim_weights import told_batch_norm, told_centred, told_variance
from fasterai.model.spreading import put_back, taken_out

__all__ = ["GIVEN", "KINDS", "Edit", "Path", "Rewrite", "Way", "apply_edits", "kind", "nested", "replaced", "rooted"]

#: Types of arguments that a trace is made for, where a module is called with the same ones each time.
GIVEN = (type(None), bool, str)
Path = tuple[int | str, ...]
Way = tuple[int, ...]


@dataclass(frozen=True)
class Edit:
    """One change of a module's trace.

    Attributes:
        node: The operation, by its name in the trace.
        kind: What is done to it, by its name in `KINDS`.
        path: Which argument: `args` or `kwargs`, then indices, keys, or a slice's bound; empty where the operation is meant.
        before: The number before; None where it was worked out in each forward pass. For what is spread the dimension, counted
            from the right, its size before, where the result begins in it, and the size of the result.
        after: The number after; for the parts of a split all of them; for what is spread the places that are left.
    """

    node: str
    kind: str
    path: Path
    before: Any
    after: Any

    def to_list(self) -> list[Any]:
        """Return plain data, ready for JSON."""
        return [self.node, self.kind, list(self.path), _listed(self.before), _listed(self.after)]

    @classmethod
    def from_list(cls, data: Any) -> Edit:
        """Make an edit from the data of `to_list`.

        Raises:
            ValueError: It is no such data.
        """
        if not isinstance(data, list | tuple) or len(data) != 5 or not isinstance(data[0], str) or data[1] not in KINDS:
            raise ValueError(f"an edit must be [node, kind, path, before, after], its kind one of {[*KINDS]}, got {data!r}")
        node, name, path, before, after = data
        if not isinstance(path, list | tuple) or not all(isinstance(key, str) or _is_count(key) for key in path):
            raise ValueError(f"an edit's path must be a list of names and indices, got {path!r}")
        is_number = name == "factor" and isinstance(after, int | float) and math.isfinite(after)
        if not (before is None or _is_sizes(before)) or not (is_number or _is_sizes(after)):
            raise ValueError(f"an edit's numbers must be whole numbers from 0 on, got {before!r} and {after!r}")
        return cls(node, name, tuple(path), _tupled(before), _tupled(after))


@dataclass(frozen=True)
class Rewrite:
    """Way in which a module is traced, and the edits of its trace.

    Attributes:
        given: Arguments that it is traced for, by name; called with others it raises an error.
        edits: The changes of its trace.
        ways: For code that decides by sizes the ways on which the edits were checked, each by its decisions, in order; None
            for code that is traced in one.
    """

    given: tuple[tuple[str, Any], ...] = ()
    edits: tuple[Edit, ...] = ()
    ways: tuple[Way, ...] | None = None

    @property
    def why(self) -> str:
        """The reason for it, for reports."""
        sizes = not self.edits or any(edit.kind in ("size", "share") for edit in self.edits)
        return "its code had sizes written into it" if sizes else "its code goes by all channels that there were"

    def followed(self) -> Rewrite:
        """Return it without edits that put other operations in the place of those which the channel graph follows."""
        return replace(self, edits=tuple(edit for edit in self.edits if edit.kind not in REPLACING))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        data: dict[str, Any] = {"given": [list(pair) for pair in self.given], "edits": [edit.to_list() for edit in self.edits]}
        return data if self.ways is None else data | {"ways": [list(way) for way in self.ways]}

    @classmethod
    def from_dict(cls, data: Any) -> Rewrite:
        """Make it from the data of `to_dict`.

        Raises:
            ValueError: It is no such data.
        """
        if not isinstance(data, Mapping) or not all(isinstance(data.get(part), list) for part in ("given", "edits")):
            raise ValueError(f"a rewrite must be a dict of given and edits, got {data!r}")
        for pair in data["given"]:
            if not isinstance(pair, list) or len(pair) != 2 or not (isinstance(pair[0], str) and isinstance(pair[1], GIVEN)):
                raise ValueError(f"what a rewrite is given must be [argument, None, bool or text], got {pair!r}")
        ways = data.get("ways")
        if ways is not None and not (isinstance(ways, list) and all(map(_is_way, ways))):
            raise ValueError(f"the ways of a rewrite must be lists of truth values and whole numbers, got {ways!r}")
        edits, given = tuple(map(Edit.from_list, data["edits"])), tuple((name, value) for name, value in data["given"])
        return cls(given, edits, None if ways is None else tuple(map(tuple, ways)))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_way(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(choice, int) for choice in value)


def _is_sizes(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list | tuple) and all(map(_is_count, value)))


# --- kinds of edits --------------------------------------------------------------------------------------------------

Kind = Callable[[Graph, Node, Edit], None]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of edits."""

    def enter(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return enter


@kind("size")
def _size(graph: Graph, node: Node, edit: Edit) -> None:
    """Put a number in the place of another, or of what is worked out there."""
    _put(node, edit.path, edit.after)


@kind("factor")
def _factor(graph: Graph, node: Node, edit: Edit) -> None:
    """Put the number that a tensor was scaled by before in the place of one that is worked out of sizes."""
    _put(node, edit.path, edit.after)


@kind("share")
def _share(graph: Graph, node: Node, edit: Edit) -> None:
    """Take a share of what is worked out, as of `B * heads` where heads are fewer: times `after`, divided by `before`."""
    with graph.inserting_before(node):
        worked_out = nested((node.args, node.kwargs), rooted(edit.path))
        name = "_".join(map(str, (edit.node, *edit.path)))  # the same in each trace that holds the operation
        times = graph.create_node("call_function", _times, (worked_out, edit.after, edit.before), name=name)
    _put(node, edit.path, times)


def _times(x: int, after: int, before: int) -> int:
    return x * after // before


@kind("mean")
def _mean(graph: Graph, node: Node, edit: Edit) -> None:
    """Make a mean over n of N entries, of which the others were zero, the mean over all N: times n / N."""
    with graph.inserting_after(node):
        times = graph.create_node("call_function", torch.mul, (node, edit.after / edit.before), name=f"{node.name}_of_all")
    node.replace_all_uses_with(times, delete_user_cb=lambda user: user is not times)


@kind("most")
def _most(graph: Graph, node: Node, edit: Edit) -> None:
    """Make the greatest of n entries the greatest of N, of which the others were zero."""
    _bounded(graph, node, torch.clamp_min)


@kind("least")
def _least(graph: Graph, node: Node, edit: Edit) -> None:
    """Make the least of n entries the least of N, of which the others were zero."""
    _bounded(graph, node, torch.clamp_max)


def _bounded(graph: Graph, node: Node, bound: Callable[..., Any]) -> None:
    """Keep a result on one side of zero, or the values of one that has their numbers too."""
    parts = [one for one in node.users if one.target in (operator.getitem, getattr) and one.args[1] in (0, "values")]
    for one in parts or [node]:
        with graph.inserting_after(one):
            bounded = graph.create_node("call_function", bound, (one, 0), name=f"{one.name}_bounded")
        one.replace_all_uses_with(bounded, delete_user_cb=partial(operator.is_not, bounded))


#: Kinds that put other operations in the place of one.
REPLACING = ("standard", "variance", "centred", "spread")


@kind("standard")
def _standard(graph: Graph, node: Node, edit: Edit) -> None:
    """Make a batch norm by averages over n of N entries, of which the others were zero, one by those over all N."""
    _replace(graph, node, told_batch_norm, (edit.before, edit.after, *node.args), node.kwargs)


@kind("variance")
def _variance(graph: Graph, node: Node, edit: Edit) -> None:
    """Make a variance or deviation of n of N entries, of which the others were zero, that of all N."""
    _replace(graph, node, told_variance, (_name(node), edit.before, edit.after, *node.args), node.kwargs)


@kind("centred")
def _centred(graph: Graph, node: Node, edit: Edit) -> None:
    """Make a variance of n of N entries whose mean was taken away, or a mean or sum of their squares, that of all N."""
    name = _name(node)
    x = cast(Node, cast(Node, node.args[0]).args[0]) if name in ("mean", "sum") else node.args[0]
    _replace(graph, node, told_centred, (name, edit.before, edit.after, x, *node.args[1:]), node.kwargs)


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _replace(graph: Graph, node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_function(function, args, dict(kwargs)))
    graph.erase_node(node)


@kind("spread")
def _spread(graph: Graph, node: Node, edit: Edit) -> None:
    """Put what an operation reads to its places among all that there were, and take out again what is left of its result."""
    d, size, start, length = edit.before
    left = tuple(place - start for place in edit.after if start <= place < start + length)
    with graph.inserting_before(node):
        wide = graph.call_function(put_back, (node.args[0], d, size, edit.after))
    node.args = (wide, *node.args[1:])
    with graph.inserting_after(node):
        taken = graph.call_function(taken_out, (node, d, left))
    node.replace_all_uses_with(taken, delete_user_cb=lambda user: user is not taken)


def rooted(path: Path) -> Path:
    """Return a path as one of the pair of an operation's positional and keyword arguments."""
    return ({"args": 0, "kwargs": 1}[str(path[0])], *path[1:])


def nested(value: Any, path: Path) -> Any:
    """Return what stands at a path of nested lists, dicts and slices.

    >>> nested([5, (6, slice(None, 7))], (1, 1, "stop"))
    7
    """
    for key in path:
        value = getattr(value, str(key)) if isinstance(value, slice) else value[key]
    return value


def _put(node: Node, path: Path, value: Any) -> None:
    args, kwargs = replaced((node.args, node.kwargs), rooted(path), value)
    node.args, node.kwargs = tuple(args), dict(kwargs)


def replaced(whole: Any, path: Path, value: Any) -> Any:
    """Return nested lists, dicts and slices with another value at a path.

    >>> replaced(((1, (2, 3)), {}), (0, 1, 0), 5)
    ((1, (5, 3)), {})
    """
    if not path:
        return value
    key, inner = path[0], replaced(nested(whole, path[:1]), path[1:], value)
    if isinstance(whole, slice):
        bounds = {"start": whole.start, "stop": whole.stop, "step": whole.step, str(key): inner}
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    if isinstance(whole, Mapping):
        return {**whole, key: inner}
    made = [inner if i == key else x for i, x in enumerate(whole)]
    return tuple(made) if isinstance(whole, tuple) else made


def apply_edits(graph: Graph, edits: tuple[Edit, ...]) -> None:
    """Make the changes of a trace, in place.

    Raises:
        ValueError: An edit names an operation or an argument that there is not, or that has another number.
    """
    nodes = {node.name: node for node in graph.nodes}
    for edit in edits:
        try:
            there = nested((nodes[edit.node].args, nodes[edit.node].kwargs), rooted(edit.path)) if edit.path else edit.before
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{edit.node} has no argument {edit.path}") from error
        if edit.kind == "size" and edit.before is not None and there != edit.before:
            raise ValueError(f"{edit.node} has {there} where the edit has {edit.before}")
        KINDS[edit.kind](graph, nodes[edit.node], edit)
