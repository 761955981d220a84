"""Cost of a model: parameters, MACs, memory and file size, layer by layer and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterai.analyze.counting import Tally, count
from fasterai.core.files import untied
from fasterai.display import (
    QUIET,
    SERIES,
    SMALL,
    Brief,
    Shown,
    Table,
    as_percent,
    dress,
    legend_above,
    new_axes,
    of_batch,
    short,
    short_bytes,
    styled,
)
from fasterai.model.inputs import positional, sample_count
from fasterai.model.names import unwrap
from fasterai.model.running import at_rest, copies
from fasterai.model.supported import check_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Cost", "LayerCost", "cost", "file_size"]

MOST_BARS, LEAST_BAR = 40, 0.001


@dataclass(frozen=True, repr=False)
class LayerCost(Brief):
    """Cost of one module without its submodules, which have rows of their own.

    Attributes:
        name: Its name in `model.named_modules()`; empty for the model itself.
        kind: Its class.
        parameters: Number of parameters it holds; a shared one counts where it stands first.
        nonzero: Number of them that are not zero.
        macs: Multiply-accumulates, over all its calls.
        activation_bytes: Memory that its operations returned.
        output_shape: Shape of its last output, the first tensor of it; None if it was not called or gave none.
        calls: Number of its calls.
        file_bytes: Bytes of its parameters and buffers in the file; a shared one counts where it stands first. The file has
            a head with their names on top.
    """

    name: str
    kind: str
    parameters: int
    nonzero: int
    macs: int
    activation_bytes: int
    output_shape: tuple[int, ...] | None
    calls: int
    file_bytes: int = 0


@dataclass(frozen=True, repr=False)
class Cost(Shown):
    """Cost of one forward pass of a model on the given inputs; `print` shows a table.

    Attributes:
        parameters: Number of parameters, shared ones once.
        nonzero: Number of them that are not zero.
        macs: Multiply-accumulates of matrix products and convolutions, for the whole batch of the inputs.
        activation_bytes: Memory that all operations returned.
        peak_bytes: The most of it that was held at once; inputs, weights, and what kernels need inside themselves not counted.
        weight_bytes: Memory of the parameters.
        buffers: Number of values in the buffers.
        buffer_bytes: Memory of the buffers.
        file_bytes: Length of the state dict as a safetensors file.
        layers: The modules that hold or do something, in the order of `named_modules()`; their shares add up to the whole.
        uncounted: Operations that may multiply and that no rule counts; `register_flop_formula` of torch adds one.
        batch_size: Number of samples in the inputs, which MACs and activations are of; None if they hold none.
    """

    parameters: int
    nonzero: int
    macs: int
    activation_bytes: int
    peak_bytes: int
    weight_bytes: int
    buffers: int
    buffer_bytes: int
    file_bytes: int
    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...] = ()
    batch_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def _line(self) -> str:
        macs = f"{short(self.macs)} MACs{of_batch(self.batch_size)}"
        return f"<Cost: {short(self.parameters)} parameters, {macs}, file {short_bytes(self.file_bytes)}>"

    def _parts(self) -> Iterator[Table | str]:
        header = ("layer", "kind", "output", "parameters", "non-zero", "MACs", "file", "activations")
        rows = [row for row in self.layers if row.parameters or row.macs]
        body = [(r.name or "(model)", r.kind, _shape(r), *_figures(r)) for r in rows]
        if rest := [row for row in self.layers if row not in rows]:
            memory = [short_bytes(sum(getattr(row, field) for row in rest)) for field in ("file_bytes", "activation_bytes")]
            body.append((f"{len(rest)} others", "", "", "0", "0", "0", *memory))
        body.append(("whole model", "", "", *_figures(self)))
        yield Table(header, body, left=3, foot=1)
        yield (
            f"weights {short_bytes(self.weight_bytes)}, buffers {short_bytes(self.buffer_bytes)}, "
            f"file {short_bytes(self.file_bytes)}, activations at most {short_bytes(self.peak_bytes)} at once"
        )
        if self.batch_size is not None:
            yield f"MACs and activations{of_batch(self.batch_size)}"
        if self.uncounted:
            yield f"not counted, without a rule: {', '.join(self.uncounted)}"

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the MACs and parameters of each layer as shares of the whole; at most the costliest layers, none below 0.1 %.

        Args:
            ax: Where to draw; a new figure if it is left out.
        """
        rows = [row for row in self.layers if row.parameters or row.macs]
        weight = {row.name: max(_share(row.macs, self.macs), _share(row.parameters, self.parameters)) for row in rows}
        costliest = sorted((name for name in weight if weight[name] >= LEAST_BAR), key=lambda name: -weight[name])[:MOST_BARS]
        shown = [row for row in rows if row.name in costliest]
        axes = new_axes(8.0, 1.6 + 0.32 * len(shown)) if ax is None else ax
        for place, row in enumerate(shown):
            macs, parameters = _share(row.macs, self.macs), _share(row.parameters, self.parameters)
            axes.barh(place - 0.19, macs, height=0.36, color=SERIES[2], label="MACs" if not place else None)
            axes.barh(place + 0.19, parameters, height=0.36, color=SERIES[0], label="parameters" if not place else None)
            text = f"{short(row.macs)} MACs, {short(row.parameters)} parameters"
            axes.text(max(macs, parameters), place, "  " + text, va="center", color=QUIET, fontsize=SMALL)
        axes.set_yticks(range(len(shown)), [row.name or "(model)" for row in shown])
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="share of the whole model")
        axes.set_xlim(0, 1.8 * max([*weight.values(), 0.01]))
        axes.xaxis.set_major_formatter(as_percent)
        left_out = f"{len(rows) - len(shown)} cheaper layers not shown" if len(shown) < len(rows) else ""
        title = f"{short(self.macs)} MACs{of_batch(self.batch_size)}, {short(self.parameters)} parameters"
        dress(axes, title, grid="x", below=left_out or " ")
        if shown:
            legend_above(axes)
        return axes


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count the cost of one forward pass of a model, in eval mode and without gradients.

    MACs are those of matrix products, convolutions, attention and recurrent layers, half of what `torch.utils.flop_counter`
    counts; additions of biases, norms, activations and pooling count nothing. For it, transformer layers run module by module
    and not as one fused operation. Modes, buffers, random generators and inputs stay as they were, and no hook is put on the
    model.

    Args:
        model: The model, wrapped by DDP or compiled or not.
        example_inputs: A tensor, or a tuple or list of positional arguments, on the model's device; their batch is counted.

    Raises:
        TypeError: `model` is no module.
        ValueError: The model does not run on these inputs, or its parameters hold no values yet.

    >>> cost(nn.Linear(4, 3), torch.zeros(2, 4)).macs
    24
    """
    model = unwrap(check_model(model, holds_values=True))
    inputs = copies(positional(example_inputs))
    with at_rest(model):
        try:
            tallies, peak, uncounted = count(model, inputs)
        except Exception as error:
            raise ValueError(f"example_inputs must be arguments that the model runs on, got an error: {error}") from error
    tensors = _stored(model)
    layers = _layers(model, tallies, tensors)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return Cost(
        parameters=sum(row.parameters for row in layers),
        nonzero=sum(row.nonzero for row in layers),
        macs=sum(row.macs for row in layers),
        activation_bytes=sum(row.activation_bytes for row in layers),
        peak_bytes=peak,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        buffers=sum(b.numel() for b in buffers),
        buffer_bytes=sum(b.numel() * b.element_size() for b in buffers),
        file_bytes=_length(tensors),
        layers=layers,
        uncounted=uncounted,
        batch_size=sample_count(inputs) or None,
    )


def _layers(model: nn.Module, tallies: Mapping[str, Tally], tensors: Mapping[str, Tensor]) -> tuple[LayerCost, ...]:
    stored: Counter[str] = Counter()
    for name, tensor in tensors.items():
        stored[name.rpartition(".")[0]] += tensor.numel() * tensor.element_size()
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = [p.detach() for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(id(p) for p in module._parameters.values())
        tally = tallies[name]
        if own or tally.macs or tally.made or stored[name]:
            held, nonzero = sum(p.numel() for p in own), sum(int(torch.count_nonzero(p)) for p in own)
            kind = type(module).__name__
            rows.append(LayerCost(name, kind, held, nonzero, tally.macs, tally.made, tally.shape, tally.calls, stored[name]))
    return tuple(rows)


def file_size(model: nn.Module) -> int:
    """Return the size in bytes of the model's state dict as a safetensors file; a tensor under two names is stored once."""
    return _length(_stored(unwrap(model)))


def _length(tensors: dict[str, Tensor]) -> int:
    from safetensors.torch import save

    return len(save(tensors))


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a safetensors file of the model holds, by name."""
    return untied({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)})


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _shape(row: LayerCost) -> str:
    return "" if row.output_shape is None else "x".join(map(str, row.output_shape))


def _figures(one: LayerCost | Cost) -> tuple[str, ...]:
    counts = (f"{one.parameters:,}", f"{one.nonzero:,}", f"{one.macs:,}")
    return (*counts, short_bytes(one.file_bytes), short_bytes(one.activation_bytes))
