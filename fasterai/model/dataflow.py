"""A forward pass as steps: each operation with the tensors that it reads. `norms.py` finds norms and outputs in them.

Steps come from three places, since none shows everything:

- autograd's graph of one run shows changes in place, also those through views, and the inside of attention; it misses readers
  that need no gradient;
- the functions that one run calls show all readers, also of buffers and of detached tensors, and the tensors that the model
  keeps; attention is a single call;
- a torch.fx graph, of a symbolic trace or of an export, needs no run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = ["HELD", "LAYERS", "LAYER_TYPES", "VIEWS", "Step", "from_autograd", "from_calls", "from_graph", "from_symbols"]
__all__ += ["held_by", "leaves", "own_tensors"]

HELD = "held"
LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear)
#: The functions that these call.
LAYERS = frozenset({"linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))})
#: Operations that show a tensor or parts of it as they stand, in another shape or type, so that zeros in it stay zeros; their
#: names without leading underscores.
VIEWS = frozenset(
    (
        *("alias", "as_strided", "chunk", "clone", "contiguous", "copy", "detach", "dropout", "expand", "flatten", "mT"),
        *("movedim", "numpy_T", "permute", "repeat", "reshape", "reshape_alias", "select", "slice", "split", "squeeze"),
        *("split_with_sizes", "swapaxes", "swapdims", "t", "tensor_split", "to", "to_copy", "transpose", "unbind"),
        *("unflatten", "unsafe_split", "unsafe_view", "unsqueeze", "view"),
    )
)
# What a tensor can be asked without its values being read.
METADATA = frozenset(
    (
        *("__len__", "device", "dim", "dtype", "element_size", "get_device", "is_complex", "is_contiguous", "is_cpu"),
        *("is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_quantized", "is_sparse", "layout", "ndim", "nelement"),
        *("ndimension", "numel", "requires_grad", "shape", "size", "storage_offset", "stride"),
    )
)


@dataclass(eq=False)
class Step:
    """An operation of a forward pass, an input of the model, or one of the model's own tensors.

    Attributes:
        operation: Its name, such as `conv2d`; "" of an input, `HELD` of a parameter or buffer.
        arguments: The steps whose results it reads, in order; None for one left out.
        name: The name of the parameter or buffer, or of the layer or batch norm that the step is a call of; else None.
        dims: The number of dimensions of its result, None if it is not known.
        readers: The operations that read its result; in steps from autograd some are missing.
        stays: True if its result outlives the forward pass, as an output or kept by the model.
    """

    operation: str = ""
    arguments: tuple[Step | None, ...] = ()
    name: str | None = None
    dims: int | None = None
    readers: list[str] = field(default_factory=list)
    stays: bool = False

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if argument is not None:
                argument.readers.append(self.operation)


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List the parameters and buffers of a module itself, without those of its sub-modules, as (attribute, tensor)."""
    own = chain(module._parameters.items(), module._buffers.items())
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers in each place that holds them, as (name, tensor).

    A tensor that two modules share is yielded twice; a module that has several names is visited once.
    """
    for prefix, module in model.named_modules():
        yield from ((f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in own_tensors(module))


def held_by(model: nn.Module) -> dict[int, Step]:
    """Return a step for each parameter and buffer of a model: its `id` -> the step, under the tensor's first name."""
    return {id(x): Step(HELD, name=name, dims=x.dim()) for name, x in reversed(list(_places(model)))}


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """Make stand-ins for a model's tensors, by name, for `functional_call(..., tie_weights=False)`.

    A parameter's stand-in is a new leaf that shares its memory, a buffer's is a copy. A tensor that is held in several places
    has one stand-in for all of them.
    """
    held: dict[int, Tensor] = {}
    for _, tensor in _places(model):
        stand = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()
        is_trained = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        held.setdefault(id(tensor), stand.requires_grad_() if is_trained else stand)
    return {name: held[id(tensor)] for name, tensor in _places(model)}


def from_autograd(model: nn.Module, inputs: tuple[Any, ...], part: nn.Module | None = None) -> list[Step]:
    """Run the model once in eval mode, on stand-ins for its tensors; `norms.watch` explains the arguments."""
    model = unwrap(model)
    stands = leaves(model)
    with undisturbed(model), evaluating(model), torch.enable_grad():
        try:
            output = torch.func.functional_call(model, stands, inputs, tie_weights=False)
        except Exception as error:
            raise ValueError(f"example_inputs must be arguments that the model runs on, got an error: {error}") from error
    roots = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    if not roots:
        raise ValueError("example_inputs must give outputs that depend on the parameters, got outputs without a graph")
    inner = unwrap(part) if part is not None else model
    own = {id(parameter): plain_name(name) for name, parameter in inner.named_parameters()}
    names = {id(stands[n]): (own.get(id(p), f"outside of the part: {n}"), p.dim()) for n, p in model.named_parameters()}
    steps = _backwards(roots, {i: Step(HELD, name=name, dims=dims) for i, (name, dims) in names.items()})
    for root in roots:
        steps[root].stays = True
    return list(steps.values())


def _backwards(roots: list[Any], held: Mapping[int, Step]) -> dict[Any, Step]:
    """Make a step of each node of autograd's graph, starting from the outputs."""
    steps: dict[Any, Step] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in steps:
            steps[node] = held.get(id(getattr(node, "variable", None))) or Step(_derived(node))
            stack += [n for n, _ in node.next_functions if n is not None]
    for node, step in steps.items():
        step.arguments = tuple(steps.get(n) for n, _ in node.next_functions)
    return steps


def _derived(node: Any) -> str:
    """Name the operation whose derivative a node computes: `split_with_sizes` for `SplitWithSizesBackward0`."""
    name = re.sub(r"Backwards?\d*$", "", node.name().rpartition("::")[2])
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class _Calls(TorchFunctionMode):
    """A recorder of function calls, each as a step; it keeps no tensor alive that the model drops."""

    def __init__(self, model: nn.Module, held: Mapping[int, Step]) -> None:
        super().__init__()
        self.held, self.names = held, {module: name for name, module in model.named_modules()}
        layers = [m for m in reversed(self.names) if isinstance(m, LAYER_TYPES)]
        parts = [[self.held[id(p)] for n, p in own_tensors(m) if n in ("weight", "bias")] for m in layers]
        self.layers = {tuple(part): self.names[m] for part, m in zip(parts, layers, strict=True)}
        self.steps: list[Step] = []
        self.made: MutableMapping[Tensor, Step] = WeakTensorKeyDictionary()
        self.norm: str | None = None
        self.under_way = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        self.under_way += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.under_way -= 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
        if name not in METADATA:
            self.note(name, (args, kwargs), result)
        return result

    def note(self, operation: str, read: Any, result: Any) -> None:
        """Add a step that read some tensors and made others; a tensor made by no step is an input of the model."""
        arguments = tuple(self.held.get(id(x)) or self.made.setdefault(x, Step()) for x in _tensors(read))
        step = Step(operation, arguments, self.layers.get(arguments[1:]) if operation in LAYERS else None)
        if operation == "batch_norm":
            step.name, self.norm = self.norm, None
        self.steps.append(step)
        for tensor in _tensors(result):
            self.made[tensor], step.dims = step, tensor.dim()

    def enter(self, norm: nn.Module, _: Any) -> None:
        """Note, as a hook before a batch norm runs, the module that the next call of a batch norm belongs to."""
        self.norm = self.names[norm]


class _Unseen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recorder of the operations that no function call shows: those of a compiled script."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = self.calls.run(func, args, kwargs)  # which is one of torch's own functions as well
        if not self.calls.under_way:
            self.calls.note(str(func), (args, kwargs), result)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def from_calls(probe: nn.Module, inputs: tuple[Any, ...], held: Mapping[int, Step]) -> tuple[list[Step], Any]:
    """Run a model once in its present mode, and return the steps and its output.

    Changes that the forward pass makes to the model, such as running statistics, are not undone.
    """
    calls = _Calls(probe, held)
    try:
        with torch.no_grad(), ExitStack() as stack:
            for norm in (module for module in probe.modules() if isinstance(module, _BatchNorm)):
                stack.enter_context(norm.register_forward_pre_hook(calls.enter))
            stack.enter_context(calls)
            stack.enter_context(_Unseen(calls))
            output = probe(*inputs)
    except Exception as error:
        raise ValueError(f"example_inputs must be arguments that the model runs on, got an error: {error}") from error
    for step in calls.made.values():  # whatever still lives: the outputs, and what the model keeps
        step.stays = True
    return calls.steps, output


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYER_TYPES, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def from_symbols(probe: nn.Module, held: Mapping[int, Step]) -> list[Step]:
    """Follow a model's forward pass symbolically, in its present mode and for all inputs at once."""
    try:
        graph = _Tracer().trace(probe)
    except Exception as error:
        raise ValueError(
            "example_inputs must be given for a model whose forward pass cannot be followed without them, got None "
            f"(a tensor or tuple that the model runs on; tracing says: {str(error).splitlines()[0]})"
        ) from error
    tensors = {node: id(attrgetter(str(node.target))(probe)) for node in graph.nodes if node.op == "get_attr"}
    modules = {n: (m, [held[id(x)] for _, x in own_tensors(m)]) for n, m in probe.named_modules()}
    return from_graph(graph, {node: held[i] for node, i in tensors.items() if i in held}, modules)


def from_graph(
    graph: fx.Graph, held: Mapping[fx.Node, Step], modules: Mapping[str, tuple[nn.Module, list[Step]]] | None = None
) -> list[Step]:
    """Make a step of each node of a torch.fx graph.

    Args:
        graph: The graph of a symbolic trace or of an export.
        held: Node -> the step of the parameter or buffer that the node stands for.
        modules: Name of a module that the graph may call -> the module and the steps of its own tensors.
    """
    made = dict(held)
    for node in graph.nodes:
        if node in held:
            continue
        asked = node.args[1] if node.target is getattr else node.target
        name, operation, own = None, str(getattr(asked, "__name__", asked)).partition(".")[0], list[Step]()
        if node.op == "placeholder":
            operation = ""
        elif node.op == "call_module":
            name = str(node.target)
            module, own = (modules or {})[name]
            operation = "batch_norm" if isinstance(module, _BatchNorm) else type(module).__name__
        read = [] if operation in METADATA else tree_leaves((node.args, node.kwargs))
        arguments = [made.get(a) if isinstance(a, fx.Node) else None for a in read if a is None or isinstance(a, fx.Node)]
        made[node] = Step(operation, (*arguments, *own), name)
    return list(made.values())
