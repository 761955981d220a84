"""Batch norms folded into the layers before them: the same function with fewer operations.

In eval mode a batch norm is a scale and a shift of each channel, so conv, then norm, is a conv:
`W' = W gamma / sqrt(var + eps)`, `b' = (b - mean) gamma / sqrt(var + eps) + beta`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from fasterai.core.checks import warn
from fasterai.misc.fates import Familiar, Fates
from fasterai.model.inputs import as_tuple
from fasterai.model.layouts import read_module
from fasterai.model.names import unwrap
from fasterai.model.norms import read_folds
from fasterai.model.outputs import check_same
from fasterai.model.running import evaluating, undisturbed

__all__ = ["BN_Folder", "FoldReport", "find_folds", "fold_batchnorms"]


@dataclass(frozen=True, repr=False)
class FoldReport(Fates):
    """The batch norms that can be folded, or were.

    Attributes:
        folded: Norm name -> name of the layer that takes it up.
        left: Norm name -> why it stays.
    """

    kind: ClassVar[str] = "norm"
    folded: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def _head(self) -> str:
        return f"{len(self.folded)} of {len(self.folded) + len(self.left)} batch norms fold"

    def _changed(self) -> Iterator[tuple[str, str]]:
        return ((norm, f"into {layer}") for norm, layer in self.folded.items())


def find_folds(model: nn.Module, example_inputs: Any = None) -> FoldReport:
    """Find the batch norms that `fold_batchnorms` would fold, and those that it would not and why; the model stays unchanged.

    Args:
        model: The model, wrapped or not.
        example_inputs: A tensor or tuple that the model runs on. Without it the forward pass is followed symbolically,
            where that is possible.

    Raises:
        ValueError: The model does not run on the inputs; or there are none and it cannot be followed without.
    """
    return _find(_inner(model), None if example_inputs is None else as_tuple(example_inputs))[0]


def fold_batchnorms(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Return a new model with every batch norm folded into the layer that it alone reads, where that is exact.

    Layers are convolutions, transposed convolutions and linear layers; a folded norm becomes `nn.Identity`. All others
    stay (`find_folds` says why). It computes what the model computes in eval mode, which is checked on the spot.

    Args:
        model: The model, wrapped or not; it stays as it is.
        example_inputs: A tensor or tuple that the model runs on. Without it the forward pass is followed symbolically,
            and instead of the whole model each folded layer is checked.

    Returns:
        The folded model, unwrapped, with the modes, dtypes, devices and frozen parameters of the given one.

    Raises:
        ValueError: The model does not run on the inputs; there are none and it cannot be followed without; or the
            outputs move by more than the rounding of their type allows (1e-5 of their scale in float32).
    """
    folder = BN_Folder()
    return folder.fold(model, example_inputs)


class BN_Folder(Familiar):  # noqa: N801 - its familiar name
    """Folds batch norms as `fold_batchnorms` does, and keeps the report of the last fold as `.report`."""

    def __init__(self) -> None:
        self.report = FoldReport()

    def fold(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Fold as `fold_batchnorms` does, and keep the report."""
        model, inputs = _inner(model), None if example_inputs is None else as_tuple(example_inputs)
        report, before = _find(model, inputs)
        if report.left and not report.folded:
            warn(f"no batch norm can be folded: {'; '.join(f'{n}: {why}' for n, why in report.left.items())}")
        folded = copy.deepcopy(model)
        for norm, layer in report.folded.items():
            _fold(folded, norm, layer, check=inputs is None)
        if inputs is not None:
            _check_outputs(before, _run(copy.deepcopy(folded), inputs))
        self.report = report
        return folded


def _inner(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
    return unwrap(model)


def _find(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[FoldReport, Any]:
    """Make the report, and the model's output on the inputs if there are any."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return FoldReport(), _run(copy.deepcopy(model), inputs) if inputs is not None else None
    probe = copy.deepcopy(model).eval()
    with undisturbed(probe), _full_precision():
        folded, left, output = read_folds(probe, copy.deepcopy(inputs))
    return FoldReport(folded, left), output


def _run(probe: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad(), undisturbed(probe), evaluating(probe), _full_precision():
        try:
            return probe(*copy.deepcopy(inputs))
        except Exception as error:
            raise ValueError(
                f"example_inputs must be arguments that the model runs on folded, got an error: {error}"
            ) from error


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch off TF32 on CUDA for a while: its ten bits make a difference of their own."""
    full: object
    # The older switches raise where a user has set the newer ones, which torch has since 2.9.
    if hasattr(torch.backends.cudnn, "conv"):
        switches, name, full = [torch.backends.cudnn.conv, torch.backends.cuda.matmul], "fp32_precision", "ieee"
    else:
        switches, name, full = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, full)
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _fold(model: nn.Module, norm_name: str, layer_name: str, *, check: bool) -> None:
    norm, layer = model.get_submodule(norm_name), model.get_submodule(layer_name)
    assert isinstance(norm, _BatchNorm)
    alone = copy.deepcopy(layer) if check else None
    _absorb(layer, norm)
    if alone is not None:
        _check_layer(layer_name, alone, norm, layer)
    identity = nn.Identity()
    identity.training = norm.training
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = identity


def _absorb(layer: nn.Module, norm: _BatchNorm) -> None:
    """Work the norm into weight and bias, in float64 and out of place: a parameter keeps its identity and format."""
    weight = layer._parameters["weight"]
    reading = read_module(layer)
    assert weight is not None
    assert reading is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layout = reading.layouts["weight"]
    mean, variance = _wide(norm.running_mean), _wide(norm.running_var)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    bias = layer._parameters.get("bias")
    shift = ((_wide(bias) if bias is not None else 0) - mean) * scale
    if norm.bias is not None:
        shift = shift + _wide(norm.bias)
    per_output = [n if "out" in axes else 1 for n, axes in zip(layout.shape, layout.axes, strict=True)]
    scaled = _wide(weight).reshape(layout.shape) * scale.reshape(per_output)
    weight.data = torch.empty_like(weight.data).copy_(scaled.reshape(weight.shape))
    if bias is not None:
        bias.data = torch.empty_like(bias.data).copy_(shift)
    else:
        trains = norm.bias.requires_grad if norm.bias is not None else weight.requires_grad
        layer.bias = nn.Parameter(shift.to(weight.device, weight.dtype), requires_grad=trains)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _check_layer(name: str, layer: nn.Module, norm: nn.Module, folded: nn.Module) -> None:
    """Check that a folded convolution computes on random inputs what layer and norm compute."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    weight = layer.weight
    padding = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    extent = [4 + k * d + p for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, layer.in_channels, *extent, generator=generator).to(weight.device, weight.dtype)
    try:
        _check_outputs(_run(nn.Sequential(layer, norm), (inputs,)), _run(folded, (inputs,)))
    except ValueError as error:
        raise ValueError(f"{error}, for {name}") from error


def _check_outputs(before: Any, after: Any) -> None:
    """Refuse outputs that differ by more than the rounding of their type.

    Raises:
        ValueError: They do; nothing has been changed then.
    """
    (old, structure), (new, now) = tree_flatten(before), tree_flatten(after)
    if structure != now:
        raise ValueError("the folded model must give outputs of the same structure as before; nothing was changed")
    expected, got = ([x for x in one if isinstance(x, Tensor)] for one in (old, new))
    try:
        check_same(expected, got, "fold", "the folded model")
    except ValueError as error:
        raise ValueError(f"{error}; nothing was changed") from error
