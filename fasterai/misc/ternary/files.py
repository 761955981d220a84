"""Files of models with ternary groups: safetensors with two bits a weight and a scale for each group, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.files import untied, write_tensors
from fasterai.core.types import Target
from fasterai.misc.ternary.groups import Group, check_group, divide
from fasterai.misc.ternary.packing import SCALE_TYPES, is_ternary, pack, packed_bytes, unpack
from fasterai.misc.ternary.selection import why_not
from fasterai.model.names import unwrap
from fasterai.model.supported import check_model
from fasterai.model.targets import all_targets

__all__ = ["load_ternary", "save_ternary"]

FORMAT = "fasterai-ternary-1"
#: Ends of the names of a packed weight's two tensors.
CODES, SCALES = ".codes", ".scales"


def save_ternary(path: str | os.PathLike[str], model: nn.Module, group: Group = 4) -> None:
    """Save a model with its ternary weights packed; all else is saved as it is.

    Which weights are ternary is read off the weights, so that a model that has been fine-tuned by `TernaryTraining` is saved
    alike. Scales are kept in the narrowest type that holds them exactly: what `load_ternary` reads is equal.

    Args:
        path: The file; it is written whole or not at all.
        model: The model, wrapped or not.
        group: The weights of a group, as `ternarize` had them.

    Raises:
        TypeError: The model is no module, or the group no number.
        ValueError: No weight is ternary in such groups, a parameter holds none, or the state is not of tensors alone.
    """
    inner, group = unwrap(check_model(model, holds_values=True)), check_group(group)
    tensors = untied(inner.state_dict())
    packed = [t for t in all_targets(inner) if t.name in tensors and _is_packed(t, group)]
    if not packed:
        raise ValueError(
            f"model must have weights that are ternary in groups of {group}, got none; ternarize(model, {group!r}) makes them"
        )
    layers: dict[str, Any] = {}
    for target in packed:
        weight = tensors.pop(target.name)
        tensors[target.name + CODES], scales = pack(weight, divide(target.layout, group))
        tensors[target.name + SCALES] = scales.contiguous()
        layers[target.name] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    write_tensors(path, tensors, {"format": FORMAT, "group": json.dumps(group), "layers": json.dumps(layers)})


def load_ternary(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load a file of `save_ternary` into a model built as the saved one was; values are cast to the types of its own.

    Args:
        path: The file.
        model: The model; changed in place, and returned.

    Raises:
        TypeError: The model is no module.
        ValueError: The file is truncated or foreign, or of another model. Nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    inner = unwrap(check_model(model, holds_values=True))
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"path must be a file that save_ternary wrote, got {path}: {error}") from error
    group, layers = _read_header(path, metadata)
    targets = {t.name: t for t in all_targets(inner)}
    for name, (shape, dtype) in layers.items():
        codes, scales = tensors.pop(name + CODES, None), tensors.pop(name + SCALES, None)
        if codes is None or scales is None:
            raise ValueError(f"path must be a file that save_ternary wrote, got {path}, which lacks {name}")
        tensors[name] = _unpacked(path, targets.get(name), codes, scales, group, shape).to(dtype)
    _fill(inner, tensors)
    return model


def _is_packed(target: Target, group: Group) -> bool:
    """Tell if a weight is ternary, and smaller for it."""
    weight = target.parameter.detach()
    if why_not(target) or not weight.isfinite().all():
        return False
    division = divide(target.layout, group)
    saves = packed_bytes(weight.numel(), division.groups, weight.dtype) < weight.numel() * weight.element_size()
    return saves and is_ternary(weight, division)


def _read_header(
    path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> tuple[Group, dict[str, tuple[torch.Size, torch.dtype]]]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path must be a file that save_ternary wrote, got {path}, which is not one")
    try:
        group = check_group(json.loads(metadata["group"]))
        found = json.loads(metadata["layers"]).items()
        layers = {name: (torch.Size(one["shape"]), _dtype(one["dtype"])) for name, one in found}
        for shape, _ in layers.values():
            torch.empty(shape, device="meta")  # an error where there can be none of it
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(
            f"path must be a file that save_ternary wrote, got {path}, whose header is not one ({error})"
        ) from error
    return group, layers


def _dtype(name: object) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_TYPES}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[str(name)]


def _unpacked(
    path: str | os.PathLike[str], target: Target | None, codes: Tensor, scales: Tensor, group: Group, shape: torch.Size
) -> Tensor:
    if target is None or tuple(target.parameter.shape) != tuple(shape) or why_not(target):
        return torch.empty(shape, device="meta")  # which `_fill` refuses by name and shape
    try:
        return unpack(codes, scales, divide(target.layout, group), shape)
    except ValueError as error:
        raise ValueError(f"path must be a file that save_ternary wrote, got {path}: {target.name}: {error}") from error


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = untied(model.state_dict())
    if problems := list(_differing(own, tensors)):
        raise ValueError(f"model must be built as the saved one was, got one where {'; '.join(problems[:5])}")
    held = model.state_dict()  # detached tensors of the same memory
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)


def _differing(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is not in it" for name in sorted(saved.keys() - own.keys()))
    yield from (f"{name} is not in the file" for name in sorted(own.keys() - saved.keys()))
    for name in sorted(own.keys() & saved.keys()):
        here, there = tuple(own[name].shape), tuple(saved[name].shape)
        if here != there:
            yield f"{name} is {here} here and {there} in the file"
        elif saved[name].is_meta:
            yield f"{name} cannot be divided into groups here"
