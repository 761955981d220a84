"""Decomposition of linear layers into two thinner ones: `W = U S V^T ~ (U_r S_r^1/2) (S_r^1/2 V_r^T)`, by singular values.

The truncation is the best approximation of that rank (Eckart & Young 1936, https://doi.org/10.1007/BF02288367). With data it is
that of `W diag(x)`, `x` the 2-norms of the input features: what the layer adds up, not its weights, is then approximated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import check_count, check_fraction, warn
from fasterai.misc.fates import Familiar, Fates
from fasterai.misc.layer_choice import Kind, choose_layers, replace_modules
from fasterai.model.names import unwrap
from fasterai.model.targets import all_targets
from fasterai.units.evidence import Source, activations

__all__ = ["DecompositionReport", "FC_Decomposer", "decompose_linear", "factorise_linear"]

# Input features smaller than this share of the largest count as if they had it, so that nothing is divided by 0.
LEAST_SCALE = 1e-6
# Linear layers, and what one has and the two that replace it have not.
LINEAR = Kind((nn.Linear,), "linear layer", frozenset({"weight", "bias", "in_features", "out_features"}))


@dataclass(frozen=True, repr=False)
class DecompositionReport(Fates):
    """Report of a decomposition: the layers that were decomposed, and those that were not.

    Attributes:
        ranks: Name of each decomposed layer -> the rank it was given.
        left: Name of each other linear layer -> why it stayed.
        parameters_before: Number of parameters before.
        parameters_after: Number of parameters after.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    def _head(self) -> str:
        head = f"{len(self.ranks)} of {len(self.ranks) + len(self.left)} linear layers decomposed"
        return f"{head}, {self.parameters_before:,} -> {self.parameters_after:,} parameters"

    def _changed(self) -> Iterator[tuple[str, str]]:
        return ((name, f"rank {rank}") for name, rank in self.ranks.items())


def factorise_linear(
    layer: nn.Linear, share_removed: float = 0.5, energy_threshold: float | None = None, scale: Tensor | None = None
) -> nn.Sequential:
    """Make two linear layers of one; with `share_removed=0` they compute the same.

    Args:
        layer: Weight `(O, I)`; it stays as it is.
        share_removed: Share of the singular values that go, in [0, 1]; at least one stays.
        energy_threshold: Share of the sum of squared singular values that stays, in [0, 1]: the smallest rank that has
            it. It decides alone if given.
        scale: Sizes of the input features, `(I,)`, from 0 up: the errors of large ones weigh more. Default all the same.

    Returns:
        `Linear(I, rank, bias=False)` and `Linear(rank, O)`, in the layer's dtype, device and mode, frozen where it is.

    Raises:
        ValueError: A share is not in [0, 1], the weight is not finite, or the scale does not fit the layer.
    """
    share, energy = _check_shares(share_removed, energy_threshold)
    if not torch.isfinite(layer.weight).all():
        raise ValueError("layer must have a finite weight, got NaN or infinity in it")
    if scale is not None and (scale.shape != (layer.in_features,) or not (scale >= 0).all() or not torch.isfinite(scale).all()):
        raise ValueError(f"scale must be {layer.in_features} finite numbers of at least 0, got {scale!r}")
    return _split(layer, *_truncate(layer, share, energy, scale))


def decompose_linear(
    model: nn.Module,
    share_removed: float = 0.5,
    *,
    energy_threshold: float | None = None,
    data: Iterable[Any] | None = None,
    n_batches: int = 5,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> nn.Module:
    """Make a new model whose linear layers are two thinner ones each, where that saves parameters.

    Args:
        model: The model, wrapped or not; it stays as it is.
        share_removed: Share of each layer's singular values that go, in [0, 1]; at least one stays. A layer `(O, I)`
            saves parameters at a rank below `O I / (O + I)`: a square one needs more than 0.5.
        energy_threshold: Share of the sum of squared singular values that stays, in [0, 1]; it decides alone if given.
        data: Batches, each `x`, `(x, y)` or `((x1, x2), y)`: the layers are then approximated where their inputs are large.
        n_batches: Number of batches that are run, in eval mode.
        layers: Names of linear layers, or of modules that hold them, or globs; default all.
        exclude: Names or globs of those that stay.

    Returns:
        The new model, unwrapped; a model that is a linear layer itself comes back as `nn.Sequential`.

    Raises:
        ValueError: A share is not in [0, 1], a name matches no linear layer, a weight is not finite, or the data do
            not reach a layer.
    """
    share, energy = _check_shares(share_removed, energy_threshold)
    return FC_Decomposer()._decompose(model, share, energy, data, n_batches, layers, exclude)


class FC_Decomposer(Familiar):  # noqa: N801 - its familiar name
    """Decomposer that works as `decompose_linear` does, and keeps its last report as `.report`."""

    def __init__(self) -> None:
        self.report = DecompositionReport()

    def decompose(
        self,
        model: nn.Module,
        percent_removed: float = 0.5,
        energy_threshold: float | None = None,
        data: Iterable[Any] | None = None,
        n_batches: int = 5,
        layers: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> nn.Module:
        """Decompose as `decompose_linear` does; `percent_removed` is its `share_removed`, a fraction below 1."""
        _refuse_all(percent_removed, energy_threshold)
        return self._decompose(model, percent_removed, energy_threshold, data, n_batches, layers, exclude)

    def _decompose(
        self,
        model: nn.Module,
        percent_removed: float,
        energy_threshold: float | None,
        data: Iterable[Any] | None,
        n_batches: int,
        layers: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
    ) -> nn.Module:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
        share, energy = _check_shares(percent_removed, energy_threshold, name="percent_removed")
        new = copy.deepcopy(unwrap(model))
        chosen, left = choose_layers(new, LINEAR, layers, exclude)
        scales = {} if data is None else _scales(new, chosen, islice(data, check_count("n_batches", n_batches)))
        ranks: dict[str, int] = {}
        replacements: dict[nn.Module, nn.Module] = {}
        for name, layer in chosen.items():
            if not torch.isfinite(layer.weight).all():
                raise ValueError(f"model must have finite weights, got NaN or infinity in {name or 'its weight'}")
            first, second = _truncate(layer, share, energy, scales.get(layer))
            rank, (outs, ins) = len(first), layer.weight.shape
            if rank * (outs + ins) < outs * ins:
                ranks[name], replacements[layer] = rank, _split(layer, first, second)
            else:
                left[name] = (
                    f"rank {rank} of {min(outs, ins)} would not save parameters (below {outs * ins / (outs + ins):g} does)"
                )
        before = _count(new)
        new = replace_modules(new, replacements)
        if not ranks:
            warn(f"no linear layer was decomposed: {'; '.join(f'{n}: {why}' for n, why in left.items()) or 'there is none'}")
        self.report = DecompositionReport(ranks, left, before, _count(new))
        return new

    def SVD(  # noqa: N802 - its familiar name
        self,
        layer: nn.Linear,
        percent_removed: float = 0.5,
        energy_threshold: float | None = None,
        scale: Tensor | None = None,
    ) -> nn.Sequential:
        """Factorise one layer as `factorise_linear` does; `percent_removed` is below 1."""
        _refuse_all(percent_removed, energy_threshold)
        return factorise_linear(layer, percent_removed, energy_threshold, scale)


def _check_shares(share: float, energy: float | None, name: str = "share_removed") -> tuple[float, float | None]:
    return check_fraction(name, share), None if energy is None else check_fraction("energy_threshold", energy)


def _refuse_all(percent_removed: float, energy_threshold: float | None) -> None:
    """Refuse to remove all singular values, by the familiar calls, where that has always been an error."""
    if energy_threshold is None and check_fraction("percent_removed", percent_removed) == 1:
        raise ValueError(
            f"percent_removed must be below 1, got {percent_removed!r}: nothing would be left; decompose_linear and "
            "factorise_linear keep one singular value then"
        )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _scales(model: nn.Module, layers: Mapping[str, nn.Linear], data: Iterable[Any]) -> dict[nn.Module, Tensor]:
    """Return layer -> the 2-norm of each of its input features over the batches, `(I,)`."""
    targets = [t for t in all_targets(model) if t.attribute == "weight" and t.module in layers.values()]
    try:
        norms = activations(model, targets, Source(data=data))
    except ValueError as error:
        raise ValueError(
            f"data must hold batches that reach every layer to decompose, less those in exclude: {error}"
        ) from error
    return {t.module: norms[t.name].flatten() for t in targets}


def _truncate(layer: nn.Linear, share: float, energy: float | None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the two factors `(rank, I)` and `(O, rank)`, computed in float64."""
    weight = layer.weight.detach().to("cpu", torch.float64)
    scale = torch.ones(weight.shape[1]) if scale is None or not scale.any() else scale.clamp_min(LEAST_SCALE * scale.max())
    scale = scale.to("cpu", torch.float64)
    u, s, vt = torch.linalg.svd(weight * scale, full_matrices=False)
    if energy is None:
        rank = len(s) - round(share * len(s))
    else:
        # With a threshold of 1 the zeros of a low-rank weight, which rounding has made small numbers, must go too.
        kept = s.square().cumsum(0)
        rank = int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1 if len(s) else 0
    rank = min(max(rank, 1), len(s))
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank] / scale, u[:, :rank] * root


def _split(layer: nn.Linear, first: Tensor, second: Tensor) -> nn.Sequential:
    weight = layer.weight
    narrow = nn.Linear(weight.shape[1], len(first), bias=False, device="meta")
    wide = nn.Linear(len(first), weight.shape[0], bias=layer.bias is not None, device="meta")
    for part, factor in ((narrow, first), (wide, second)):
        part.weight = nn.Parameter(factor.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
    if layer.bias is not None:
        wide.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return nn.Sequential(narrow, wide).train(layer.training)
