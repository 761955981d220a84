"""L4. A small model in a file: its weights and the numbers that its modules keep, without pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasterai.core.targets import unwrap
from fasterai.prune.admission import check_model, check_whole
from fasterai.prune.attention import SlimMultiheadAttention
from fasterai.prune.modules import HEADS, STREAMS, WIDTHS

__all__ = ["load_small", "save_small"]

FORMAT = "fasterai-small-1"
SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels", "num_groups"),
    *("normalized_shape", "embedding_dim", "num_parameters", "input_size", "hidden_size", *HEADS, *WIDTHS, *STREAMS),
)


def save_small(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Save a model that channels were taken out of, as safetensors; the numbers of its modules go into the header.

    Args:
        path: The file; it is written whole or not at all.
        model: The model, wrapped or not. One that has lost nothing is saved as well, and loads into its like.

    Raises:
        TypeError: The model is no module.
        ValueError: A parameter holds no values.
    """
    from safetensors.torch import save

    inner = unwrap(check_model(model))
    if empty := [name for name, parameter in inner.named_parameters() if parameter.is_meta]:
        raise ValueError(f"model must hold its weights, got {empty[0]} on the meta device")
    tensors = _untied({n: t.detach().contiguous() for n, t in inner.state_dict().items()})
    header = {"format": FORMAT, "sizes": json.dumps(_sizes(inner)), "slim": json.dumps(_slim(inner))}
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        part.write_bytes(save(tensors, header))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def load_small(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Shrink a freshly built dense model to what was saved, and load the weights.

    Args:
        path: A file that `save_small` wrote.
        model: The dense model, built as the one was that channels were taken out of; changed in place, and returned.

    Raises:
        TypeError: The model is no module.
        ValueError: The file is truncated or foreign, or the model is wrapped or another one. Nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"path must be a file that save_small wrote, got {path}: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"path must be a file that save_small wrote, got {path}, which is not one")
    inner = check_whole(model)
    slim, all_sizes = json.loads(header["slim"]), json.loads(header["sizes"])
    _check(inner, tensors, slim, all_sizes)
    for name, heads in slim.items():
        parent = inner.get_submodule(name.rpartition(".")[0])
        attention = parent.get_submodule(name.rpartition(".")[2])
        if isinstance(attention, nn.MultiheadAttention):
            setattr(parent, name.rpartition(".")[2], SlimMultiheadAttention(attention, heads))
    for name, sizes in all_sizes.items():
        module = inner.get_submodule(name)
        for attribute, value in sizes.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    _put(inner, tensors)
    return model


def _sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> the numbers that it keeps of its own size."""
    found = {}
    for name, module in model.named_modules():
        own = {a: v for a in SIZES if isinstance(v := vars(module).get(a), int | tuple) and not isinstance(v, bool)}
        if own:
            found[name] = own
    return found


def _slim(model: nn.Module) -> dict[str, int]:
    return {n: m.num_heads for n, m in model.named_modules() if isinstance(m, SlimMultiheadAttention)}


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors once, under their first name."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            result[name] = tensor
    return result


def _check(model: nn.Module, tensors: dict[str, torch.Tensor], slim: dict[str, int], sizes: dict[str, Any]) -> None:
    own, modules = model.state_dict(), dict(model.named_modules())
    problems = [f"{n} is not in it" for n in tensors if n not in own]
    problems += [f"{n} is not in the file" for n in _untied(dict(own)) if n not in tensors]
    problems += [
        f"{n} is {tuple(own[n].shape)} here and {tuple(t.shape)} in the file"
        for n, t in tensors.items()
        if n in own and (own[n].dim() != t.dim() or any(a < b for a, b in zip(own[n].shape, t.shape, strict=True)))
    ]
    problems += [
        f"{n} is no nn.MultiheadAttention"
        for n in slim
        if not n or not isinstance(modules.get(n), nn.MultiheadAttention | SlimMultiheadAttention)
    ]
    problems += [
        f"{n or 'the model'} has no {a}" for n, found in sizes.items() for a in found if not hasattr(modules.get(n), a)
    ]
    if problems:
        raise ValueError(
            f"model must be the dense model that the small one was made of, got one where {'; '.join(problems[:5])}"
        )


@torch.no_grad()
def _put(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and f"{dot}{name}" in tensors:
                parameter.data = tensors[f"{dot}{name}"].to(parameter.device, parameter.dtype, copy=True)
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{dot}{name}" in tensors:
                module._buffers[name] = tensors[f"{dot}{name}"].to(buffer.device, buffer.dtype, copy=True)
