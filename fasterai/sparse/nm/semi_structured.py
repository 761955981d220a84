"""`to_semi_structured`: torch's 2:4 kernels on CUDA, for the Linear layers that they make faster, each checked and timed.

Every choice is made by `convert_layers`, which knows no device: it is given how a weight is converted and how a call is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.core.checks import check_count, check_number
from fasterai.display import Brief, Shown, Table, counted, short_time
from fasterai.model.names import unwrap
from fasterai.sparse.goal import check_sources

__all__ = ["SemiLayer", "SemiStructured", "convert_layers", "to_semi_structured"]

#: Types of weights that the kernels know, with the fewest rows and columns, of which both have to be multiples.
LEAST: Mapping[torch.dtype, int] = {torch.float16: 64, torch.bfloat16: 64}
CAPABILITY = (8, 0)
CALLS = 20  # in one timing; the least of three counts
Convert = Callable[[Tensor], Tensor]
Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, repr=False)
class SemiLayer(Brief):
    """One Linear layer.

    Attributes:
        name: Its name.
        dense: Seconds of a call with the masked weights; 0 where it was not timed.
        sparse: Seconds of a call with the converted ones; 0 likewise.
        kept_dense: Why it was left as it is; empty if it was converted.
    """

    name: str
    dense: float = 0.0
    sparse: float = 0.0
    kept_dense: str = ""


@dataclass(frozen=True, repr=False)
class SemiStructured(Shown):
    """The copy of a network with converted layers, and what was measured.

    Attributes:
        model: The copy, for inference.
        layers: All Linear layers.
    """

    model: nn.Module
    layers: tuple[SemiLayer, ...]

    @property
    def converted(self) -> list[str]:
        """The names of the converted layers."""
        return [layer.name for layer in self.layers if not layer.kept_dense]

    def _line(self) -> str:
        return f"<SemiStructured: {len(self.converted)} of {counted(len(self.layers), 'Linear layer')} on 2:4 kernels>"

    def _parts(self) -> Iterator[Table | str]:
        body = [
            (x.name, *(short_time(t) if t else "" for t in (x.dense, x.sparse)), x.kept_dense or "2:4 kernel")
            for x in self.layers
        ]
        yield Table(("layer", "dense", "2:4", "now"), body)


def to_semi_structured(model: nn.Module, *, rows: int = 1024, tolerance: float = 1e-2) -> SemiStructured:
    """Copy a 2:4 sparse network on a CUDA device, with the Linear layers on torch's 2:4 kernels that they make faster.

    A layer is converted if two of every four of its weights are zero, its type and shape are those of the kernels, its outputs
    stay the same, and it was measured to be faster. The given model is unchanged.

    Args:
        model: The network, on a CUDA device, in float16 or bfloat16.
        rows: The rows that layers are timed with: samples, or samples times tokens.
        tolerance: The largest difference of an output, as a share of the largest output, at least 0.

    Raises:
        ValueError: The model is not on a CUDA device of capability 8.0 or more, or a setting is out of range.
    """
    check_sources(model, None, None)
    check_count("rows", rows)
    check_number("tolerance", tolerance, at_least=0.0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < CAPABILITY:
        got = device.type if capability is None else f"one of capability {capability[0]}.{capability[1]}"
        raise ValueError(
            f"model must be on a CUDA device of capability 8.0 or more, got {got}: torch has 2:4 kernels nowhere else; go on "
            "with the masked weights, which give the same outputs, or call model.cuda().half() where there is such a device"
        )
    return convert_layers(model, rows, tolerance, torch.sparse.to_sparse_semi_structured, _seconds_on_cuda)


@torch.no_grad()
def convert_layers(model: nn.Module, rows: int, tolerance: float, convert: Convert, seconds: Seconds) -> SemiStructured:
    """Copy a network with the Linear layers converted that keep their outputs and get faster.

    Args:
        model: The network; unchanged.
        rows: The rows that layers are timed with.
        tolerance: The largest difference of an output, as a share of the largest.
        convert: Makes the 2:4 weight of a masked one.
        seconds: Times a call.
    """
    made = copy.deepcopy(unwrap(model))
    found = []
    for name, module in made.named_modules():
        if type(module) is nn.Linear:
            layer, weight = _try_layer(name, module, rows, tolerance, convert, seconds)
            found.append(layer)
            if weight is not None:
                module.weight = nn.Parameter(weight, requires_grad=False)
    return SemiStructured(made, tuple(found))


def _try_layer(
    name: str, module: nn.Linear, rows: int, tolerance: float, convert: Convert, seconds: Seconds
) -> tuple[SemiLayer, Tensor | None]:
    weight = module.weight.detach()
    misfit = _misfit(weight)
    if misfit:
        return SemiLayer(name, kept_dense=misfit), None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight)
    converted = convert(weight.contiguous())
    wanted = F.linear(x, weight, module.bias)
    off = float((F.linear(x, converted, module.bias) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not off <= tolerance:
        return SemiLayer(name, kept_dense=f"its outputs would be {off:.1%} off"), None
    dense = seconds(lambda: F.linear(x, weight, module.bias))
    sparse = seconds(lambda: F.linear(x, converted, module.bias))
    if sparse >= dense:
        return SemiLayer(name, dense, sparse, "no faster"), None
    return SemiLayer(name, dense, sparse), converted


def _misfit(weight: Tensor) -> str:
    """Return why a weight cannot be converted; empty if it can."""
    least = LEAST.get(weight.dtype)
    if least is None:
        return f"{str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if weight.shape[0] % least or weight.shape[1] % least:
        return f"{weight.shape[0]} x {weight.shape[1]}, not multiples of {least}"
    full = int((weight.reshape(len(weight), -1, 4) != 0).sum(-1).max())
    return f"{full} of four weights are not zero" if full > 2 else ""


def _seconds_on_cuda(call: Callable[[], Any]) -> float:
    """Time a call on the present CUDA device: the least mean of three rounds."""
    import time

    found = []
    for _ in range(4):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / CALLS)
    return min(found[1:])
