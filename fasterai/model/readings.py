"""Which batch norm reads which layer's output, and why one cannot be folded into it: by data flow, never by order.

Two readers with one answer: `watch_norms` runs the model once and sees every function that is called on a tensor;
`trace_norms` follows the forward pass symbolically, without inputs, where that is possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Reading", "trace_norms", "watch_norms"]

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
LAYER_CALLS = frozenset({"linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))})
# What a tensor can be asked without its values being read.
METADATA = frozenset(
    [
        *(
            "__len__",
            "device",
            "dim",
            "dtype",
            "element_size",
            "get_device",
            "is_complex",
            "is_contiguous",
            "is_cpu",
            "is_cuda",
        ),
        *("is_floating_point", "is_leaf", "is_meta", "is_quantized", "is_sparse", "layout", "ndim", "ndimension", "nelement"),
        *("numel", "requires_grad", "shape", "size", "storage_offset", "stride"),
    ]
)


@dataclass(frozen=True)
class Reading:
    """What a batch norm reads.

    Attributes:
        norm: Its name in the model.
        layer: The name of the layer whose output it alone reads, None if it cannot be folded into one.
        why: The reason if it cannot.
    """

    norm: str
    layer: str | None
    why: str = ""


@dataclass
class Made:
    """A tensor that the forward pass made.

    Attributes:
        operation: The function that made it.
        layer: The layer that made it, None if it was something else.
        dims: How many dimensions it has, None if that is not known.
        readers: The functions that read it.
        leaves: Whether it outlived the forward pass, as an output or kept by the model.
    """

    operation: str
    layer: str | None = None
    dims: int | None = None
    readers: list[str] = field(default_factory=list)
    leaves: bool = False


class Census:
    """What a model holds, by name, and what its forward pass did with it; both readers fill one in."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.norms = {n: m for n, m in self.modules.items() if isinstance(m, _BatchNorm)}
        self.layers = {n: m for n, m in self.modules.items() if isinstance(m, LAYERS)}
        self.holders = Counter(id(t) for m in self.modules.values() for _, t in _own_tensors(m))
        self.reads: Counter[int] = Counter()
        self.results: dict[str, list[Made]] = {n: [] for n in self.layers}
        self.sources: dict[str, list[Made]] = {n: [] for n in self.norms}

    def readings(self) -> list[Reading]:
        return [self._reading(name) for name in self.norms]

    def _reading(self, name: str) -> Reading:
        norm, sources = self.norms[name], self.sources[name]
        why = _why_not_norm(norm) or _called(len(sources)) or self._why_not_tensors(norm)
        if why:
            return Reading(name, None, why)
        (source,) = sources
        if source.layer is None:
            what = f"the output of {source.operation}" if source.operation else "an input of the model"
            return Reading(name, None, f"it reads {what}, not that of a convolution or linear layer with a weight of its own")
        why = self._why_not_layer(source.layer, source)
        return Reading(name, None, f"{source.layer} {why}") if why else Reading(name, source.layer)

    def _why_not_layer(self, name: str, made: Made) -> str:
        layer, why = self.layers[name], ""
        if len(self.results[name]) != 1:
            why = f"is called {len(self.results[name])} times"
        elif len(made.readers) > 1 or made.leaves:
            others = [r for r in made.readers if r != "batch_norm"] + ["an output or a thing the model keeps"] * made.leaves
            why = f"has its output read by {', '.join(others) or 'two batch norms'} as well"
        elif _hooked(layer):
            why = "has hooks, which would see another output"
        elif made.dims is None:
            why = "may have its features elsewhere than in dimension 1; example_inputs would show it"
        elif made.dims != _usual_dims(layer):
            why = f"has an output of {made.dims} dimensions, whose dimension 1 is not that of its features"
        elif layer.bias is None and not type(layer).__module__.startswith("torch."):
            why = f"is a {type(layer).__name__} without bias, which may not read one"
        elif tied := self._why_not_tensors(layer):
            why = f"cannot take it: {tied}"
        return why

    def _why_not_tensors(self, module: nn.Module) -> str:
        """A parameter or buffer that has other users would change for them too."""
        for attribute, tensor in _own_tensors(module):
            if self.holders[id(tensor)] > 1:
                return f"its {attribute} is shared with another module"
            if self.reads[id(tensor)] > 1:
                return f"its {attribute} is read elsewhere as well"
        return ""


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _usual_dims(layer: nn.Module) -> int:
    """The dimensions of a batched output: (N, C) of a linear layer, (N, C, *K) of a convolution."""
    return 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)  # type: ignore[arg-type]


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _why_not_norm(norm: _BatchNorm) -> str:
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"a {type(norm).__name__} may compute more than a batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return "it has hooks, which would be lost" if _hooked(norm) else ""


def _called(times: int) -> str:
    return "" if times == 1 else f"it is called {times} times"


class _Watch(TorchFunctionMode):
    """Notes which function makes and which ones read a tensor; holds none of them."""

    def __init__(self, census: Census) -> None:
        super().__init__()
        self.census = census
        self.made: MutableMapping[Tensor, Made] = WeakTensorKeyDictionary()
        self.norms_under_way: list[str] = []
        self.calls_under_way = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls_under_way += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.calls_under_way -= 1
        operation = _operation(func)
        if operation in METADATA:
            return result
        if operation == "batch_norm" and self.norms_under_way:
            source = self.made.get(args[0]) or Made("")
            self.census.sources[self.norms_under_way[-1]].append(source)
        self.note(operation, (args, kwargs), result)
        if operation in LAYER_CALLS and (layer := self._layer(*args, **kwargs)) is not None:
            self.made[result] = Made(operation, layer, result.dim())
            self.census.results[layer].append(self.made[result])
        return result

    def note(self, operation: str, read: Any, result: Any) -> None:
        for tensor in _tensors(read):
            self.census.reads[id(tensor)] += 1
            if tensor in self.made:
                self.made[tensor].readers.append(operation)
        for tensor in _tensors(result):
            self.made[tensor] = Made(operation)

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> str | None:
        """The layer that makes this call with its own weight and bias."""
        own = ((name, layer._parameters) for name, layer in self.census.layers.items())
        return next((name for name, held in own if held.get("weight") is weight and held.get("bias") is bias), None)

    def enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.norms_under_way.append(name)

    def leave(self, *_: Any) -> None:
        self.norms_under_way.pop()


class _Net(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what no function call shows: the operations of a compiled script."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.watch.calls_under_way += 1  # the call below is one of torch's own functions as well
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.watch.calls_under_way -= 1
        if not self.watch.calls_under_way:
            self.watch.note(str(func), (args, kwargs), result)
        return result


def _operation(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def watch_norms(probe: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Reading], Any]:
    """Run a model once in its present mode and see what its batch norms read.

    Args:
        probe: A copy of the model in eval mode: what its forward pass changes stays changed.
        inputs: Its positional arguments.

    Returns:
        What each norm reads, and the model's output.

    Raises:
        ValueError: The model does not run on these inputs.
    """
    census = Census(probe)
    watch = _Watch(census)
    try:
        with torch.no_grad():
            output = _run_watched(probe, inputs, census, watch)
    except Exception as error:
        raise ValueError(f"example_inputs must be arguments that the model runs on, got an error: {error}") from error
    for made in watch.made.values():  # whatever still lives: the outputs, and what the model keeps
        made.leaves = True
    return census.readings(), output


def _run_watched(probe: nn.Module, inputs: tuple[Any, ...], census: Census, watch: _Watch) -> Any:
    handles = []
    for name, norm in census.norms.items():
        handles += [norm.register_forward_pre_hook(watch.enter(name)), norm.register_forward_hook(watch.leave)]
    try:
        with watch, _Net(watch):
            return probe(*inputs)
    finally:
        for handle in handles:
            handle.remove()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def trace_norms(probe: nn.Module) -> list[Reading]:
    """Follow a model's forward pass symbolically, in its present mode and for all inputs at once.

    Raises:
        ValueError: It depends on values or shapes, so that inputs are needed.
    """
    census = Census(probe)
    try:
        graph = _Tracer().trace(probe)
    except Exception as error:
        raise ValueError(
            "example_inputs must be given for a model whose forward pass cannot be followed without them, got None "
            f"(a tensor or tuple that the model runs on; tracing says: {str(error).splitlines()[0]})"
        ) from error
    made: dict[fx.Node, Made] = {}
    for node in graph.nodes:
        made[node] = _made(node, census)
        for source in () if _asks_metadata(node) else node.all_input_nodes:
            made[source].readers.append(made[node].operation)
        if node.op == "get_attr":
            census.reads[id(_attribute(probe, node.target))] += 2  # beside the call of its own module
        elif node.op == "call_module" and node.target in census.norms:
            census.sources[node.target].append(made[node.all_input_nodes[0]] if node.all_input_nodes else Made(""))
    return census.readings()


def _asks_metadata(node: fx.Node) -> bool:
    attribute = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_function", "call_method") and attribute in METADATA


def _made(node: fx.Node, census: Census) -> Made:
    name = str(node.target)
    if node.op != "call_module":
        operation = "" if node.op == "placeholder" else getattr(node.target, "__name__", name)
        return Made(operation)
    if name in census.norms:
        return Made("batch_norm")
    if name not in census.layers:
        return Made(type(census.modules[name]).__name__)
    layer = census.layers[name]
    made = Made(type(layer).__name__, name, _dims(layer, node, census))
    census.results[name].append(made)
    return made


def _dims(layer: nn.Module, node: fx.Node, census: Census) -> int | None:
    """The dimensions of a convolution's output where its norm accepts no other number; else they are not known."""
    demanded = {nn.Conv2d: nn.BatchNorm2d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    demanded[nn.ConvTranspose3d] = nn.BatchNorm3d
    norms = [census.norms.get(str(user.target)) for user in node.users]
    fits = any(isinstance(layer, kind) and isinstance(norm, asked) for kind, asked in demanded.items() for norm in norms)
    return _usual_dims(layer) if fits else None


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
