"""Checks of what a distiller is given, of saved adapters, and of what a teacher says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasterai.core.batch import Batch
from fasterai.core.saved import mapping_of, tensor
from fasterai.display import brief
from fasterai.distill.capture import check_list
from fasterai.distill.losses.loss import Adapter, FeatureLoss, Loss

__all__ = [
    "SIDES",
    "Layers",
    "adapter_state",
    "check_fit",
    "checked_layers",
    "doubt_of",
    "load_adapter_",
    "name_of",
    "range_of",
]

Layers = Sequence[str | nn.Module]
SIDES = ("activations_student", "activations_teacher")


def checked_layers(losses: Sequence[Loss], *given: Layers | None) -> tuple[list[str | nn.Module], list[str | nn.Module]]:
    """Return the layers of both sides as lists.

    Raises:
        ValueError: There are not as many on both sides, a loss reads features and there are none, or no loss reads them.
        TypeError: One side is no list.
    """
    if not losses:
        raise ValueError("loss must be a distillation loss or several, got none")
    for side, layers in zip(SIDES, given, strict=True):
        check_list(side, layers)
        if not isinstance(layers, Iterable | None):
            raise TypeError(f"{side} must be a list of layers, got {layers!r}; the weight of the loss is weight={layers!r}")
    student, teacher = (list(layers or ()) for layers in given)
    if len(student) != len(teacher):
        raise ValueError(
            f"{SIDES[1]} must be as many layers as {SIDES[0]}, of which the first belongs to the first, got {len(teacher)} and "
            f"{len(student)}; one layer may stand twice"
        )
    reading = [one for one in losses if isinstance(one, FeatureLoss)]
    if student and not reading:
        names = ", ".join(type(one).__name__ for one in losses)
        raise ValueError(f"{SIDES[0]} must be left out for losses that read no features, {names}, got {brief(student)}")
    without = [type(one).__name__ for one in reading if not one.on_outputs]
    if without and not student:
        raise ValueError(
            f"{SIDES[0]} must name the layers whose outputs {', '.join(without)} compares, got none; pass {SIDES[0]}=[...] and "
            f"{SIDES[1]}=[...]"
        )
    return student, teacher


def name_of(layer: str | nn.Module) -> str:
    """Return a layer's name, or its kind."""
    return layer if isinstance(layer, str) else type(layer).__name__


def adapter_state(what: str, value: Any) -> None:
    """Refuse what is no saved adapter; None stands for none."""
    if value is not None:
        mapping_of(tensor)(what, value)


def check_fit(adapter: Adapter | None, saved: Mapping[str, Tensor] | None, loss: str) -> None:
    """Refuse a saved adapter that is not of the shapes of one.

    Raises:
        ValueError: It is not.
    """
    own = {} if adapter is None else {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
    theirs = {} if saved is None else {name: tuple(x.shape) for name, x in saved.items()}
    if own != theirs:
        raise ValueError(f"state must be of an adapter of {loss} with {own or 'nothing'}, got {theirs or 'nothing'}")


def load_adapter_(adapter: Adapter, saved: Mapping[str, Tensor], loss: str) -> None:
    """Give an adapter saved values.

    Raises:
        ValueError: They are of other shapes.
    """
    try:
        adapter.load_state_dict(saved)
    except RuntimeError as error:
        own = {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
        raise ValueError(
            f"state must be of an adapter of {loss} with {own}, got "
            f"{ {n: tuple(x.shape) for n, x in saved.items()} }; take a new Distiller for other layers"
        ) from error


def doubt_of(x: Tensor) -> Tensor:
    """Return 0 for finite numbers, else NaN, as a scalar on the device."""
    if not x.numel():
        return x.new_zeros(())
    low, high = torch.aminmax(x.detach())  # a sum of finite numbers may be infinite, as where logits are masked by the lowest
    return low * 0 + high * 0


def range_of(batch: Batch) -> str:
    """Describe the inputs of a batch by the range of the first numbers among them."""
    numbers = (x for x in tree_leaves((batch.inputs, dict(batch.keywords))) if isinstance(x, Tensor) and x.is_floating_point())
    first = next(numbers, None)
    return "no numbers" if first is None else f"numbers from {float(first.min()):.3g} to {float(first.max()):.3g}"
