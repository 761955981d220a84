"""What a rule is: the values that operations hand on, the notes of one pass, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasterai.graph.labels import FIXED, FREE, Dim, Labels, is_labelled

__all__ = [
    "RULES",
    "Rule",
    "Trace",
    "Value",
    "all_fixed",
    "argument_of",
    "broadcast",
    "rule",
    "settled",
    "shape_of",
    "unknown",
    "unknown_tensor",
    "values_in",
    "without",
]


@dataclass(frozen=True)
class Value:
    """A tensor: its shape, and what its dimensions carry.

    Attributes:
        shape: The sizes of its dimensions.
        dims: For each dimension labels, `FIXED` or `FREE`.
        places: For a parameter or buffer as it stands, or a view of it, which of its dimensions each dimension is, as
            (name, dimension); empty for all others.
        is_weight: Whether it is a parameter, or a view of one. A buffer is not: masks leave it alone.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    places: tuple[tuple[str, int], ...] = ()
    is_weight: bool = False

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.dims)


class Trace:
    """One pass over the operations, with one way to decide where there are several.

    Where a labelled dimension is split into factors, or runs through a grouped convolution, different sets of channels
    may go, all of them sound. `choices` says which.

    Attributes:
        labels: The labels so far.
        choices: Kind of operation -> which way it takes; the first if it is not in it. A kind is what it does to which sizes.
        options: Kind of operation -> how many ways it has, filled on the way.
        readers: The places, as (name, dimension), that multiply what a channel carries and hand on something else.
        exact: Whether what averages over a channel pins it, as the average would change without it.
        normed: Name of a module that normalises, or calls what does -> the dimensions that it does it along.
        rescaled: Names of weights of norms that average over a dimension which may lose silent channels.
    """

    def __init__(self, choices: dict[str, int], exact: bool = True) -> None:
        self.labels = Labels()
        self.choices = choices
        self.exact = exact
        self.normed: dict[str, list[Dim]] = {}
        self.rescaled: set[str] = set()
        self.options: dict[str, int] = {}
        self.readers: set[tuple[str, int]] = set()

    def choose(self, kind: str, ways: int) -> int:
        """Which of several ways an operation takes."""
        self.options[kind] = ways
        return self.choices.get(kind, 0)

    def norms(self, node: Any, dim: Dim) -> None:
        """A normalisation along a dimension: the module that it stands in may know the size, even without parameters."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.normed.setdefault(str(stack[-1][0]) if stack else "", []).append(dim)

    def averages(self, dims: Iterable[Dim], name: str) -> None:
        """What is averaged over stays, where nothing may move."""
        if self.exact:
            self.labels.pin_all(list(dims), f"{name} averages over it")

    def reads(self, weight: Value, d: int) -> None:
        """A weight multiplies what a channel carries along its dimension `d`, and hands on something else."""
        if weight.places and is_labelled(weight.dims[d]):
            self.readers.add(weight.places[d])


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under names of operations, in-place variants included."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
        return function

    return enter


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of what an operation makes."""
    return tuple(int(n) for n in node.meta["val"].shape)


def all_fixed(shape: Sequence[int]) -> tuple[Dim, ...]:
    """Dimensions of which none may shrink."""
    return (FIXED,) * len(shape)


def broadcast(trace: Trace, name: str, values: Iterable[Value], shape: tuple[int, ...]) -> Value:
    """Dimensions that meet from the right go together; one of size 1 takes the other's part."""
    dims: list[Dim] = [FREE] * len(shape)
    for value in values:
        for i in range(1, len(value.shape) + 1):
            size, dim = value.shape[-i], value.dims[-i]
            if size == shape[-i]:
                dims[-i] = trace.labels.join(dims[-i], dim, f"{name} meets a dimension of fixed size")
            else:
                trace.labels.pin(dim, f"{name} repeats it along a larger dimension")
    return Value(shape, tuple(dims))


def unknown(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """An operation that is not understood: all that it reads stays as it is, with its name as the reason."""
    for value in values_in([arguments, keywords]):
        trace.labels.pin_all(value.dims, f"{node.target} is not understood ({node.name})")
    result = node.meta.get("val")
    if isinstance(result, list | tuple):
        return [Value(tuple(v.shape), all_fixed(v.shape)) if hasattr(v, "shape") else v for v in result]
    return Value(tuple(result.shape), all_fixed(result.shape)) if hasattr(result, "shape") else result


def unknown_tensor(trace: Trace, node: Any, *arguments: Any) -> Value:
    """The same of an operation that makes one tensor."""
    result = unknown(trace, node, *arguments)
    assert isinstance(result, Value)
    return result


def values_in(nested: Any) -> list[Value]:
    """The values in lists, tuples and dicts of arguments."""
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [v for item in nested for v in values_in(item)] if isinstance(nested, list | tuple) else []


def settled(x: Value, dims: Iterable[int]) -> Value:
    """What differs from index to index of some dimensions, also where `x` was made to fit and does not."""
    fixed = {d % len(x.shape) for d in dims}
    return Value(x.shape, tuple(FIXED if i in fixed else d for i, d in enumerate(x.dims)))


def without(dims: Sequence[Dim], gone: Sequence[int], length: int) -> tuple[Dim, ...]:
    """The dimensions after a reduction over some; with `keepdim` they stay, at size 1."""
    gone = [g % len(dims) for g in gone]
    if length == len(dims):
        return tuple(FREE if i in gone else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def argument_of(node: Any, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """An argument after the first, by its name in the operation's schema."""
    names = [a.name for a in node.target._schema.arguments][1:]
    return {**dict(zip(names, arguments, strict=False)), **keywords}.get(name)
