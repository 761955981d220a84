"""Parts that rules share: the values that operations pass on, and the notes of one pass over the operations.

Over 300 lines, since every rule is written with these few words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fasterai.graph.labels import FIXED, FREE, Array, Dim, Flags, Labels, is_labelled, is_zeroed, plain, zeroed

if TYPE_CHECKING:
    from fasterai.graph.features import Asked

__all__ = [
    "RULES",
    "Rule",
    "Trace",
    "Value",
    "all_fixed",
    "argument_of",
    "blend",
    "broadcast",
    "called",
    "class_of",
    "is_cut",
    "marked_as",
    "module_of",
    "rule",
    "settled",
    "shape_of",
    "shapes_of",
    "unknown",
    "unknown_tensor",
    "unmarked",
    "values_in",
    "without",
    "zero_in_either",
    "zeros_at",
]


DATA = -1  # the size of a dimension that depends on data, as the results of `nonzero` have


@dataclass(frozen=True)
class Value:
    """Tensor of the network: its shape, and the labels of its dimensions.

    Attributes:
        shape: The sizes of its dimensions.
        dims: For each dimension labels, `FIXED` or `FREE`.
        places: For a parameter or buffer as it stands, or a view of it, which of its dimensions each dimension is, as
            (name, dimension); empty for all others.
        is_weight: True if it is a parameter, a view of one, or a blend. A buffer is not: masks leave it alone.
        is_blend: True if it is a stack of matrices times what the network has worked out, such as the matrices of experts
            summed by their gate: where a slice of the stack is zero, that slice of it is. `places` are the stack's.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    places: tuple[tuple[str, int], ...] = ()
    is_weight: bool = False
    is_blend: bool = False

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.dims)


class Trace:
    """Notes of one pass over the operations, with one choice of ways where operations have several.

    Where a labelled dimension is split into factors, or runs through a grouped convolution, different sets of channels
    may go, all of them sound. `choices` decides.

    Attributes:
        labels: The labels so far.
        choices: Kind of operation -> number of the way that it takes, by default 0. A kind names the operation and the sizes.
        options: Kind of operation -> number of ways that it has; filled during the pass.
        readers: The places, as (name, dimension), that multiply what a channel carries and hand on something else.
        exact: True if an operation that averages over a channel pins it, as the average would change without it.
        normed: Name of a module that normalises, or calls what does -> the dimensions that it does it along.
        rescaled: Names of weights of norms that average over a dimension which may lose channels that are zero.
        summed: The dimensions that operations sum or average over: what is silent there adds nothing, as it is zero.
        products: Those of them that products of two computed tensors sum over, such as the width of a head.
        blends: Names of stacks of matrices of which blends are read.
        roots: Operation -> the one that holds its memory: itself, or that of which it makes a view.
        slim: Names of modules that can be told how many channels there were, of which the silent ones were zero.
        counted: Those of them that average over a dimension which may lose channels -> these dimensions.
        shown: The dimensions where what is handed on is not zero for a silent channel: what reads it has to be zero too.
        inputs: Argument -> the input with labels on the dimension that may lose indices.
        experts: True if experts are looked for instead of channels: a softmax, or a choice of the highest, then gates the
            dimension that it runs over and does not pin it, as one expert less is a softmax over the rest.
        gates: The dimensions that are gated so.
        routes: Node of a choice of the highest -> the dimension that it is made from, and how many are chosen.
        layers: The places, as (name, dimension), of outputs of linear layers.
        sliced: Place, as (name, dimension), of a parameter or buffer that slices read -> its labels, and which are read.
        written: Nodes of tensors that were made to fit, as `zeros(...)` are, and meet labelled ones, or are written in place.
        rewrite: True if sizes that are written into code can be put right, so that a split into unequal parts, and a slice,
            need not pin what they cut.
        values: The result of each operation, once it was followed.
        requests: Operations that have to be edited where a dimension gets shorter -> the kind of edit, and the dimension.
        spreads: Those of them whose result is along a dimension what they read -> the dimension, counted from the right, where
            the result begins in what is read, and its size.
        computed: Operations that read nothing but parameters and each other: no module that averages is told of these.
        lengths: Places, as (name, dimension), of rows that are scaled to lengths which other parameters hold.
    """

    def __init__(
        self,
        choices: dict[str, int],
        exact: bool = True,
        asked: Mapping[str, Asked] | None = None,
        experts: bool = False,
        slim: Collection[str] = (),
        rewrite: bool = False,
        labelled: frozenset[Any] = frozenset(),
    ) -> None:
        self.labels = Labels()
        self.choices = choices
        self.exact = exact
        self.normed: dict[str, list[Dim]] = {}
        self.rescaled: set[str] = set()
        self.summed: list[Dim] = []
        self.products: list[Dim] = []
        self.blends: set[str] = set()
        self.roots: Mapping[Any, Any] = {}
        self.slim = slim
        self.counted: dict[str, list[Dim]] = {}
        self._others: set[str] = set()  # names of modules that average over something else too, themselves or below them
        self.shown: list[Dim] = []
        self.options: dict[str, int] = {}
        self.readers: set[tuple[str, int]] = set()
        self.inputs: dict[str, Value] = {}
        self._asked = asked or {}
        self.experts = experts
        self.gates: list[Dim] = []
        self.routes: dict[Any, tuple[Dim, int]] = {}
        self.layers: set[tuple[str, int]] = set()
        self.written: set[Any] = set()
        self.lengths: set[tuple[str, int]] = set()
        self._labelled = labelled
        self.sliced: dict[tuple[str, int], tuple[Array, Flags]] = {}
        self.rewrite = rewrite
        self.values: dict[Any, Any] = {}
        self.requests: dict[Any, tuple[str, Dim]] = {}
        self.spreads: dict[Any, tuple[int, int, int]] = {}
        self.computed: Collection[Any] = ()

    def input(self, argument: str, shape: tuple[int, ...]) -> Value:
        """Return an input's value, with labels on the dimension that was asked for, the same in each of several programs."""
        asked = self._asked.get(argument)
        if asked is None:
            return Value(shape, all_fixed(shape))
        if argument not in self.inputs:
            labels = self.labels.new(shape[asked.dim])
            self.labels.pin(labels[list(asked.keep)], "it is kept as asked for")
            self.inputs[argument] = Value(shape, tuple(labels if d == asked.dim else FIXED for d in range(len(shape))))
        known = self.inputs[argument]
        if shape[asked.dim] != known.shape[asked.dim]:
            self.labels.pin_all(known.dims, f"{argument} has other sizes in training")
            return Value(shape, all_fixed(shape))
        return Value(shape, known.dims)

    def choose(self, kind: str, ways: int) -> int:
        """Return the number of the way that an operation takes, and note that it has `ways` of them."""
        self.options[kind] = ways
        return self.choices.get(kind, 0)

    def norms(self, node: Any, dim: Dim) -> None:
        """Note a normalisation along a dimension; the module that it belongs to may hold the size, even without parameters."""
        self.normed.setdefault(module_of(node), []).append(dim)

    def sums_zeros(self, node: Any, dim: Dim) -> None:
        """Note that an operation sums over a dimension; if exact, what is not known to be zero where it is silent stays."""
        if not isinstance(dim, np.ndarray):
            return
        if self.exact:
            self._pin_other(node, dim, f"{node.name} averages over it")
        self.summed.append(dim[is_zeroed(dim)])

    def _pin_other(self, node: Any, dim: Array, reason: str) -> None:
        """Pin what is not known to be zero where its channel is silent, and say where it becomes something else."""
        other = dim[~is_zeroed(dim)]
        if other.size:
            self.labels.pin(other, f"{reason}, and it is not zero where its channel is silent{self._culprit(node, other)}")

    def _culprit(self, node: Any, labels: Array) -> str:
        """Tell which operation or buffer makes something of what could be zero; it is looked for backwards."""
        there, start = np.unique(plain(labels)), node
        while True:
            given = [(one, v) for one in node.all_input_nodes for v in values_in(self.values.get(one))]
            carry = [
                (one, [d for d in v.dims if isinstance(d, np.ndarray) and np.isin(plain(d), there).any()]) for one, v in given
            ]
            other = [one for one, dims in carry if dims and not any(is_zeroed(d).any() for d in dims)]
            if not other:
                return f" ({words})" if (words := self._words(node)) and node is not start else ""
            node = other[0]

    def _words(self, node: Any) -> str:
        held = [self.roots.get(one, one).name for one in (node, *node.all_input_nodes)]
        buffer = next((name.removeprefix("b_") for name in held if name.startswith("b_")), None)
        if buffer is None and node.op == "placeholder":
            return ""  # an input
        return f"{buffer} is a buffer" if buffer else f"{node.name} makes it something else"

    def counts(self, node: Any, dim: Dim) -> bool:
        """Note that a module averages over a dimension, if it can be told how many channels there were; True if it can."""
        outer, name = modules_of(node)
        self._others.update(outer)
        if not (is_labelled(dim) and name in self.slim and (self.exact or is_zeroed(dim).all())):
            self._others.add(name)
            return False
        self.sums_zeros(node, dim)
        self.counted.setdefault(name, []).append(dim)
        return True

    def settle(self) -> None:
        """Pin what a module averages over if it averages over something else too: it cannot be told how many there were."""
        for name, dims in list(self.counted.items()):
            if name in self._others or len({len(cast(Array, dim)) for dim in dims}) > 1:
                self.labels.pin_all(dims, f"{name or 'the model'} averages over it, and over other dimensions too")
                del self.counted[name]

    def averages(self, dims: Iterable[Dim], name: str) -> None:
        """Pin dimensions that an operation averages over, if the outputs must stay exact."""
        if self.exact:
            self.labels.pin_all(list(dims), f"{name} averages over it")

    def gate(self, node: Any, dim: Dim, count: int | None = None) -> bool:
        """Note that a dimension is a gate of experts, if those are looked for and it is labelled; True if it is."""
        if not (self.experts and is_labelled(dim)):
            return False
        self.gates.append(dim)
        if count is not None:
            self.routes[node] = (dim, count)
        return True

    def takes(self, place: tuple[str, int], dim: Array, start: int | None, end: int | None) -> None:
        """Note the part of a parameter or buffer that a slice takes."""
        self.sliced.setdefault(place, (dim, np.zeros(len(dim), np.bool_)))[1][slice(start, end)] = True

    def pin_untaken(self) -> None:
        """Pin what all slices of a parameter or buffer leave out, such as positions beyond the length of the inputs."""
        for dim, taken in self.sliced.values():
            self.labels.pin(dim[~taken], "slices leave it out on these inputs, and may read it on longer ones")

    def route(self, node: Any, size: int) -> Dim:
        """Return the closest gate over `size` experts that chose the numbers which a node holds; `FIXED` if none did."""
        seen, level = {node}, [node]
        while level and self.routes:
            for one in level:
                dim, _ = self.routes.get(one, (FIXED, 0))
                if is_labelled(dim) and len(cast(Array, dim)) == size:
                    return dim
            level = [n for n in dict.fromkeys(n for one in level for n in one.all_input_nodes) if n not in seen]
            seen.update(level)
        return FIXED

    def fitted(self, node: Any, made: Any) -> Any:
        """Return what a node makes, with labels instead of `FREE` where it is known to meet, or to take, what has labels."""
        if node not in self._labelled or not isinstance(made, Value):
            return made
        dims = zip(made.shape, made.dims, strict=True)
        fresh = replace(made, dims=tuple(self.labels.new(n) if d is FREE and n > 1 else d for n, d in dims))
        return marked_all(fresh) if called(node) in ("zeros", "new_zeros") else fresh

    def sums(self, node: Any, dim: Dim, reason: str, *, is_product: bool = False) -> None:
        """Note that an operation sums over a dimension without a weight; what is not known to be zero where it is silent stays.

        Not where experts are looked for, whose gates are factors.
        """
        if self.experts or not isinstance(dim, np.ndarray):
            return
        self._pin_other(node, dim, reason)
        self.summed.append(dim[is_zeroed(dim)])
        self.products += [dim[is_zeroed(dim)]] if is_product else []

    def request(self, node: Any, kind: str, dim: Dim) -> bool:
        """Note that an operation in a module's code has to be edited where a dimension gets shorter; False where it cannot.

        The kinds are those of `fasterai.prune.surgery.rewriting`: the edit gets the sizes before and after.
        """
        if self.rewrite:
            self.requests[node] = (kind, dim)
        return self.rewrite

    def told(self, node: Any, kind: str, dim: Dim, reason: str) -> bool:
        """Note that an operation over zeros goes on without those that go, if its code can be told; False if not."""
        if not isinstance(dim, np.ndarray) or not is_zeroed(dim).any() or not self.exact or self.experts:
            return False
        if not self.request(node, kind, dim):
            return False
        self.sums(node, dim, reason)
        return True

    def spread(self, node: Any, dim: Dim, d: int, start: int, size: int) -> Dim:
        """Return the dimension of a result that goes with one of zeros entry by entry, though it mixes them; `FIXED` if not.

        In a traced copy of the code what is left is put to its places among all, and of the result the same places are taken.

        Args:
            node: The operation.
            dim: The dimension of what it reads.
            d: The number of that dimension and of the result's, counted from the right.
            start: Which entry the first one of the result goes with.
            size: The size of the result.
        """
        if not self.told(node, "spread", dim, f"{node.name} mixes its entries"):
            return FIXED
        self.spreads[node] = (d, start, size)
        return plain(cast(Array, dim)[start : start + size])

    def reads(self, weight: Value, d: int) -> None:
        """Note that a weight, or a blend, multiplies a channel along its dimension `d`, and passes on something else."""
        if weight.places and is_labelled(weight.dims[d]):
            self.readers.add(weight.places[d])
            self.blends.update([weight.places[d][0]] if weight.is_blend else [])


def called(node: Any) -> str:
    """Return the name of the operation that a node calls, as `add`; one in place has the name of the other."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
    return name.removesuffix("_") if not name.endswith("__") else name


def module_of(node: Any) -> str:
    """Return the name of the innermost module that runs an operation, without the marks of repeated calls."""
    return modules_of(node)[1]


def modules_of(node: Any) -> tuple[list[str], str]:
    """Return the names of the modules that an operation runs in, without the marks of repeated calls: outer ones, innermost."""
    names = [str(name).partition("@")[0] for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return (names[:-1], names[-1]) if names else ([], "")


def class_of(node: Any) -> str:
    """Return the full name of the class of the innermost module that runs an operation; empty where there is none."""
    kinds = [kind for _, kind in (node.meta.get("nn_module_stack") or {}).values()]
    return "" if not kinds else kinds[-1] if isinstance(kinds[-1], str) else f"{kinds[-1].__module__}.{kinds[-1].__qualname__}"


def is_cut(node: Any, found: Any) -> bool:
    """Tell if an operation is a slice, or a split into unequal parts, of what carries labels."""
    if called(node) == "slice":
        return shape_of(node) != _sizes(node.args[0].meta["val"])
    name = called(node).removeprefix("unsafe_")
    is_split = name in ("split", "split_with_sizes", "tensor_split", "chunk") and isinstance(found, list)
    return is_split and len({v.shape for v in found}) > 1


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under names of operations, in-place variants included."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
        return function

    return enter


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of an operation's result; -1 stands for a size that depends on data."""
    return _sizes(node.meta["val"])


def shapes_of(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the results of an operation that makes several."""
    return [_sizes(value) for value in node.meta["val"]]


def _sizes(tensor: Any) -> tuple[int, ...]:
    numbers = (n if isinstance(n, int) else n.node.maybe_as_int() for n in tensor.shape)
    return tuple(DATA if n is None else int(n) for n in numbers)


def all_fixed(shape: Sequence[int]) -> tuple[Dim, ...]:
    """Return dimensions of which none may shrink, as many as `shape` has."""
    return (FIXED,) * len(shape)


def broadcast(trace: Trace, name: str, values: Iterable[Value], shape: tuple[int, ...], *, product: bool = False) -> Value:
    """Join the dimensions that meet in broadcasting, counted from the right; one of size 1 takes the other's labels.

    Marked as zero is what is so in all of the values, or in any of them where they are multiplied.
    """
    values = list(values)
    dims: list[Dim] = [FREE] * len(shape)
    for value in values:
        for i in range(1, len(value.shape) + 1):
            size, dim = value.shape[-i], value.dims[-i]
            if size == shape[-i]:
                dims[-i] = trace.labels.join(dims[-i], dim, f"{name} meets a dimension of fixed size")
            else:
                trace.labels.pin(dim, f"{name} repeats it along a larger dimension")
    combine = np.logical_or if product else np.logical_and
    flags = [[zeros_at(value, i, size) for value in values] for i, size in zip(range(-len(shape), 0), shape, strict=True)]
    return Value(shape, tuple(_marked(dim, combine.reduce(here)) for dim, here in zip(dims, flags, strict=True)))


def zeros_at(value: Value, i: int, size: int) -> Flags:
    """Tell for each index of dimension `i`, counted from the right, if a value is zero there; one that is repeated is not."""
    is_there = -i <= len(value.shape) and value.shape[i] == size
    return np.broadcast_to(is_zeroed(value.dims[i]) if is_there else np.zeros(1, np.bool_), (size,))


def zero_in_either(a: Dim, b: Dim) -> Dim:
    """Return the labels of a dimension that a product sums over: marked where those of either factor are.

    >>> is_zeroed(zero_in_either(zeroed(np.arange(2)), np.arange(2))).tolist()
    [True, True]
    """
    labelled = next((d for d in (a, b) if isinstance(d, np.ndarray)), None)
    return zeroed(labelled, is_zeroed(a) | is_zeroed(b)) if labelled is not None else FIXED


def _marked(dim: Dim, flags: Flags) -> Dim:
    return zeroed(dim, flags) if isinstance(dim, np.ndarray) else dim


def unmarked(value: Value) -> Value:
    """Return a value of which nothing is known to be zero."""
    return replace(value, dims=tuple(plain(d) if isinstance(d, np.ndarray) else d for d in value.dims))


def marked_all(value: Value) -> Value:
    """Return a value that is zero everywhere, marked so."""
    return replace(value, dims=tuple(zeroed(d) if isinstance(d, np.ndarray) else d for d in value.dims))


def marked_as(value: Value, d: int, flags: Flags | bool) -> Value:
    """Return a value whose labels along dimension `d` are marked as zero where flags are set."""
    dims = list(value.dims)
    dims[d] = _marked(dims[d], np.asarray(flags))
    return replace(value, dims=tuple(dims))


def blend(factors: Sequence[Value], origins: Sequence[Sequence[int | None]], product: Value) -> Value:
    """Return a product, marked as a blend if one of its factors is a stack of matrices of which two dimensions are left.

    Args:
        factors: The tensors that are multiplied.
        origins: For each factor its dimension that each dimension of the product is, None where it has none.
        product: The product.
    """
    stacks = [i for i, f in enumerate(factors) if f.is_weight]
    if len(stacks) != 1:
        return product
    stack, origin = factors[stacks[0]], origins[stacks[0]]
    left = [d for d in origin if d is not None and is_labelled(stack.dims[d])]
    if len(left) < 2 or len(set(stack.places)) < (2 if stack.is_blend else 3):
        return product
    places = tuple(stack.places[d or 0] for d in origin)  # nothing reads a dimension that is not the stack's as its own
    return Value(product.shape, product.dims, places, True, True)


def unknown(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """Pin all that an operation without a rule reads, with its name as the reason, and fix its results."""
    for value in values_in([arguments, keywords]):
        trace.labels.pin_all(value.dims, f"{node.target} is not understood ({node.name})")
    result = node.meta.get("val")
    if isinstance(result, list | tuple):
        return [_fixed(v) for v in result]
    return _fixed(result)


def _fixed(result: Any) -> Any:
    return Value(_sizes(result), all_fixed(result.shape)) if hasattr(result, "shape") else result


def unknown_tensor(trace: Trace, node: Any, *arguments: Any) -> Value:
    """Pin the inputs of an operation without a rule that makes one tensor."""
    result = unknown(trace, node, *arguments)
    assert isinstance(result, Value)
    return result


def values_in(nested: Any) -> list[Value]:
    """List the values in nested lists, tuples and dicts of arguments."""
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [v for item in nested for v in values_in(item)] if isinstance(nested, list | tuple) else []


def settled(x: Value, dims: Iterable[int]) -> Value:
    """Return the value with some dimensions fixed, since the result differs there from index to index."""
    fixed = {d % len(x.shape) for d in dims}
    return Value(x.shape, tuple(FIXED if i in fixed else d for i, d in enumerate(x.dims)))


def without(dims: Sequence[Dim], gone: Sequence[int], length: int) -> tuple[Dim, ...]:
    """Return the dimensions after a reduction over some of them; with `keepdim` these stay with size 1."""
    gone = [g % len(dims) for g in gone]
    if length == len(dims):
        return tuple(FREE if i in gone else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def argument_of(node: Any, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Return an argument of an operation, other than its first, by its name in the operation's schema."""
    names = [a.name for a in node.target._schema.arguments][1:]
    return {**dict(zip(names, arguments, strict=False)), **keywords}.get(name)
