"""Sizes in code as the labels of the channel graph have them: how long each dimension is once channels are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from fasterai.graph.channels import ChannelGraph
from fasterai.graph.labels import Array, Components, Dim, Flags, plain
from fasterai.graph.rules.trace import Trace, Value, called
from fasterai.prune.surgery.rewriting import Edit, Path, nested, rooted

__all__ = ["Asked", "Count", "Known", "Places", "asked_of", "count", "edit_of", "ends", "factors", "known_of", "owners_of"]
__all__ += ["sized", "wanted"]

#: Operations -> where their sizes start, as `x.view(2, 3)` and `torch.zeros(2, 3)`.
SIZES = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), 0),
    "unflatten": 2,
}
SPLITS = ("split", "split_with_sizes")
#: Operations that reckon with a number beside a tensor.
SUMS = frozenset({"mul", "div", "truediv", "true_divide", "add", "sub", "pow", "scaled_dot_product_attention"})


@dataclass(frozen=True)
class Count:
    """Number of entries of a dimension that stay: those that always do, and those of channels of groups, by group."""

    fixed: int
    free: tuple[tuple[int, Array], ...]

    def now(self, kept: Sequence[Flags]) -> int:
        """Return the length of the dimension where only some channels of each group are kept."""
        return self.fixed + sum(int(counts[kept[group]].sum()) for group, counts in self.free)


@dataclass(frozen=True)
class Known:
    """Knowledge that labels give of one exported operation: the lengths of its results, and where a slice begins and ends."""

    name: str
    results: tuple[tuple[Count, ...], ...]
    bounds: tuple[Count, Count] | None = None


def owners_of(graph: ChannelGraph, trace: Trace, components: Components, weights: Mapping[str, Value]) -> tuple[Array, Array]:
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


def count(dim: Dim, size: int, graph: ChannelGraph, owners: tuple[Array, Array]) -> Count:
    """Return how many entries of a dimension belong to which channels; a dimension without labels stays as it is."""
    if not isinstance(dim, np.ndarray):
        return Count(size, ())
    groups, channels = owners[0][plain(dim)], owners[1][plain(dim)]
    free = [
        (int(g), np.bincount(channels[groups == g], minlength=graph.groups[g].channels)) for g in np.unique(groups) if g >= 0
    ]
    return Count(int((groups < 0).sum()), tuple(free))


@dataclass(frozen=True)
class Places:
    """Places of a dimension, each with the number of its group, or -1, and its channel there; and what `Trace.spreads` has."""

    groups: Array
    channels: Array
    result: tuple[int, int, int]

    def now(self, kept: Sequence[Flags]) -> tuple[int, ...]:
        """Return the places that are left where only some channels of each group are kept."""
        left = [g < 0 or bool(kept[g][c]) for g, c in zip(self.groups.tolist(), self.channels.tolist(), strict=True)]
        return tuple(np.flatnonzero(left).tolist())


Asked = Count | Places


def asked_of(node: Any, trace: Trace, graph: ChannelGraph, owners: tuple[Array, Array]) -> Asked:
    """Return what the edit of an operation that a rule has asked for has to know."""
    _, dim = trace.requests[node]
    if node in trace.spreads and isinstance(dim, np.ndarray):
        return Places(owners[0][plain(dim)], owners[1][plain(dim)], trace.spreads[node])
    return count(dim, 0, graph, owners)


def edit_of(node: str, kind: str, asked: Asked, kept: Sequence[Flags], earlier: Edit | None) -> Edit | None:
    """Return the edit that a rule has asked for, counted from what there was at first; None where nothing has changed."""
    before: Any = asked.now([np.ones_like(k) for k in kept])
    after: Any = asked.now(kept)
    if isinstance(asked, Places):
        d, start, size = asked.result
        before = earlier.before if earlier else (d, len(before), start, size)
        after = tuple(earlier.after[place] for place in after) if earlier else after
        return None if len(after) == before[1] else Edit(node, kind, (), before, after)
    before = earlier.before if earlier else before
    return None if before == after else Edit(node, kind, (), before, after)


def ends(node: Any, found: Any, trace: Trace, graph: ChannelGraph, owners: tuple[Array, Array]) -> tuple[Count, ...]:
    """Return the positions of a slice, or the lengths of the parts of a split."""
    known = known_of(node, found, trace, graph, owners)
    return known.bounds or tuple(n for part in known.results for n in part)


def known_of(node: Any, found: Any, trace: Trace, graph: ChannelGraph, owners: tuple[Array, Array]) -> Known:
    """Return what the labels say of an exported operation."""
    values = [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, Value)]
    results = tuple(tuple(count(d, n, graph, owners) for d, n in zip(v.dims, v.shape, strict=True)) for v in values)
    if called(node) != "slice" or not values:
        return Known(called(node), results)
    x: Value = trace.values[node.args[0]]
    d, start, end = ((*node.args, *(0, None, None)[len(node.args) - 1 :]))[1:4]
    dim, size = x.dims[d], x.shape[d]
    begins, ends, _ = slice(start, end).indices(size)
    if (begins, ends) == (0, size):
        return Known("slice", results)
    cut = [dim[:n] if isinstance(dim, np.ndarray) else dim for n in (begins, ends)]
    return Known("slice", results, (count(cut[0], begins, graph, owners), count(cut[1], ends, graph, owners)))


# --- the arguments of operations --------------------------------------------------------------------------------------


def _operation(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def sized(node: Node, args: Sequence[Any]) -> list[Path]:
    """List where the numbers of an operation stand that give sizes: the arguments, entries of a list, bounds of slices."""
    name = _operation(node) if node.op in ("call_method", "call_function") else ""
    if name in SIZES:
        at = SIZES[name]
        if len(args) > at and isinstance(args[at], list | tuple):
            return [("args", at, k) for k in range(len(args[at]))]
        return [("args", k) for k in range(at, len(args)) if isinstance(args[k], int)]
    if name in SPLITS and len(args) > 1:
        return [("args", 1, k) for k in range(len(args[1]))] if isinstance(args[1], list | tuple) else [("args", 1)]
    if name in ("getitem", "setitem") and isinstance(args[0], Tensor):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        where: list[Path] = [("args", 1, i) for i in range(len(index))] if isinstance(args[1], tuple) else [("args", 1)]
        slices = [path for path, one in zip(where, index, strict=True) if isinstance(one, slice) and one.step in (None, 1)]
        return [(*path, end) for path in slices for end in ("start", "stop")]
    return []


def factors(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Path]:
    """List where numbers that are worked out of sizes scale tensors, as in `q * (C // heads) ** -0.5`."""
    name = _operation(node) if node.op in ("call_method", "call_function") else ""
    if name.strip("_").removeprefix("i") not in SUMS or not any(isinstance(x, Tensor) for x in args):
        return []
    places: list[Path] = [("args", i) for i in range(len(args))] + [("kwargs", key) for key in kwargs]
    there = (node.args, node.kwargs)
    return [
        path
        for path in places
        if isinstance(nested(there, rooted(path)), Node) and isinstance(nested((args, kwargs), rooted(path)), int | float)
    ]


def wanted(n: Node, args: Any, kwargs: Any, path: Path, value: Any, known: Sequence[Known], kept: Sequence[Flags]) -> Any:
    """Return the number that has to stand at a path of an operation's arguments; None where it is right."""
    name = _operation(n)
    if name in SPLITS:
        return _wanted_part(args, kwargs, path, value, known, kept)
    if name in ("getitem", "setitem"):
        return _wanted_bound(args, path, value, known, kept)
    first = SIZES[name] if len(path) == 2 else 0
    at = int(path[-1]) - first + (args[1] % (args[0].dim() + 1) if name == "unflatten" else 0)
    results = known[-1].results[0]
    if value == -1 or at >= len(results):
        return None
    wanted = results[at].now(kept)
    return None if value == wanted else wanted


def _wanted_part(args: Any, kwargs: Any, path: Path, value: Any, known: Sequence[Known], kept: Sequence[Flags]) -> Any:
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


def _wanted_bound(args: Any, path: Path, value: Any, known: Sequence[Known], kept: Sequence[Flags]) -> int | None:
    """Return where a slice has to begin or to end."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    cuts = [i for i, one in enumerate(index) if isinstance(one, slice) and (one.start or one.stop is not None)]
    bounds = [one.bounds for one in known if one.bounds]
    at = int(path[2]) if len(path) == 4 else 0
    if value is None or at not in cuts or len(bounds) != len(cuts):
        return None
    wanted = bounds[cuts.index(at)][path[-1] == "stop"].now(kept)
    return None if value == wanted else wanted
