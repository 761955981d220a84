"""Counting of MACs and of new memory inside a forward pass, module by module.

To add a rule for an operation that torch's counter lacks: a function of the arguments' shapes that returns FLOPs (two per MAC),
and its operation in `rules()`. A rule that a user registers with torch's `register_flop_formula` counts as well.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fasterai.model.running import without_fast_path

__all__ = ["Tally", "count", "rules"]

Shape = Sequence[int]
#: aten operations that multiply matrices in one piece; without a rule they are named as not counted.
HEAVY = re.compile(r"mm(_|$)|rnn|attention|fft|convolution|encoder_layer")


# --- rules ---------------------------------------------------------------------------------------------------------------


def matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (M, N) x (N): M N MACs."""
    return 2 * prod(matrix)


def added_matrix_vector(_bias: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (M) + (M, N) x (N): M N MACs; the addition counts nothing."""
    return 2 * prod(matrix)


def inner(first: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (N) x (N): N MACs."""
    return 2 * prod(first)


def matrix(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (M, K) x (K, N): M K N MACs."""
    return 2 * prod(first) * second[-1]


def added_matrix(_bias: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (M, N) + (M, K) x (K, N), or of a sum of B such products: M K N, or B M K N MACs."""
    return 2 * prod(first) * second[-1]


def grouped_matrix(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of a product of experts, in which every row meets the matrix of one group.

    (T, K) x (G, K, N): T K N MACs. Where the groups are of columns, (G, M, K) x (K, T), every column meets one: M K T.
    """
    return 2 * prod(first[-2:] if len(second) == 2 else first) * second[-1]


def trilinear(first: Shape, second: Shape, third: Shape, *expand: Any, **_: Any) -> int:
    """Count the FLOPs of a sum over products of three tensors, as in `nn.Bilinear`: B out in1 in2 MACs."""
    shapes = []
    for shape, places in zip((first, second, third), expand[:3], strict=True):
        full = list(shape)
        for place in sorted(places):
            full.insert(place, 1)
        shapes.append(full)
    return 2 * int(prod(max(sizes) for sizes in zip(*shapes, strict=True)))


def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of (B, H, L, E) x (B, H, S, E) x (B, H, S, V): B H L S (E + V) MACs."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def one_recurrent_layer(inputs: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of one recurrent layer on (T, B, I): T B MACs for each of its weights."""
    return 2 * prod(inputs[:-1]) * (prod(input_weight) + prod(hidden_weight))


def recurrent_layers(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Count the FLOPs of all recurrent layers and directions: every matrix at every position.

    Args:
        inputs: Shape (T, B, I), or (positions, I) for a packed sequence.
        weights: Shapes of all weights; biases, of one dimension, count nothing.
    """
    return 2 * prod(inputs[:-1]) * sum(prod(w) for w in weights if len(w) > 1)


def distances(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Count the FLOPs of the distances from (B, P, M) to (B, R, M), each to each: B P R M MACs, one per squared difference."""
    return 2 * joint_size(first[:-2], second[:-2]) * first[-2] * second[-2] * first[-1]


def joint_size(*shapes: Shape) -> int:
    """Return the number of values after broadcasting tensors of these shapes together."""
    return int(prod(torch.broadcast_shapes(*shapes)))  # type: ignore[no-untyped-call]


def rules() -> dict[Any, Callable[..., int]]:
    """Return operation -> function of its FLOPs, for operations that torch's counter lacks and that this torch has."""
    by_name: Mapping[str, Callable[..., int]] = {
        "mv": matrix_vector,
        "addmv": added_matrix_vector,
        "dot": inner,
        "vdot": inner,
        "_int_mm": matrix,
        "_addmm_activation": added_matrix,
        "addbmm": added_matrix,
        "_grouped_mm": grouped_matrix,
        "_scaled_grouped_mm": grouped_matrix,
        "_trilinear": trilinear,
        "_scaled_dot_product_attention_math_for_mps": attention,
        "_scaled_dot_product_fused_attention_overrideable": attention,
        "_cdist_forward": distances,
        "_euclidean_dist": distances,
        "mkldnn_rnn_layer": one_recurrent_layer,
        "_cudnn_rnn": recurrent_layers,
        "miopen_rnn": recurrent_layers,
    }
    return {getattr(torch.ops.aten, name): rule for name, rule in by_name.items() if hasattr(torch.ops.aten, name)}


#: Functions that torch takes apart into products element by element, before its counter sees them -> their MACs.
TAKEN_APART: Mapping[str, Callable[..., int]] = {
    "linalg_vecdot": lambda result, x, y, *_, **__: joint_size(x.shape, y.shape),
    **dict.fromkeys(("outer", "ger", "kron"), lambda result, *_, **__: result.numel()),
}


# --- counting ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of one module without its submodules.

    Attributes:
        macs: Multiply-accumulates.
        made: Bytes of new memory that operations returned.
        calls: Number of its runs.
        shape: Shape of the first tensor of its last output; None if it gave none.
    """

    macs: int = 0
    made: int = 0
    calls: int = 0
    shape: tuple[int, ...] | None = None


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record of the memory that operations return, and of operations that may multiply and have no counting rule.

    A view or an operation in place makes none. What a kernel needs inside itself is not seen.

    Attributes:
        made: Bytes made so far.
        peak: The most bytes held at once.
        uncounted: Operations without a rule that may well multiply.
    """

    def __init__(self, counted: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = self.peak = self._held = 0
        self.uncounted: dict[str, None] = {}
        self._counted = counted
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note_operation(func)
        given = {id(s) for x in tree_leaves((args, kwargs)) if (s := _storage(x)) is not None}
        for x in tree_leaves(result):
            storage = _storage(x)
            if storage is not None and id(storage) not in given and id(storage) not in self._alive:
                self._take(storage)
        return result

    def _take(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def let_go(_: Any) -> None:
            self._held -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, let_go)
        self.made += size
        self._held += size
        self.peak = max(self.peak, self._held)

    def _note_operation(self, func: Any) -> None:
        packet = getattr(func, "_overloadpacket", func)
        namespace = getattr(func, "namespace", "")
        if packet not in self._counted and (namespace not in ("aten", "prim", "prims") or HEAVY.search(packet.__name__)):
            self.uncounted[f"{namespace}::{packet.__name__}"] = None


class Products(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Counter of the MACs of the functions in `TAKEN_APART`.

    Attributes:
        macs: Of all of them so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if rule := TAKEN_APART.get(getattr(func, "__name__", "")):
            self.macs += rule(result, *args, **(kwargs or {}))
        return result


def _storage(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return None
    try:
        return x.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return None


@contextmanager
def followed(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call two functions before and after every module's forward, by torch's global hooks; the model gets no hook."""
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, Tally], int, tuple[str, ...]]:
    """Run a model once, and count MACs and new memory module by module.

    What runs in a module that is not in `named_modules()` counts for the module that called it.

    Args:
        model: The model, in the mode that it is to run in.
        inputs: Its positional arguments.

    Returns:
        Module name -> its own share, without its submodules'; the shares of all add up to the whole. The most bytes held at
        once. The operations that may multiply and have no rule.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tallies = {name: Tally() for name in names.values()}
    counter = FlopCounterMode(display=False, custom_mapping=rules())
    memory, products = Memory(counter.flop_registry), Products()
    stack: list[tuple[int, int]] = []  # of each module under way: what had been counted of the others when it began

    def counted() -> tuple[int, int]:
        return counter.get_total_flops() // 2 + products.macs, memory.made

    def enter(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            stack.append(counted())

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if id(module) not in names:
            return
        now, others = counted(), stack.pop()
        macs, made = now[0] - others[0], now[1] - others[1]
        tally = tallies[names[id(module)]]
        shapes = [tuple(x.shape) for x in tree_leaves(output) if isinstance(x, Tensor)]
        tally.macs += macs
        tally.made += made
        tally.calls += 1
        tally.shape = shapes[0] if shapes else tally.shape
        stack[:] = [(m + macs, b + made) for m, b in stack]

    with without_fast_path(), products, memory, counter, followed(enter, leave):
        model(*inputs)
    return tallies, memory.peak, tuple(memory.uncounted)
