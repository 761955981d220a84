"""Evidence from gatherers of the user's own, which a criterion names: run, checked, and named in what goes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fasterai.core.checks import noted
from fasterai.core.criteria import Criterion
from fasterai.core.types import Target
from fasterai.model.names import unwrap
from fasterai.units.evidence import Source

__all__ = ["gather"]


def gather(criterion: Criterion, model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, dict[str, Tensor]]:
    """Run the criterion's own gatherers, and return gatherer's name -> target's name -> tensor.

    Raises:
        TypeError: One returns something else than tensors by name.
        ValueError: A target is missing, or a tensor does not broadcast against its weight.
    """
    brought = {}
    for name, gatherer in criterion.gatherers.items():
        title = f"gatherer {name} of criterion {criterion.title}"
        with noted(f"raised by the {title}"):
            found = gatherer(unwrap(model), targets, source)
        brought[name] = {t.name: _brought(title, found, t) for t in targets}
    return brought


def _brought(gatherer: str, found: Any, target: Target) -> Tensor:
    """Check the result of a gatherer for a target, and return the tensor."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{gatherer} must return a dict of target names to tensors, got a {type(found).__name__}")
    value, shape = found.get(target.name), tuple(target.parameter.shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"{gatherer} must return a tensor for every target, got {value!r} for {target.name}")
    if not _broadcasts(value, shape):
        raise ValueError(
            f"{gatherer} must return tensors that broadcast against the weight, got shape {tuple(value.shape)} "
            f"for {target.name} of shape {shape}"
        )
    return value.detach()


def _broadcasts(value: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(value.shape)
    return len(sizes) <= len(shape) and all(n in (1, m) for n, m in zip(sizes[::-1], shape[::-1], strict=False))
