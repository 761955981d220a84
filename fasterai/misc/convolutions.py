"""Decomposition of convolutions into several thinner ones: Tucker, SVD, spatial SVD and CP.

The kernels are worked out in float64 from the weight alone; `fasterai/misc/convolution_factors.py` has the methods. What they
replace keeps its stride, padding, dilation, bias, dtype and device, and can be trained on.

Over 300 lines, since the functions, the familiar class with its four methods, and their arguments' docstrings stand together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.core.checks import check_choice, check_count, check_fraction, warn
from fasterai.misc.convolution_factors import METHODS, factors_of, full_ranks, product_of, ranks_by_energy
from fasterai.misc.fates import Familiar, Fates
from fasterai.misc.layer_choice import Kind, choose_layers, replace_modules
from fasterai.model.names import unwrap

__all__ = ["VALID_METHODS", "Conv_Decomposer", "ConvolutionReport", "decompose_convolutions", "factorise_convolution"]

VALID_METHODS = frozenset(METHODS)
#: The most rounds of the iterations, where the user gives none.
SWEEPS = {"tucker": 10, "cp": 100}
_SIZES = {"weight", "bias", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
CONVOLUTION = Kind((nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution", frozenset(_SIZES))
Convolution = nn.modules.conv._ConvNd
Ranks = int | Sequence[int]


@dataclass(frozen=True, repr=False)
class ConvolutionReport(Fates):
    """Report of a decomposition: the convolutions that were decomposed, and those that were not.

    Attributes:
        method: The method.
        ranks: Name of each decomposed convolution -> its ranks: `(out, in)` for `tucker`, else one.
        errors: Name of each of them -> the distance of its weight from the new one's product, as a share of its size.
        left: Name of each other convolution -> why it stayed.
        parameters_before: Number of parameters before.
        parameters_after: Number of parameters after.
        macs_before: Multiply-accumulates of one pass before; None without example inputs.
        macs_after: Multiply-accumulates after.
    """

    method: str = "tucker"
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None

    def _head(self) -> str:
        head = f"{len(self.ranks)} of {len(self.ranks) + len(self.left)} convolutions decomposed ({self.method}), "
        head += f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return head if self.macs_before is None else f"{head}, {self.macs_before:,} -> {self.macs_after:,} MACs"

    def _changed(self) -> Iterator[tuple[str, str]]:
        for name, ranks in self.ranks.items():
            yield name, f"rank {' x '.join(map(str, ranks))}, weight off by {self.errors[name]:.1%}"


@dataclass(frozen=True)
class _Plan:
    """The extent of a decomposition: one of a share removed, an energy to keep, an error to allow, or the ranks themselves."""

    method: str
    share: float = 0.5
    energy: float | None = None
    ranks: Ranks | None = None
    sweeps: int = 10
    tol: float = 1e-4

    def ranks_of(self, weight: Tensor) -> tuple[int, ...]:
        """Return the ranks of a weight, each from 1 to its highest."""
        full = full_ranks(weight, self.method)
        if self.energy is not None:
            return ranks_by_energy(weight, self.method, self.energy)
        if self.ranks is None:
            return tuple(max(1, n - round(self.share * n)) for n in full)
        given = (self.ranks,) * len(full) if isinstance(self.ranks, int) else tuple(self.ranks)
        if len(given) != len(full):
            raise ValueError(f"ranks must be {len(full)} for {self.method}, got {self.ranks!r}")
        counts = tuple(check_count("ranks", rank) for rank in given)
        return counts if self.method == "cp" else tuple(map(min, counts, full))


def _plan(
    share: float,
    method: str,
    energy: float | None,
    error: float | None,
    ranks: Ranks | None,
    n_iter: int | None,
    tol: float,
    name: str = "share_removed",
) -> _Plan:
    check_choice("method", method, METHODS)
    check_fraction(name, share)
    if share == 1:
        raise ValueError(f"{name} must be below 1, got {share!r}: nothing would be left of the layer")
    asked = {"energy_threshold": energy, "error": error, "ranks": ranks}
    given = [key for key, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} must not both be given: each decides alone")
    if method == "cp" and given and given[0] != "ranks":
        raise ValueError(f"{given[0]} must be None for method 'cp', whose rank for it cannot be read off; pass ranks=")
    if energy is not None:
        energy = check_fraction("energy_threshold", energy)
    if error is not None:
        # Tucker's error is at most that of both unfoldings together, so that each has half of it.
        energy = 1 - check_fraction("error", error) ** 2 / (2 if method == "tucker" else 1)
    sweeps = SWEEPS.get(method, 0) if n_iter is None else check_count("n_iter", n_iter, 0)
    return _Plan(method, float(share), energy, ranks, sweeps, tol)


def factorise_convolution(
    layer: Convolution,
    share_removed: float = 0.5,
    method: str = "tucker",
    *,
    energy_threshold: float | None = None,
    error: float | None = None,
    ranks: Ranks | None = None,
    n_iter: int | None = None,
    tol: float = 1e-4,
) -> nn.Sequential:
    """Make several convolutions of one; with `share_removed=0` they compute the same, less for `cp`.

    Args:
        layer: Convolution with one group, weight `(O, I, *K)`; it stays as it is. `spatial` and `cp` take `nn.Conv2d` alone.
        share_removed: Share of the ranks that goes, in [0, 1); at least 1 stays of each.
        method: `tucker` (1x1, K, 1x1), `svd` (K, 1x1), `spatial` (h x 1, 1 x w) or `cp` (1x1, then h x 1 and 1 x w of each
            channel, 1x1).
        energy_threshold: Share of the sum of squared singular values that stays, in [0, 1]; it decides alone. Not for `cp`.
        error: Allowed distance of the weights, as a share of the weight's size, in [0, 1]; it decides alone. Not for `cp`.
        ranks: The rank, or `(out, in)` for `tucker`; it decides alone.
        n_iter: The most rounds of `tucker` (10 by default) and `cp` (100).
        tol: The relative change of the error at which they stop.

    Returns:
        The convolutions in their order, in the layer's dtype, device and mode, frozen where it is; the last has the bias.

    Raises:
        ValueError: An argument is out of range, the weight is not finite, or the layer cannot be decomposed so.
    """
    plan = _plan(share_removed, method, energy_threshold, error, ranks, n_iter, tol)
    return _factorised(layer, plan)[0]


def _factorised(layer: Convolution, plan: _Plan) -> tuple[nn.Sequential, tuple[int, ...], float]:
    """Return the convolutions, the ranks, and the distance of the weights."""
    if why := _unfit(layer, plan.method):
        raise ValueError(f"layer must be a convolution that {plan.method} can decompose, got one where {why}")
    weight = layer.weight.detach().to("cpu", torch.float64)
    if not torch.isfinite(weight).all():
        raise ValueError("layer must have a finite weight, got NaN or infinity in it")
    ranks = plan.ranks_of(weight)
    kernels = factors_of(weight, plan.method, ranks, plan.sweeps, plan.tol)
    off = float((product_of(kernels, plan.method) - weight).norm() / weight.norm().clamp_min(1e-300))
    return _sequence(layer, kernels), ranks, off


def _unfit(layer: Convolution, method: str) -> str | None:
    """Return the reason for which a method cannot decompose a convolution; None if it can."""
    if layer.groups > 1:
        return f"its {layer.groups} groups share no channels"
    if method in ("spatial", "cp"):
        if len(layer.kernel_size) != 2:
            return f"its kernel has {len(layer.kernel_size)} dimensions, and {method} needs 2"
        if min(layer.kernel_size) == 1:
            return f"its kernel of {layer.kernel_size} cannot be split"
    elif max(layer.kernel_size) == 1:
        return "its kernel of 1 has nothing to split"
    return None


def _sequence(layer: Convolution, kernels: Sequence[Tensor]) -> nn.Sequential:
    """Make the convolutions of their kernels.

    Along each kernel dimension the first that is as long as the layer's takes over stride, padding and dilation. What runs
    before it has length 1 there and no bias, so that padding commutes with it.
    """
    dims = len(layer.kernel_size)
    owner = [next(n for n, w in enumerate(kernels) if w.shape[2 + d] == layer.kernel_size[d]) for d in range(dims)]
    read = [layer.in_channels, *(len(w) for w in kernels)]
    parts = [
        _part(layer, w, [n == owner[d] for d in range(dims)], read[n], n == len(kernels) - 1) for n, w in enumerate(kernels)
    ]
    return nn.Sequential(*parts).train(layer.training)


def _part(layer: Convolution, kernel: Tensor, owns: Sequence[bool], ins: int, is_last: bool) -> nn.Module:
    def own(values: Any, otherwise: int) -> tuple[int, ...]:
        return tuple(v if mine else otherwise for v, mine in zip(values, owns, strict=True))

    kind: Any = type(layer)
    part: nn.Module = kind(
        ins,
        len(kernel),
        tuple(kernel.shape[2:]),
        stride=own(layer.stride, 1),
        padding=(layer.padding if any(owns) else 0) if isinstance(layer.padding, str) else own(layer.padding, 0),
        dilation=own(layer.dilation, 1),
        groups=ins // kernel.shape[1],
        bias=is_last and layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    weight = layer.weight
    part.weight = nn.Parameter(kernel.to(weight.device, weight.dtype).contiguous(), requires_grad=weight.requires_grad)
    if is_last and layer.bias is not None:
        part.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return part


def decompose_convolutions(
    model: nn.Module,
    share_removed: float = 0.5,
    *,
    method: str = "tucker",
    energy_threshold: float | None = None,
    error: float | None = None,
    ranks: Ranks | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    n_iter: int | None = None,
    tol: float = 1e-4,
    example_inputs: Any = None,
) -> nn.Module:
    """Make a new model whose convolutions are several thinner ones each, where that saves parameters.

    Args:
        model: The model, wrapped or not; it stays as it is.
        share_removed: Share of the ranks of each convolution that goes, in [0, 1).
        method: As for `factorise_convolution`, as are `energy_threshold`, `error`, `ranks`, `n_iter` and `tol`.
        energy_threshold: See there.
        error: See there.
        ranks: See there.
        layers: Names of convolutions, or of modules that hold them, or globs; default all.
        exclude: Names or globs of those that stay.
        n_iter: See there.
        tol: See there.
        example_inputs: Inputs of the model, to count multiply-accumulates for the report.

    Returns:
        The new model, unwrapped; a model that is a convolution itself comes back as `nn.Sequential`.

    Raises:
        ValueError: An argument is out of range, a name matches no convolution, or a weight is not finite.
    """
    plan = _plan(share_removed, method, energy_threshold, error, ranks, n_iter, tol)
    return _decomposed(model, plan, layers, exclude, example_inputs)[0]


def _decomposed(
    model: nn.Module,
    plan: _Plan,
    layers: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    example_inputs: Any,
) -> tuple[nn.Module, ConvolutionReport]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
    new = copy.deepcopy(unwrap(model))
    before, macs = _count(new), _macs(new, example_inputs)
    chosen, left = choose_layers(new, CONVOLUTION, layers, exclude)
    found: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in chosen.items():
        if why := _unfit(layer, plan.method):
            left[name] = why
            continue
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"model must have finite weights, got NaN or infinity in {name or 'its weight'}")
        thin, ranks, off = _factorised(layer, plan)
        if _count(thin) < _count(layer):
            found[name], errors[name], replacements[layer] = ranks, off, thin
        else:
            left[name] = f"rank {' x '.join(map(str, ranks))} would not save parameters"
    new = replace_modules(new, replacements)
    if not found:
        warn(f"no convolution was decomposed: {'; '.join(f'{n}: {why}' for n, why in left.items()) or 'there is none'}")
    report = ConvolutionReport(plan.method, found, errors, left, before, _count(new), macs, _macs(new, example_inputs))
    return new, report


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, example_inputs: Any) -> int | None:
    return None if example_inputs is None else cost(model, example_inputs).macs


class Conv_Decomposer(Familiar):  # noqa: N801 - its familiar name
    """Decomposer that works as `decompose_convolutions` does, and keeps its last report as `.report`."""

    def __init__(self) -> None:
        self.report = ConvolutionReport()

    def decompose(
        self,
        model: nn.Module,
        percent_removed: float = 0.5,
        method: str = "tucker",
        energy_threshold: float | None = None,
        layers: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        n_iter: int | None = None,
        tol: float = 1e-4,
        *,
        error: float | None = None,
        ranks: Ranks | None = None,
        example_inputs: Any = None,
    ) -> nn.Module:
        """Decompose as `decompose_convolutions` does; `percent_removed` is its `share_removed`, a fraction."""
        plan = _plan(percent_removed, method, energy_threshold, error, ranks, n_iter, tol, "percent_removed")
        new, self.report = _decomposed(model, plan, layers, exclude, example_inputs)
        return new

    def Tucker(  # noqa: N802 - its familiar name
        self,
        layer: Convolution,
        percent_removed: float = 0.5,
        energy_threshold: float | None = None,
        n_iter: int | None = None,
        tol: float = 1e-4,
    ) -> nn.Sequential:
        """Factorise one layer by Tucker-2, as `factorise_convolution` does."""
        return self._one(layer, percent_removed, "tucker", energy_threshold, n_iter, tol)

    def SVD(  # noqa: N802 - its familiar name
        self, layer: Convolution, percent_removed: float = 0.5, energy_threshold: float | None = None
    ) -> nn.Sequential:
        """Factorise one layer by singular values, as `factorise_convolution` does."""
        return self._one(layer, percent_removed, "svd", energy_threshold)

    def Spatial(  # noqa: N802 - its familiar name
        self, layer: Convolution, percent_removed: float = 0.5, energy_threshold: float | None = None
    ) -> nn.Sequential:
        """Factorise one layer into a column and a row of kernels, as `factorise_convolution` does."""
        return self._one(layer, percent_removed, "spatial", energy_threshold)

    def CP(  # noqa: N802 - its familiar name
        self, layer: Convolution, percent_removed: float = 0.5, energy_threshold: float | None = None
    ) -> nn.Sequential:
        """Factorise one layer by CP, as `factorise_convolution` does."""
        return self._one(layer, percent_removed, "cp", energy_threshold)

    def _one(
        self,
        layer: Convolution,
        share: float,
        method: str,
        energy: float | None,
        n_iter: int | None = None,
        tol: float = 1e-4,
    ) -> nn.Sequential:
        return _factorised(layer, _plan(share, method, energy, None, None, n_iter, tol, "percent_removed"))[0]
