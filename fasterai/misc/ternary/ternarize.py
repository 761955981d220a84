"""Ternary groups in a model: a new model whose weights are -a, 0 or a, with a scale `a` for each small group of inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.core.checks import warn
from fasterai.core.types import Target
from fasterai.misc.ternary.groups import Group, check_group, divide
from fasterai.misc.ternary.norms import check_batches, measure_norms_
from fasterai.misc.ternary.optimum import check_rule, ternary_of
from fasterai.misc.ternary.report import TernaryReport, macs_of, measure_layer
from fasterai.misc.ternary.selection import Ignored, choose_targets
from fasterai.model.inputs import arguments, as_batch
from fasterai.model.names import unwrap
from fasterai.model.supported import check_model
from fasterai.model.targets import Selection, TargetsLike

__all__ = ["find_ternary", "report_of", "ternarize"]

SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def ternarize(
    model: nn.Module,
    group: Group = 4,
    *,
    rule: str = "exact",
    targets: TargetsLike | None = None,
    ignored_layers: Ignored = None,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make a new model whose weights are ternary in groups: the best `a t`, t in {-1, 0, 1}^N, for each N weights.

    Mellempudi et al. 2017 (https://arxiv.org/abs/1705.01462); the optimum is exact, by prefix sums of the sorted magnitudes.
    The new model is an ordinary one, as fast as the other: what it saves are bytes in a file (`save_ternary`), and
    multiplications on hardware that adds.

    Args:
        model: The model, wrapped or not; it stays as it is.
        group: Number of weights of a group, along the inputs of each output and kernel position; `filter` for all weights of
            an output together, `tensor` for all of a layer.
        rule: `exact`, or `threshold` for those above 0.7 of the group's mean magnitude (Li et al. 2016).
        targets: Names of weights or layers, globs, or a predicate of (name, parameter). Default: all weights with inputs of
            convolutions, linear, attention and recurrent layers, less the first and the last layer.
        ignored_layers: Layers, their names or globs, that stay, too.
        example_inputs: A tensor or tuple that the model runs on, by which the first and the last layer are found; the first of
            `data` if it is left out, and without any the first and the last layer in the order of the parameters.
        data: Batches by which the statistics of batch norms are measured anew, all of them: `x`, `(x, y)` or the like.
        scale_dtype: Type that scales are rounded to, which packs smaller; the weight's own if it is left out.

    Returns:
        The new model, unwrapped.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, a name matches nothing, a weight is not finite, or the model does not run on
            inputs or data.
    """
    group, rule, scale_dtype = check_group(group), check_rule(rule), _check_scales(scale_dtype)
    inner = unwrap(check_model(model, holds_values=True))
    example_inputs, data = _first_of(inner, example_inputs, data)
    new = copy.deepcopy(inner)
    selection = choose_targets(new, targets, ignored_layers, example_inputs)
    if not selection.targets:
        warn(f"no weight became ternary: {'; '.join(f'{n}: {why}' for n, why in selection.left_out.items())}")
    with torch.no_grad():
        for target in selection.targets:
            target.parameter.copy_(_ternary(target, group, rule, scale_dtype))
    if data is not None:
        measure_norms_(new, data)
    return new


def find_ternary(
    model: nn.Module,
    group: Group = 4,
    *,
    rule: str = "exact",
    targets: TargetsLike | None = None,
    ignored_layers: Ignored = None,
    example_inputs: Any = None,
    scale_dtype: torch.dtype | None = None,
) -> TernaryReport:
    """Report what `ternarize` would make of a model: errors, zeros, multiplications and bytes; the model stays unchanged.

    The arguments, and the errors, are those of `ternarize`; multiplications are counted where there are example inputs.
    """
    group, rule, scale_dtype = check_group(group), check_rule(rule), _check_scales(scale_dtype)
    inner = unwrap(check_model(model, holds_values=True))
    selection = choose_targets(inner, targets, ignored_layers, example_inputs)

    def found(target: Target) -> tuple[Tensor, Tensor]:
        return target.parameter.detach(), _ternary(target, group, rule, scale_dtype)

    return report_of(inner, selection, group, rule, found, example_inputs)


def _ternary(target: Target, group: Group, rule: str, scale_dtype: torch.dtype | None) -> Tensor:
    """Return the ternary values of a weight, or refuse a type that does not hold its scales."""
    found = ternary_of(target.parameter, divide(target.layout, group), rule, scale_dtype)
    if scale_dtype is not None and not found.isfinite().all():
        raise ValueError(
            f"scale_dtype must hold the scales, got {scale_dtype} for {target.name}, where one is too large for it"
        )
    return found


def report_of(
    model: nn.Module,
    selection: Selection,
    group: Group,
    rule: str,
    weights: Callable[[Target], tuple[Tensor, Tensor]],
    example_inputs: Any,
) -> TernaryReport:
    """Make a report of a model.

    Args:
        model: The model.
        selection: The ternary weights, and the reasons for which others are not.
        group: The weights of a group.
        rule: The rule, for the report.
        weights: `target -> (weight before, ternary weight)`.
        example_inputs: What multiplications are counted with; None to count none.
    """
    costs = None if example_inputs is None else cost(model, example_inputs)
    macs = {} if costs is None else macs_of(costs, selection.targets)
    layers = {t.name: measure_layer(*weights(t), divide(t.layout, group), macs.get(t.name)) for t in selection.targets}
    whole, samples = (None, None) if costs is None else (costs.macs, costs.batch_size)
    return TernaryReport(group, rule, layers, selection.left_out, whole, samples)


def _check_scales(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and dtype not in SCALE_TYPES:
        raise ValueError(f"scale_dtype must be one of {', '.join(map(str, SCALE_TYPES))}, or None, got {dtype!r}")
    return dtype


def _first_of(model: nn.Module, example_inputs: Any, data: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """Take the first batch for example inputs, where there are none, and put it back."""
    if data is None:
        return example_inputs, data
    batches = iter(check_batches(data))
    if example_inputs is not None:
        return example_inputs, batches
    first = next(batches, None)
    if first is None:
        raise ValueError("data must hold at least one batch, got none")
    return arguments(model, as_batch(first)), chain([first], batches)
