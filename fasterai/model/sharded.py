"""Refusal of weights that masks cannot multiply: sharded over processes, quantised, or sparse in memory."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fasterai.model.layouts import read_module
from fasterai.model.names import plain_name

__all__ = ["Place", "check_plain", "check_unflattened"]

SHARDED = (
    "prune before the model is sharded (fully_shard, FSDP, parallelize_module): this version neither makes masks on sharded "
    "weights nor holds them there; DistributedDataParallel keeps weights whole"
)
PACKED = "prune before the model is quantised or its weights are wrapped, or leave this one out with targets="


class Place(Protocol):
    """Parameter with its name in the model and the module that holds it."""

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""

    @property
    def module(self) -> nn.Module:
        """Module that holds the parameter."""

    @property
    def attribute(self) -> str:
        """Name of the parameter in that module."""


def check_unflattened(model: nn.Module) -> None:
    """Refuse a model whose parameters FSDP version 1 has packed into flat ones.

    Raises:
        ValueError: It has; the first such parameter is named. Parameters that are whole, as with `NO_SHARD` and in
            `summon_full_params`, are let in where FSDP shows them (`use_orig_params`).
    """
    for prefix, module in model.named_modules():
        held: dict[str, nn.Parameter | None] = {**module._parameters}
        if not held and _holds_weights(module):
            held = {"weight": None}
        for attribute, parameter in held.items():
            if _is_flat(module, attribute, parameter):
                raise _refusal(plain_name(f"{prefix}.{attribute}".lstrip(".")), "a flat parameter of FSDP", SHARDED)


def check_plain(places: Iterable[Place], named: Container[str] = ()) -> None:
    """Refuse parameters that are not plain tensors.

    Args:
        places: Where the parameters are held.
        named: Names of parameters that are refused although they do not train. Other frozen ones may be packed, as the
            quantised weights below trained adapters are: they are not masked.

    Raises:
        ValueError: One is sharded, a tensor subclass with operations of its own, quantised, or not dense in memory.
    """
    for place in places:
        parameter = place.module._parameters.get(place.attribute)
        if _is_flat(place.module, place.attribute, parameter):
            raise _refusal(place.name, "a flat parameter of FSDP", SHARDED)
        if parameter is None:
            continue
        if placements := getattr(parameter, "placements", None):
            raise _refusal(place.name, f"a DTensor ({', '.join(map(repr, placements))})", SHARDED)
        if isinstance(parameter, UninitializedParameter):
            continue
        kind = _kind(parameter)
        if kind and (parameter.requires_grad or place.name in named):
            raise _refusal(place.name, kind, PACKED)


def _refusal(name: str, kind: str, repair: str) -> ValueError:
    return ValueError(f"model must hold its weights as plain, whole tensors, got {name}, {kind}; {repair}")


def _kind(parameter: Tensor) -> str | None:
    """Return the kind of a tensor that is not plain, None for a plain one."""
    if parameter.is_meta:
        return "on the meta device, which holds no numbers (load the weights first: to_empty, load_state_dict(assign=True))"
    if type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # subclasses that only carry notes are plain
        return f"the tensor subclass {type(parameter).__name__}"
    if parameter.is_quantized:
        return f"a quantised tensor ({parameter.dtype})"
    if parameter.layout is not torch.strided:
        return f"a tensor of layout {parameter.layout}"
    if parameter.is_floating_point() and parameter.element_size() < 2:
        return f"a tensor of {parameter.dtype}, which torch neither multiplies nor compares"
    has_numbers = parameter.is_floating_point() or parameter.is_complex()
    packed = type(parameter) not in (nn.Parameter, Tensor) and not has_numbers
    return f"the tensor subclass {type(parameter).__name__} of {parameter.dtype}" if packed else None


def _is_flat(module: nn.Module, attribute: str, parameter: Tensor | None) -> bool:
    """Tell if FSDP has packed a weight into a flat parameter: the weight is one, is a part of one, or is missing."""
    if parameter is None:
        return attribute == "weight" and _holds_weights(module) and getattr(module, "_is_fsdp_managed_module", False)
    if not getattr(parameter, "_fsdp_flattened", False):
        return False
    return attribute == "_flat_param" or (parameter.dim() == 1 and "weight" in attribute and _holds_weights(module))


def _holds_weights(module: nn.Module) -> bool:
    """Tell if a module is of a class whose weights are known to have several dimensions."""
    return read_module.dispatch(type(module)) is not read_module.dispatch(object)
