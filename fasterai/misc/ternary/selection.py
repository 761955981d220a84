"""Choice of the weights that become ternary: those with inputs, less the first and the last layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fasterai.core.checks import not_one_of, unknown
from fasterai.core.types import Target
from fasterai.model.inputs import as_tuple
from fasterai.model.names import unwrap
from fasterai.model.norms import watch
from fasterai.model.sharded import check_plain
from fasterai.model.supported import check_model
from fasterai.model.targets import Selection, TargetsLike, find_targets, match

__all__ = ["Ignored", "choose_targets", "why_not"]

#: Modules, their names, or globs.
Ignored = Iterable[nn.Module | str] | nn.Module | str | None


def why_not(target: Target) -> str | None:
    """Say why a parameter cannot be divided into groups along its inputs; None if it can."""
    inputs = [n for n, axes in zip(target.layout.shape, target.layout.axes, strict=True) if axes == {"in"}]
    if target.kind == "embedding":
        return "targets must not be embeddings, whose rows are read one at a time"
    if not inputs or len(target.layout.shape) < 2:
        return "targets must have inputs"
    if inputs[-1] < 2:
        return "targets must have two inputs at least: a group of one has a scale for each weight"
    if not target.parameter.numel():
        return "targets must hold weights, got none"
    if not target.parameter.is_floating_point():
        return f"targets must hold floating-point numbers, got {target.parameter.dtype}"
    return None


def choose_targets(model: nn.Module, targets: TargetsLike | None, ignored: Ignored, example_inputs: Any) -> Selection:
    """Choose the weights that become ternary, with the reasons for which others stay.

    By default these are all weights with inputs, less those that read the model's input or make its output: by the data flow
    if there are example inputs, else the first and the last one in the order of the parameters. Named ones are taken all.

    Raises:
        TypeError: `model` is no module, or `ignored` holds something else than modules and names.
        ValueError: A name matches nothing, a named weight cannot be divided, a weight is no plain tensor or not finite, or the
            model does not run on the inputs.
    """
    inner = unwrap(check_model(model, holds_values=True))
    found = find_targets(inner, fits=why_not, coarse=False, targets=targets)
    left = {**found.left_out, **_ignored(inner, found.targets, ignored)}
    if targets is None:
        left |= _ends([t for t in found.targets if t.name not in left], inner, example_inputs)
    chosen = tuple(t for t in found.targets if t.name not in left)
    check_plain(chosen)
    for target in chosen:
        if not target.parameter.isfinite().all():
            raise ValueError(f"model must have finite weights, got NaN or infinity in {target.name}")
    return Selection(chosen, left, found.named)


def _ignored(model: nn.Module, targets: Iterable[Target], ignored: Ignored) -> dict[str, str]:
    given = [] if ignored is None else [ignored] if isinstance(ignored, str | nn.Module) else list(ignored)
    known, names = list(targets), {module: name for name, module in model.named_modules()}
    left: dict[str, str] = {}
    for one in given:
        if not isinstance(one, str | nn.Module):
            raise not_one_of("ignored_layers", "modules or their names", one)
        if isinstance(one, nn.Module) and one not in names:
            raise ValueError(f"ignored_layers must be modules of the model, got another {type(one).__name__}")
        pattern = one if isinstance(one, str) else names[one]
        hits = [t.name for t in known if match(pattern, t)]
        if not hits and isinstance(one, str):
            raise unknown("ignored_layers", one, (t.name for t in known), "the name of a layer, or a glob, of")
        left |= dict.fromkeys(hits, "named in ignored_layers")
    return left


def _ends(targets: list[Target], model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Find the weights at both ends of a model."""
    if example_inputs is None:
        by_order = "by the order of the parameters; example_inputs= finds it by the data flow"
        ends = zip(targets[:1] + targets[-1:], ("first", "last"), strict=bool(targets))
        return {t.name: f"the {which} layer, {by_order}" for t, which in ends}
    flow = watch(model, as_tuple(example_inputs))
    found = {"reads the model's input": flow.inputs, "makes the model's output": flow.outputs}
    return {t.name: f"it {what}" for what, names in found.items() for t in targets if t.name in names}
