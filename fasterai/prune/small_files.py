"""Small model in a file: its weights, and the sizes that its modules keep as numbers, without pickle."""

from __future__ import annotations

import dis
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.files import untied, write_tensors
from fasterai.graph.inputs import input_cuts, put_inputs
from fasterai.model.names import unwrap
from fasterai.model.slim_norms import can_be_slim, is_slim, put_dense_size
from fasterai.model.supported import check_model, check_whole
from fasterai.prune.features.embeddings import CATEGORIES, kept_embeddings
from fasterai.prune.features.files import SELECTORS, read_entry
from fasterai.prune.features.selector import InputSelector
from fasterai.prune.small_header import SIZES, SMALL_FORMAT, Header, Shapes, read_header, sizes_of, stamp, unfit_sizes
from fasterai.prune.surgery.dense_shapes import dense_shapes, note, put_note
from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention, encoders_of
from fasterai.prune.surgery.traced_copies import put_class, rewrite_of, traced_class
from fasterai.prune.surgery.tracing import plain_class

__all__ = ["load_small", "save_small"]

#: What differs between two runs of one network, or counts in training only.
PASSING = {
    *("training", "inplace", "p", "momentum", "dropout", "drop_prob", "drop_rate", "dropout_p", "attention_dropout"),
    *("fused_attn", "use_nested_tensor", "dense_size", "grad_checkpointing", "gradient_checkpointing", "name_or_path"),
}


def save_small(
    path: str | os.PathLike[str], model: nn.Module, *, selector: InputSelector | Mapping[str, InputSelector] | None = None
) -> None:
    """Save a model with channels removed as safetensors; the sizes that its modules keep go into the header.

    Args:
        path: The file; it is written whole or not at all.
        model: The model, wrapped or not. One that has lost nothing is saved as well, and loads into its like.
        selector: The choice of the inputs that it reads, or one for each argument by its name; `InputSelector.load(path)` reads
            it again.

    Raises:
        TypeError: The model is no module, or the selector none.
        ValueError: A parameter holds no values.
    """
    inner = unwrap(check_model(model))
    if empty := [name for name, parameter in inner.named_parameters() if parameter.is_meta]:
        raise ValueError(f"model must hold its weights, got {empty[0]} on the meta device")
    tensors = untied(inner.state_dict())
    entries: dict[str, Any] = {
        "sizes": {name: own for name, m in inner.named_modules() if (own := sizes_of(m))},
        "slim": _slim(inner),
        "traits": _traits(inner),
        "dense": dense_shapes(inner),
        **_selectors(selector),
    }
    if rewrites := {name: found.to_dict() for name, m in inner.named_modules() if (found := rewrite_of(m))}:
        entries["rewrites"] = rewrites
    if cuts := input_cuts(inner):
        entries["inputs"] = [cut.to_dict() for cut in cuts.values()]
    header = {"format": SMALL_FORMAT} | {key: json.dumps(value) for key, value in entries.items()}
    header["stamp"] = stamp(header, {name: tuple(x.shape) for name, x in tensors.items()})
    write_tensors(path, tensors, header)


def load_small(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Shrink a freshly built dense model to the saved sizes, and load the weights.

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
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"path must be a file that save_small wrote, got {path}: {error}") from error
    header = read_header(str(path), metadata, {name: tuple(x.shape) for name, x in tensors.items()})
    inner = check_whole(model)
    entry = read_entry(path, json.loads(metadata[SELECTORS])) if SELECTORS in metadata else {}
    categories = entry.get(CATEGORIES, {"keep": [], "size": -1})
    with kept_embeddings(inner, categories["keep"], categories["size"]):
        _fill(inner, header, tensors)
    return model


def _fill(inner: nn.Module, header: Header, tensors: dict[str, Tensor]) -> None:
    """Shrink a dense model to the sizes of a file, and load its weights.

    Raises:
        ValueError: It is another model. Nothing is changed then.
    """
    own = dense_shapes(inner)
    problems = [
        *_differing_tensors(inner, tensors, header.dense, own),
        *_missing_modules(inner, header.slim, header.sizes),
        *_differing_modules(inner, header.traits, header.slim),
    ]
    problems = problems or list(unfit_sizes(inner, header, tensors))  # which speak of a model that fits
    if problems:
        raise ValueError(
            f"model must be the dense model that the small one was made of, got one where {'; '.join(problems[:5])}"
        )
    classes = _rewritten(inner, header)
    for name, heads in header.slim.items():
        if can_be_slim(norm := inner.get_submodule(name)):
            put_dense_size(norm, heads)
            continue
        parent = inner.get_submodule(name.rpartition(".")[0])
        attention = parent.get_submodule(name.rpartition(".")[2])
        if isinstance(attention, nn.MultiheadAttention):
            for encoder in encoders_of(inner, attention):
                encoder.use_nested_tensor = False
            setattr(parent, name.rpartition(".")[2], SlimMultiheadAttention(attention, heads))
    for name, sizes in header.sizes.items():
        module = inner.get_submodule(name)
        for attribute in sizes.keys() & sizes_of(module).keys():  # others are what a first run fills
            setattr(module, attribute, sizes[attribute])
    for name, cls in classes.items():
        put_class(inner.get_submodule(name), cls)
    _put(inner, tensors)
    _note(inner, own | dict(header.dense))
    put_inputs(inner, header.inputs)


def _rewritten(inner: nn.Module, header: Header) -> dict[str, type[nn.Module]]:
    """Make the classes of the modules that run a traced copy of their code; it is traced with the sizes of the file.

    Raises:
        ValueError: The code of one is another. Nothing is changed then.
    """
    held = [(inner.get_submodule(name), sizes) for name, sizes in header.sizes.items() if header.rewrites]
    given = [(module, a, sizes[a]) for module, sizes in held for a in sizes.keys() & sizes_of(module).keys()]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in given]
    try:
        for module, attribute, size in given:
            setattr(module, attribute, size)
        return {name: traced_class(inner.get_submodule(name), one) for name, one in header.rewrites.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"model must be the dense model that the small one was made of, got one where {error}") from error
    finally:
        for module, attribute, size in before:
            setattr(module, attribute, size)


def _selectors(selector: InputSelector | Mapping[str, InputSelector] | None) -> dict[str, Any]:
    """Return the header's entry of selectors; none where nothing is selected."""
    given = {"": selector} if isinstance(selector, InputSelector) else dict(selector or {})
    if wrong := [one for one in given.values() if not isinstance(one, InputSelector)]:
        raise TypeError(f"selector must be an InputSelector, or a dict of them, got {wrong[0]!r}")
    return {SELECTORS: {name: one.to_dict() for name, one in given.items()}} if given else {}


def _slim(model: nn.Module) -> dict[str, int]:
    heads = {n: m.num_heads for n, m in model.named_modules() if isinstance(m, SlimMultiheadAttention)}
    return heads | {n: int(vars(m)["dense_size"]) for n, m in model.named_modules() if is_slim(m)}


def _traits(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """Collect each module's class and settings without its sizes; of the model itself only if it is one of torch's.

    In a model of one's own, training leaves counters and scores.
    """
    return {
        name: (plain_class(module).__name__, {a: v for a, v in vars(module).items() if _is_trait(a, v)})
        for name, module in model.named_modules()
        if name or type(module).__module__.startswith("torch.nn.")
    }


def _is_trait(attribute: str, value: Any) -> bool:
    return not attribute.startswith("_") and attribute not in PASSING and attribute not in SIZES and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float) and math.isnan(value):
        return False  # it differs from itself
    return value is None or isinstance(value, bool | int | float | str)


def _differing_tensors(model: nn.Module, tensors: Mapping[str, Tensor], dense: Shapes, own_dense: Shapes) -> Iterator[str]:
    own = model.state_dict()
    yield from (f"{n} is not in it" for n in tensors if n not in own)
    yield from (f"{n} is not in the file" for n in untied(own) if n not in tensors)
    for n, small in tensors.items():
        if n not in own or own[n].shape == small.shape:
            continue
        here, there = tuple(own[n].shape), dense.get(n, tuple(small.shape))
        is_larger = len(here) == small.dim() and all(a >= b for a, b in zip(here, small.shape, strict=True))
        if not is_larger or (n in dense and own_dense.get(n, here) != there):
            cut = f", cut to {tuple(small.shape)}" if there != small.shape else ""
            yield f"{n} is {here} here and {there} in the file{cut}"


def _missing_modules(model: nn.Module, slim: Mapping[str, int], sizes: Mapping[str, Any]) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name in slim:
        if can_be_slim(modules.get(name)):
            continue
        if not name or not isinstance(modules.get(name), nn.MultiheadAttention | SlimMultiheadAttention):
            yield f"{name} is no nn.MultiheadAttention"
        elif _has_more(modules[name]):
            yield f"{name} has bias_k or add_zero_attn, with which no heads are removed"
    for name, found in sizes.items():
        yield from (f"{name or 'the model'} has no {a}" for a in found if not hasattr(modules.get(name), a))


def _has_more(attention: nn.Module) -> bool:
    return vars(attention).get("add_zero_attn", False) or getattr(attention, "bias_k", None) is not None


def _differing_modules(model: nn.Module, traits: Mapping[str, Any], slim: Mapping[str, int]) -> Iterator[str]:
    own = json.loads(json.dumps(_traits(model)))  # tuples are lists in the file
    if traits:
        yield from (f"{name} is not in the file" for name in own if name and name not in traits)
    for name, (there, known) in traits.items():
        here, found = own.get(name, (None, {}))
        said = name or "the model"
        if here is None and name:
            yield f"{said} is not in it"
        elif here not in (None, there) and name not in slim:
            yield f"{said} is a {here} here and a {there} in the file"
        else:
            yield from (
                f"{said}.{a} is {found[a]!r} here and {v!r} in the file"
                for a, v in known.items()
                if found.get(a, v) != v and not _is_filled_by_a_run(model.get_submodule(name), a, found[a], v)
            )


def _is_filled_by_a_run(module: nn.Module, attribute: str, here: Any, there: Any) -> bool:
    """Tell if an attribute is what a run notes: nothing in one of two models, or set by another method than `__init__`."""
    if attribute in inspect.signature(type(module).__init__).parameters:
        return False
    return here in (None, []) or there in (None, []) or _is_set_in_a_run(type(module), attribute)


def _is_set_in_a_run(kind: type, attribute: str) -> bool:
    """Tell if a method of a class other than `__init__` assigns an attribute, as one that notes the sizes that it meets."""
    own = [c for c in kind.__mro__ if not c.__module__.startswith("torch.nn.")]
    methods = [m for c in own for m in vars(c).values() if inspect.isfunction(m)]
    return any(
        any(i.opname == "STORE_ATTR" and i.argval == attribute for i in dis.get_instructions(m))
        for m in methods
        if m.__name__ != "__init__"
    )


def _note(model: nn.Module, dense: Shapes) -> None:
    """Note the dense shapes on the modules, for when the model is saved again."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        put_note(module, note(module, {n.removeprefix(dot): s for n, s in dense.items() if n.startswith(dot)}))


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
