"""Partners of targets: the vectors that become zero with a pruned output, so that it is zero after bias and norm too.

These are the layer's bias, and the scale and shift of the batch norm that reads the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.granularities import Granularity
from fasterai.core.types import Target, held_parameter
from fasterai.model.names import unwrap, walk_parameters
from fasterai.model.norms import Flow
from fasterai.model.targets import Selection

__all__ = ["Partner", "find_partners", "kept_outputs", "revive_", "without_outputs"]

BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}


@dataclass(frozen=True)
class Partner:
    """A vector with one entry per output of a target.

    Attributes:
        name: The parameter's name.
        target: The target's name.
        module: The module that holds it.
        attribute: Its name there.
    """

    name: str
    target: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, looked up anew each time."""
        return held_parameter(self.name, self.module, self.attribute)


def find_partners(model: nn.Module, selection: Selection, granularity: Granularity, flow: Flow | None) -> tuple[Partner, ...]:
    """Find the partners of all targets whose units are whole outputs; norms only where the data flow is known."""
    found = []
    places = {name: (module, attribute) for name, module, attribute, _ in walk_parameters(unwrap(model))}
    for target in selection.targets:
        if not granularity.drops_outputs(target.layout):
            continue
        outputs = target.layout.size("out")
        bias = BIASES.get(target.attribute, "")
        vector = target.module._parameters.get(bias)
        if vector is not None and vector.shape == (outputs,):
            prefix = target.module_name
            found.append(Partner(f"{prefix}.{bias}" if prefix else bias, target.name, target.module, bias))
        for norm in flow.norms.get(target.name, ()) if flow else ():
            vectors = [Partner(name, target.name, *places[name]) for name in norm if name in places]
            found += [v for v in vectors if v.parameter.shape == (outputs,)]  # a norm may read a part of the outputs
    return tuple(found)


def without_outputs(selection: Selection, granularity: Granularity, flow: Flow) -> Selection:
    """Drop the targets that make the model's outputs from a selection, where units are whole outputs.

    Targets that the user named are not dropped. If all targets make outputs, none is dropped, and a warning says so.
    """
    drop = {
        t.name
        for t in selection.targets
        if t.name in flow.outputs and t.name not in selection.named and granularity.drops_outputs(t.layout)
    }
    if len(drop) == len(selection.targets):
        if drop:
            names = ", ".join(sorted(drop))
            warn(f"every target makes the model's output ({names}), so that outputs go silent; name others with targets=")
        return selection
    kept = tuple(t for t in selection.targets if t.name not in drop)
    reasons = dict.fromkeys(sorted(drop), "it makes the model's output")
    return Selection(kept, {**selection.left_out, **reasons}, selection.named)


def kept_outputs(keep: Tensor, target: Target, granularity: Granularity) -> Tensor:
    """Return flags of the outputs to keep, `(O,)`, from the decisions per unit of a granularity that removes outputs."""
    layout = target.layout
    outputs = [n if "out" in names else 1 for n, names in zip(layout.shape, layout.axes, strict=True)]
    if all(k in (1, n) for k, n in zip(keep.shape, outputs, strict=True)):
        return keep.expand(outputs).reshape(-1)
    mask = granularity.expand(keep, layout).expand(layout.shape)  # a unit of one's own may be of several outputs
    return mask.any(dim=[d for d, names in enumerate(layout.axes) if "out" not in names]).reshape(-1)


@torch.no_grad()
def revive_(vectors: Iterator[tuple[str, Tensor, Tensor, Tensor]], noted: dict[str, Tensor]) -> None:
    """Note the biases, scales and shifts of outputs that are pruned, and give them back to outputs that return.

    A returning output has zero weights. If its norm's scale were zero as well, it would never learn again; before a ReLU it
    learns only where its bias or shift is positive.

    Args:
        vectors: (name, vector, entries kept so far, entries kept from now on), the last three `(O,)`.
        noted: Name -> noted values; changed in place.
    """
    for name, vector, before, after in vectors:
        value = vector.detach()
        old = noted.get(name, value)
        noted[name] = torch.where(before & ~after, value, old)
        value.copy_(torch.where(after & ~before, old, value))
