"""Observation of layers: what they read and put out, by hooks; the choice of the targets that can be watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.criteria import Criterion
from fasterai.core.types import Target
from fasterai.model.inputs import arguments
from fasterai.model.names import unwrap
from fasterai.model.running import evaluating, undisturbed
from fasterai.model.targets import Selection

if TYPE_CHECKING:
    from fasterai.units.evidence import Source

__all__ = ["LARGEST", "MEAN", "NORM", "Statistic", "activations", "outputs", "without_unwatched"]

#: Places of batch and positions at which outputs are noted, over all batches together.
SAMPLES = 4096


def without_unwatched(selection: Selection, criterion: Criterion) -> Selection:
    """Take out the targets whose inputs or outputs a criterion cannot watch, with a warning that names them.

    Raises:
        ValueError: The user has named one of them, or no other target is left.
    """
    reads_inputs = bool({"activation", "activation_max", "activation_mean"}.intersection(criterion.evidence_names))
    reads_outputs = "outputs" in criterion.evidence_names
    lost = [t for t in selection.targets if (reads_inputs and not _is_watched(t)) or (reads_outputs and not _puts_out(t))]
    if not lost:
        return selection
    side = "outputs" if reads_outputs else "inputs"
    kinds = "convolutions, linear layers" + ("" if reads_outputs else ", the joint weight of self-attention")
    names = ", ".join(t.name for t in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    if any(t.name in selection.named for t in lost) or len(lost) == len(selection.targets):
        raise ValueError(
            f"targets must be layers whose {side} {criterion.title} can watch ({kinds}), got {names}; leave them out of "
            "targets=, or take another criterion"
        )
    warn(f"{criterion.title} cannot watch the {side} of {names}: left out, and unpruned")
    why = dict.fromkeys((t.name for t in lost), f"{criterion.title} cannot watch its {side}")
    kept = tuple(t for t in selection.targets if t.name not in why)
    return replace(selection, targets=kept, left_out={**selection.left_out, **why})


def _is_watched(target: Target) -> bool:
    """Tell if a module is called with what the target's weight reads, as far as its kind tells."""
    if target.attribute == "in_proj_weight":
        return isinstance(target.module, nn.MultiheadAttention)
    # The output projection of torch's attention is no call of its own: a function takes its weight.
    called = not isinstance(target.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return called and target.attribute == "weight" and target.kind in ("convolution", "linear")


def _puts_out(target: Target) -> bool:
    """Tell if a module returns what the target's weight makes, as far as its kind tells."""
    return _is_watched(target) and target.attribute == "weight"


@dataclass(frozen=True)
class Statistic:
    """A number computed for each input feature, from its values over batch and positions.

    Attributes:
        part: The result of one call of the layer: `(N, C)` -> `(C,)`.
        join: The joined result of two calls.
        finish: The number itself, of the joined result of all calls and the count of values.
    """

    part: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]


NORM = Statistic(lambda x: x.square().sum(0), torch.add, lambda total, n: total.sqrt())
LARGEST = Statistic(lambda x: x.abs().amax(0), torch.maximum, lambda total, n: total)
MEAN = Statistic(lambda x: x.abs().sum(0), torch.add, lambda total, n: total / n)


def activations(model: nn.Module, targets: Sequence[Target], source: Source, statistic: Statistic = NORM) -> dict[str, Tensor]:
    """Compute a statistic of each input feature, by default the 2-norm (Sun et al. 2023); it broadcasts against the weight."""
    found: dict[str, tuple[Tensor, int]] = {}
    inner = unwrap(model)
    handles = []
    try:
        for target in targets:
            handles.append(target.module.register_forward_pre_hook(_watch_inputs(target, statistic, found)))
        with undisturbed(inner), evaluating(inner), torch.no_grad():
            for batch in source.batches("activations"):
                inner(*arguments(inner, batch))
    finally:
        for handle in handles:
            handle.remove()
    unseen = [t.name for t in targets if t.name not in found]
    if unseen:
        names, them = ", ".join(unseen[:5]), "it" if len(unseen) == 1 else "them"
        raise ValueError(f"targets must be layers whose inputs can be watched, got {names}; leave {them} out with targets=")
    return {t.name: _spread(statistic.finish(*found[t.name]), t) for t in targets}


def outputs(model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, Tensor]:
    """Note the outputs of layers on data, `(outputs, samples)`, in float32 at least; those not to be watched are left out.

    Of the places in batch and positions those noted lie at even distances, so that every output is seen at the same ones.
    """
    found: dict[str, list[Tensor]] = {}
    inner, batches = unwrap(model), source.batches("activations")
    most = max(1, SAMPLES // len(batches))
    handles = []
    try:
        for target in filter(_puts_out, targets):
            handles.append(target.module.register_forward_hook(_watch_outputs(target, most, found)))
        with undisturbed(inner), evaluating(inner), torch.no_grad():
            for batch in batches:
                inner(*arguments(inner, batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def _watch_outputs(target: Target, most: int, found: dict[str, list[Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, made: Any) -> None:
        channels = made.dim() - (target.parameter.dim() - 1) if target.kind == "convolution" else -1
        rows = made.detach().movedim(channels, 0).flatten(1)
        places = torch.linspace(0, rows.shape[1] - 1, min(most, rows.shape[1]), device=rows.device).round().long()
        found.setdefault(target.name, []).append(rows[:, places].to(torch.promote_types(rows.dtype, torch.float32)))

    return hook


def _watch_inputs(
    target: Target, statistic: Statistic, found: dict[str, tuple[Tensor, int]]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        features = _features(target, args)
        if features is not None:
            rows = features.float().reshape(-1, features.shape[-1])
            part, count = statistic.part(rows), len(rows)
            before, so_far = found.get(target.name, (None, 0))
            found[target.name] = (part if before is None else statistic.join(before, part), so_far + count)

    return hook


def _features(target: Target, args: tuple[Any, ...]) -> Tensor | None:
    """Return the features that a layer's weight reads, in the last dimension, `(..., C)`; None if the input hides them."""
    if target.attribute == "in_proj_weight" and isinstance(target.module, nn.MultiheadAttention):
        same = len(args) >= 3 and args[0] is args[1] and args[1] is args[2]
        return args[0] if same else None
    if not args or target.attribute != "weight" or target.kind not in ("convolution", "linear"):
        return None
    x: Tensor = args[0]
    if target.kind == "convolution":
        channels = x.dim() - (len(target.parameter.shape) - 1)
        return x.movedim(channels, -1)
    return x


def _spread(norms: Tensor, target: Target) -> Tensor:
    """Lay out one number per input, `(C,)`, so that they broadcast against the weight.

    For a convolution weight `(8, 3, 5, 5)` the shape `(3,)` becomes `(1, 3, 1, 1)`.
    """
    layout = target.layout
    sizes = [n if "in" in names else 1 for n, names in zip(layout.shape, layout.axes, strict=True)]
    spread = norms.view(sizes)
    if layout.shape == tuple(target.parameter.shape):
        return spread
    return spread.expand(layout.shape).reshape(target.parameter.shape)
