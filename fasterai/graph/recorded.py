"""Operations of a network, recorded from runs on concrete values, where `torch.export` refuses it or shows too little.

What a run does not show is the way that other values would take. So it is recorded on several inputs, those that read values
of tensors say so (`Recording.reads_values`), and the parameters that no run has met are told (`exported.Exported.unread`).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fasterai.graph.inputs import input_names
from fasterai.model.exporting import exporting
from fasterai.model.names import plain_name
from fasterai.model.running import at_rest, copies, in_mode, without_fast_path

__all__ = ["Recording", "recorded", "variations"]

#: How much larger the numbers of one variation are.
LARGE = 30.0
#: Functions by which values of a tensor leave torch without an operation.
LEAVING = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr})
#: Operations whose result depends on values in number or size, without a tag that says so.
READING = frozenset({"is_nonzero", "nonzero_numpy", "nms", "_pack_padded_sequence"})
#: Operations that only say that a tensor made of Python's numbers is new.
FRESH = frozenset({"lift_fresh", "lift_fresh_copy"})


@dataclass(frozen=True)
class Signature:
    """Placeholder -> name of its parameter."""

    inputs_to_parameters: Mapping[str, str]


@dataclass(frozen=True)
class Recording:
    """Operations of one run, in the form of an exported program.

    Attributes:
        graph: The operations, with `meta["val"]` and `meta["nn_module_stack"]`; placeholders are parameters, buffers, inputs,
            and constants.
        graph_signature: Which placeholders are parameters.
        names: Placeholder -> name of its parameter or buffer.
        inputs: Placeholder -> name of the input.
        reads_values: True if values of tensors were read: other values may take another way through the code.
    """

    graph: fx.Graph
    graph_signature: Signature
    names: Mapping[str, str]
    inputs: Mapping[str, str]
    reads_values: bool

    def form(self) -> tuple[Any, ...]:
        """Return what is the same in two runs that took the same way: each operation, its module and what it reads."""
        at = {node: i for i, node in enumerate(self.graph.nodes)}
        return tuple((str(n.target), _path(n), tuple(at[a] for a in n.all_input_nodes)) for n in self.graph.nodes)


def _path(node: fx.Node) -> str:
    return str(next(reversed(node.meta.get("nn_module_stack") or {"": None})))


def leaving(tensor: Any) -> None:
    """Note values of a tensor that leave torch's operations, as by `tolist`; a node's target."""


def seen(result: Any) -> None:
    """Note that code has seen a number, or a size, that depends on values; a node's target."""


def recorded(model: nn.Module, inputs: tuple[Any, ...], training: bool = False) -> list[Recording]:
    """Find the operations of runs on the inputs and, in eval mode, on others of their shapes; of equal runs the first.

    Args:
        model: The model; it is left as it was.
        inputs: Its positional arguments.
        training: True for one run in training mode.
    """
    found: dict[Any, Recording] = {}
    for i, given in enumerate(variations(inputs)):
        try:
            one = _record(model, given, training)
        except Exception:
            if i == 0:
                raise
            continue  # these values are not allowed
        found.setdefault(one.form(), one)
        if training or not one.reads_values:
            break
    return list(found.values())


def variations(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of the same shapes and other values: as they are, of the other sign, zeros, and large random numbers."""
    generator = torch.Generator().manual_seed(0)

    def large(x: Tensor) -> Tensor:
        return (torch.randn(x.shape, generator=generator) * LARGE).to(x.device, x.dtype)

    def varied(change: Callable[[Tensor], Tensor], whole: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        def of(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return change(x) if x.is_floating_point() else whole(x)

        result: tuple[Any, ...] = tree_map(of, inputs)
        return result

    yield inputs
    yield varied(torch.neg, lambda x: x.flip(-1) if x.dim() else x)
    yield varied(torch.zeros_like, lambda x: torch.full_like(x, x.min().item()) if x.numel() else x)
    yield varied(large, lambda x: torch.full_like(x, x.max().item()) if x.numel() else x)


def _record(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> Recording:
    recorder = _Recorder(model, inputs)
    with ExitStack() as stack:
        for context in (exporting(), at_rest(model), in_mode(model, training), without_fast_path(), _paths(model, recorder)):
            stack.enter_context(context)
        # Below autograd an operation such as `linear` comes as it was called, and not as what it is made of.
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        given = copies(inputs)
        recorder.enter(model, given)
        with recorder, _Leaving(recorder):
            result = model(*given)
    return recorder.finish(result)


@contextmanager
def _paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell a recorder which modules are being called, by hooks that stand on no module."""
    me, paths = threading.get_ident(), {id(module): name for name, module in model.named_modules()}

    def is_ours(module: nn.Module) -> bool:
        return threading.get_ident() == me and id(module) in paths

    def before(module: nn.Module, given: Any) -> None:
        if is_ours(module):
            recorder.stack.append((plain_name(paths[id(module)]), type(module)))

    def after(module: nn.Module, given: Any, result: Any) -> None:
        if is_ours(module):
            recorder.stack.pop()

    handles = hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Leaving(TorchFunctionMode):
    """Note the tensors whose values leave torch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LEAVING:
            self.recorder.leaves(args[0])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record of the operations of one run.

    Attributes:
        stack: The modules that are being called, as (path, class).
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[tuple[str, type]] = []
        self.graph = fx.Graph()
        self._names: dict[str, str] = {}
        self._inputs: dict[str, str] = {}
        self._parameters: dict[str, str] = {}
        self._input_names = input_names(model, inputs)
        self._nodes: Any = WeakTensorKeyDictionary()
        self._at: dict[Any, tuple[Any, fx.Node]] = {}  # where a tensor lies -> it, weakly, and its node
        self._held: list[Tensor] = []  # parameters, buffers, inputs and constants: what they are must not change
        self._read: list[fx.Node] = []
        self._thread = threading.get_ident()

    def enter(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Make placeholders of the model's parameters, buffers and inputs."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            node = self._placeholder(f"p_{name}".replace(".", "_"), tensor)
            self._names[node.name] = plain_name(name)
            if isinstance(tensor, nn.Parameter):
                self._parameters[node.name] = plain_name(name)
        for name, x in zip(self._input_names, tree_leaves(inputs), strict=True):
            if isinstance(x, Tensor):
                self._inputs[self._placeholder("x", x).name] = name

    def leaves(self, x: Tensor) -> None:
        """Note that values of a tensor leave torch."""
        self._read.append(self._call(leaving, (self._node(x),), {}, None))

    def finish(self, result: Any) -> Recording:
        """Return the record; what was read of values is used, as the outputs are."""
        outputs = [self._node(x) for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.graph.output(tuple(dict.fromkeys([*outputs, *self._read])))
        return Recording(self.graph, Signature(self._parameters), self._names, self._inputs, bool(self._read))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise NotImplementedError(f"{func} has operations of its own that a run does not show")
        result = func(*args, **kwargs)
        if threading.get_ident() != self._thread or func.namespace == "prim":
            return result
        if func._schema.name.partition("::")[2] not in FRESH:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        arguments, keywords = tree_map(self._argument, (tuple(args), dict(kwargs)))
        node = self._call(func, arguments, keywords, tree_map(_shown, result))
        if isinstance(result, list | tuple):
            for i, x in enumerate(result):
                if isinstance(x, Tensor):
                    self._note_tensor(x, self._call(operator.getitem, (node, i), {}, _shown(x)))
        elif isinstance(result, Tensor):
            self._note_tensor(result, node)
        if _reads_values(func, args):
            self._read.append(self._call(seen, (node,), {}, None))

    def _call(self, func: Any, args: Any, kwargs: Any, shown: Any) -> fx.Node:
        node = self.graph.call_function(func, args, kwargs)
        node.meta["val"] = shown
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self.stack}
        return node

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._node(x)
        return x if isinstance(x, fx.node.base_types) or x is None else str(x)

    def _node(self, x: Tensor) -> fx.Node:
        """Return the node of a tensor: its own, that of one in the same place, as `x.data` is, or a new constant's."""
        found = self._nodes.get(x)
        if found is None:
            held, node = self._at.get(_place(x), (None, None))
            found = node if held is not None and held() is not None else None
        return self._placeholder("constant", x) if found is None else found

    def _placeholder(self, name: str, x: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = _shown(x)
        self._held.append(x)
        self._note_tensor(x, node)
        return node

    def _note_tensor(self, x: Tensor, node: fx.Node) -> None:
        self._nodes[x] = node
        if (place := _place(x)) is not None:
            self._at[place] = (TensorWeakRef(x), node)


def _place(x: Tensor) -> tuple[Any, ...] | None:
    """Return where a tensor lies, and how; None if that tells nothing."""
    if x.layout is not torch.strided or not x.numel():
        return None
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _shown(x: Any) -> Any:
    """Return a tensor of the same shape without values; all else as it is."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def _reads_values(func: OpOverload, args: Any) -> bool:
    """Tell if an operation shows to code a number or a size that depends on the values of a tensor."""
    name = func._schema.name.partition("::")[2]
    if name == "index":
        return any(isinstance(at, Tensor) and at.dtype in (torch.bool, torch.uint8) for at in args[1])
    if name in ("where", "tensor_split"):
        return len(args) == 1 or (name == "tensor_split" and isinstance(args[1], Tensor))
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return name in READING or any(tag in func.tags for tag in tags)
