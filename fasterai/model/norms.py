"""Pairs of a layer and the norm that reads its output, found in the steps of a forward pass.

The order in which modules are registered says nothing about it, and is not used. Three users ask for three things:

- `watch`, for the sparsifier: the norms whose scale and shift become zero with the outputs of a weight;
- `norms_behind`, for the channel graph: the layers whose outputs are read by a norm alone;
- `read_folds`, for folding: the batch norms that can be folded into a layer, and the reasons for which others cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.model import dataflow
from fasterai.model.dataflow import HELD, LAYER_TYPES, LAYERS, VIEWS, Step, held_by, own_tensors

if TYPE_CHECKING:
    from fasterai.graph.exported import Exported

__all__ = ["Flow", "Norm", "norms_behind", "read_folds", "watch"]

# Operations that may read a parameter of two or more dimensions without mixing channels.
ELEMENTWISE = frozenset({"add", "sub", "rsub", "mul", "div", "pow", "where", "copy", "to_copy", "expand", "cat", "stack"})
BY_CHANNEL = frozenset({"batch_norm", "instance_norm"})
#: Batch norm -> how many dimensions what it reads must have.
DEMANDED = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def read_norms(steps: Iterable[Step]) -> Iterator[tuple[Step, Step]]:
    """Yield each call of a norm together with the step whose result it reads."""
    for step in steps:
        # Autograd and scripts have other names for batch norms: `native_batch_norm`, `cudnn_batch_norm`.
        if "batch_norm" in step.operation or step.operation in ("instance_norm", "group_norm", "layer_norm"):
            yield step, (step.arguments and step.arguments[0]) or Step()


def _held(step: Step | None) -> Step | None:
    """Find the parameter or buffer that a step is, or is a view of; None if it is neither."""
    while step is not None and step.operation.lstrip("_") in VIEWS:
        shown = [a for a in step.arguments if a is not None]
        step = shown[0] if len(shown) == 1 else None
    return step if step is not None and step.operation == HELD else None


def _weights(step: Step) -> list[str | None]:
    """List the names of the weights (of two or more dimensions) by which a step mixes channels; a cast is looked through."""
    while step.operation == "to_copy" and step.arguments[0] is not None:
        step = step.arguments[0]
    held = [] if step.operation in ELEMENTWISE else [_held(a) for a in step.arguments]
    return [h.name for h in held if h is not None and (h.dims or 0) > 1]


def _names(arguments: Iterable[Step | None]) -> list[str | None]:
    """List the names of the parameters and buffers that some steps are, or are views of; None for any other step."""
    return [None if (held := _held(a)) is None else held.name for a in arguments]


@dataclass(frozen=True)
class Flow:
    """The norms and the outputs of a model's weights, as one forward pass shows them.

    Attributes:
        norms: Weight name -> (scale, shift) names of the batch norms that read that weight's output and nothing else.
        outputs: Names of the weights that make an output of the model: no other weight comes between.
        inputs: Names of the weights that read an input of the model: no other weight comes before.
    """

    norms: Mapping[str, tuple[tuple[str | None, str | None], ...]]
    outputs: frozenset[str]
    inputs: frozenset[str] = field(default=frozenset(), compare=False)


def watch(model: nn.Module, inputs: tuple[Any, ...], part: nn.Module | None = None) -> Flow:
    """Run the model once and read the graph that autograd makes of it.

    Args:
        model: The model, wrapped or not; it stays as it is.
        inputs: Its positional arguments, on its device.
        part: A module of the model. Its parameters are called by their names in it, all others by names that are not used
            elsewhere.

    Raises:
        ValueError: The model does not run on these inputs, or its outputs depend on no parameter.
    """
    steps = dataflow.from_autograd(model, inputs, part)
    sources: dict[tuple[str | None, str | None], set[str | None]] = {}
    for norm, source in read_norms(steps):
        scale, shift = _names(norm.arguments[1:3])
        sources.setdefault((scale, shift), set()).update(_weights(source) or [None])
    norms: dict[str, tuple[tuple[str | None, str | None], ...]] = {}
    for names, (weight, *others) in sources.items():  # a norm that reads anything but one weight's output belongs to none
        if weight is not None and not others and names != (None, None):
            norms[weight] = (*norms.get(weight, ()), names)
    return Flow(norms, frozenset(_before(step for step in steps if step.stays)), frozenset(_inputs(steps)))


def _inputs(steps: Iterable[Step]) -> Iterator[str]:
    """Yield the weights that come first on every way from the inputs."""
    for step in steps:
        weights = [] if _held(step) else _weights(step)
        read = [a for a in step.arguments if a is not None and _held(a) is None]
        if weights and next(_before(read), None) is None:
            yield from filter(None, weights)


def _before(steps: Iterable[Step]) -> Iterator[str]:
    """Yield the first weight on every way back from some steps."""
    stack = list(steps)
    seen = set(stack)
    while stack:
        step = stack.pop()
        weights = _weights(step)
        yield from filter(None, weights)
        following = [a for a in step.arguments if not weights and a is not None and a not in seen and _held(a) is None]
        seen.update(following)
        stack += following


@dataclass(frozen=True)
class Norm:
    """A norm that alone reads the output of a layer.

    Attributes:
        layer: Names of the layer's weight and bias.
        scale: Name of the norm's weight.
        shift: Name of its bias.
        mean: Name of its running mean; None if it has none.
        is_by_channel: True if it treats each channel by itself, so that a channel of zeros becomes `shift` if the mean is zero.
    """

    layer: tuple[str, ...]
    scale: str
    shift: str
    mean: str | None
    is_by_channel: bool


def norms_behind(network: Exported) -> Iterator[Norm]:
    """Yield the norms that are the only readers of a layer; the layer's tensors have no other readers either.

    They are found in the export: it is at hand and knows all readers, which autograd's graph does not.
    """
    nodes = {node: network.names[node.name] for node in network.program.graph.nodes if node.name in network.names}
    steps = dataflow.from_graph(network.program.graph, {node: Step(HELD, name=name) for node, name in nodes.items()})
    for norm, source in read_norms(steps):
        layer = [a for a in source.arguments if a is not None and a.operation == HELD]
        scale, shift, mean = _names((*norm.arguments[1:4], None, None, None)[:3])
        if source.operation in LAYERS and all(len(read.readers) == 1 for read in (source, *layer)) and scale and shift:
            yield Norm(tuple(str(a.name) for a in layer), scale, shift, mean, norm.operation in BY_CHANNEL)


def read_folds(probe: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[dict[str, str], dict[str, str], Any]:
    """Find the batch norms that can be folded into the layer that they alone read.

    Args:
        probe: A copy of the model in eval mode; changes that its forward pass makes are not undone.
        inputs: Its positional arguments; None to follow it symbolically.

    Returns:
        Norm -> layer; norm -> the reason for which it cannot be folded; and the output on the inputs.

    Raises:
        ValueError: The model does not run on the inputs; or there are none, and it depends on values or shapes.
    """
    held, output = held_by(probe), None
    if inputs is None:
        steps = dataflow.from_symbols(probe, held)
    else:
        steps, output = dataflow.from_calls(probe, inputs, held)
    read = _Folds(probe, held, steps)
    whys = {name: read.why_not(name, norm) for name, norm in read.modules.items() if isinstance(norm, _BatchNorm)}
    layers = {norm: str(read.sources[norm].name) for norm, why in whys.items() if not why}
    return layers, {norm: why for norm, why in whys.items() if why}, output


class _Folds:
    """A model's modules and tensors, with the calls and readers that its forward pass shows."""

    def __init__(self, model: nn.Module, held: Mapping[int, Step], steps: list[Step]) -> None:
        self.held, self.modules = held, dict(model.named_modules())
        self.holders = Counter(id(tensor) for module in self.modules.values() for _, tensor in own_tensors(module))
        self.calls = Counter(step.name for step in steps)
        self.sources = {norm.name: source for norm, source in read_norms(steps)}

    def why_not(self, name: str, norm: _BatchNorm) -> str:
        """Return the reason for which a norm cannot be folded into a layer, "" if it can."""
        if why := _why_not_norm(norm) or self._why_not_called(name) or self._why_not_tensors(norm):
            return f"it {why}" if why.startswith("is called") else why
        source = self.sources[name]
        layer = None if source.name is None else self.modules.get(source.name)
        if not isinstance(layer, LAYER_TYPES):
            operation = f"the output of {source.operation}" if source.operation not in ("", HELD) else "an input of the model"
            return f"it reads {operation}, not that of a convolution or linear layer with a weight of its own"
        dims = source.dims or next((n for kind, n in DEMANDED.items() if isinstance(norm, kind)), None)
        why = self._why_not_called(str(source.name)) or _why_not_read(source) or _why_not_layer(layer, dims)
        if not why and (tied := self._why_not_tensors(layer)):
            why = f"cannot take it: {tied}"
        return f"{source.name} {why}" if why else ""

    def _why_not_called(self, name: str) -> str:
        return "" if self.calls[name] == 1 else f"is called {self.calls[name]} times"

    def _why_not_tensors(self, module: nn.Module) -> str:
        """Return the reason against changing a module's tensors: one of them is used elsewhere too; "" if none is."""
        for attribute, tensor in own_tensors(module):
            if self.holders[id(tensor)] > 1:
                return f"its {attribute} is shared with another module"
            if len(self.held[id(tensor)].readers) > 1:
                return f"its {attribute} is read elsewhere as well"
        return ""


def _why_not_norm(norm: _BatchNorm) -> str:
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"a {type(norm).__name__} may compute more than a batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return "it has hooks, which would be lost" if _hooked(norm) else ""


def _why_not_read(made: Step) -> str:
    others = [r for r in made.readers if r != "batch_norm"] + ["an output or a thing the model keeps"] * made.stays
    alone = len(made.readers) < 2 and not made.stays
    return "" if alone else f"has its output read by {', '.join(others) or 'two batch norms'} as well"


def _why_not_layer(layer: nn.Module, dims: int | None) -> str:
    usual = 2 + len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 2  # (N, C, *K) or (N, C)
    if _hooked(layer):
        return "has hooks, which would see another output"
    if dims is None:
        return "may have its features elsewhere than in dimension 1; example_inputs would show it"
    if dims != usual:
        return f"has an output of {dims} dimensions, whose dimension 1 is not that of its features"
    is_own = layer._parameters.get("bias") is None and not type(layer).__module__.startswith("torch.")
    return f"is a {type(layer).__name__} without bias, which may not read one" if is_own else ""


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)
