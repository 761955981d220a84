"""Header of a small model's file: read as data of known kinds, and its sizes held against the weights and the dense model.

A header is whatever somebody has written. So only numbers of `SIZES` are taken, and each has to be that of the dense model, or
a smaller one that the weights of the file agree with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasterai.graph.inputs import InputCut
from fasterai.model.names import own_tensors
from fasterai.model.slim_norms import dense_size, is_slim, is_torchs
from fasterai.model.supported import directions
from fasterai.prune.features.files import SELECTORS
from fasterai.prune.surgery.modules import EXPERTS, HEADS, STREAMS, WIDTHS, new_sizes
from fasterai.prune.surgery.rewriting import Rewrite
from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention

__all__ = ["SIZES", "Header", "read_header", "sizes_of", "stamp", "unfit_sizes"]

SMALL_FORMAT = "fasterai-small-1"
SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels", "num_groups"),
    *("normalized_shape", "embedding_dim", "num_parameters", "input_size", "hidden_size", *HEADS, *WIDTHS, *STREAMS),
    *("nf", "nx", "in1_features", "in2_features", "bias_shape", "kdim", "vdim", *EXPERTS),
)
PARTS = ("sizes", "slim", "traits", "dense")
LATER = ("inputs", SELECTORS, "rewrites")
Size = int | tuple[int, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Header:
    """Header of a file of `save_small`.

    Attributes:
        sizes: Module -> attribute -> size.
        slim: Names of `nn.MultiheadAttention`s that have lost heads -> heads; of norms over fewer channels -> their number
            before.
        traits: Module -> its class, and its settings.
        dense: Tensor -> its shape before the first cut, where known.
        inputs: Argument -> what the small model takes of that input, where it takes less.
        rewrites: Module that runs a traced copy of its code -> the edits of it.
        is_stamped: True if a stamp shows that nobody has changed it.
    """

    sizes: Mapping[str, Mapping[str, Size]]
    slim: Mapping[str, int]
    traits: Mapping[str, tuple[str, Mapping[str, Any]]]
    dense: Shapes
    inputs: Mapping[str, InputCut] = field(default_factory=dict)
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)
    is_stamped: bool = False


def stamp(metadata: Mapping[str, str], shapes: Shapes) -> str:
    """Return a sum of a file's header, by which one that was changed later is told."""
    parts = (*PARTS, *(part for part in LATER if part in metadata))  # files of before have none of these
    content = [[metadata.get(part) for part in parts], sorted((name, list(shape)) for name, shape in shapes.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_header(path: str, metadata: Mapping[str, str], shapes: Shapes) -> Header:
    """Read a file's metadata.

    Raises:
        ValueError: It is not what `save_small` writes, or was changed since.
    """
    if metadata.get("format") != SMALL_FORMAT:
        raise ValueError(f"path must be a file that save_small wrote, got {path}, which is not one")
    if "stamp" in metadata and metadata["stamp"] != stamp(metadata, shapes):  # files of before have none
        raise ValueError(f"path must be a file as save_small wrote it, got {path}, whose header was changed")
    try:
        sizes, slim, traits, dense = (json.loads(metadata.get(part, "{}")) for part in PARTS)
        _expect("sizes" in metadata and "slim" in metadata, "sizes and slim")
        _expect(
            _is_map(sizes, lambda own: _is_map(own, _is_size) and set(own) <= set(SIZES)), f"sizes of {', '.join(SIZES[:3])}..."
        )
        _expect(_is_map(slim, lambda heads: _is_number(heads) and heads > 0), "numbers of heads")
        _expect(_is_map(traits, _is_trait), "classes with their settings")
        cuts = [InputCut.from_dict(one) for one in _list(json.loads(metadata.get("inputs", "[]")))]
        given = json.loads(metadata.get("rewrites", "{}"))
        _expect(isinstance(given, dict), "edits by module")
        rewrites = {name: Rewrite.from_dict(one) for name, one in given.items()}
        _expect(_is_map(dense, lambda shape: isinstance(shape, list) and all(map(_is_number, shape))), "shapes")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path must be a file that save_small wrote, got {path}, whose header is not one ({error})") from error
    own = {name: {a: tuple(v) if isinstance(v, list) else v for a, v in found.items()} for name, found in sizes.items()}
    classes, shapes_before = {n: (kind, found) for n, (kind, found) in traits.items()}, {n: tuple(s) for n, s in dense.items()}
    return Header(own, slim, classes, shapes_before, {cut.argument: cut for cut in cuts}, rewrites, "stamp" in metadata)


def _list(value: Any) -> list[Any]:
    _expect(isinstance(value, list), "lists of what stays of inputs")
    return list(value)


def _expect(holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"it must hold {wanted}")


def _is_map(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_entry, value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_number(value) or isinstance(value, list)


def _is_trait(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)


# --- sizes against weights -------------------------------------------------------------------------------------------


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """Return the sizes that a module keeps as attributes."""
    return {a: v for a in SIZES if isinstance(v := vars(module).get(a), int | tuple) and not isinstance(v, bool)}


def unfit_sizes(model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Say what a header's sizes have that neither the dense model nor the file's weights have."""
    modules, held = dict(model.named_modules()), dict(_walk(model))
    saved = {id(held[name]): tuple(x.shape) for name, x in tensors.items() if name in held}  # a tied one has its first name
    for name, module in modules.items():
        own, found, said = sizes_of(module), header.sizes.get(name, {}), name or "the model"
        yield from (f"{said}.{a} is not in the file" for a in own if a not in found and a not in EXPERTS)
        yield from (f"{said}.{a} is no size here" for a in found if a not in own and getattr(module, a, None) is not None)
        count = header.slim.get(name)
        whole = dense_size(module) if count is not None and (is_torchs(module) or is_slim(module)) else count
        if count != whole:
            yield f"{said} averages over {whole} channels here and {count} in the file"
        if problem := _unfit(module, own, found, saved, header.slim.get(name), header.is_stamped):
            yield f"{said}.{problem}"


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give names and tensors of a state dict, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


Saved = Mapping[int, tuple[int, ...]]


def _unfit(
    module: nn.Module, own: Mapping[str, Any], found: Mapping[str, Size], saved: Saved, heads: int | None, stamped: bool
) -> str:
    """Say which size of a module is none that it may have, or nothing."""
    ways = _ways(module, saved, heads, stamped)
    wrong = [[a for a, v in way.items() if a in found and found[a] != v] for way in ways]
    if [] not in wrong:
        a = min(wrong, key=len)[0]
        return f"{a} is {found[a]!r} in the file, whose weights have {' or '.join(sorted({str(way[a]) for way in ways}))}"
    known = set(ways[0])
    for a, v in found.items():
        if (
            a in ("normalized_shape", "num_channels")
            and heads is not None
            and not saved.keys() & {id(x) for _, x in _walk(module)}
        ):
            continue  # a norm without a scale is over what it is given
        if a in own and a not in known and v != own[a] and not _is_shown(own[a], v, _cut(module, saved)):
            return f"{a} is {own[a]!r} here and {v!r} in the file, which its weights do not show"
    return ""


def _ways(module: nn.Module, saved: Saved, heads: int | None, stamped: bool) -> list[dict[str, Any]]:
    """Return the sizes that a module of torch's may have with the weights of the file; none of another module."""
    if isinstance(module, nn.MultiheadAttention | SlimMultiheadAttention):
        return [_of_attention(module, saved, heads)]
    if not (type(module).__module__.startswith("torch.nn.") or hasattr(module, "nf")):
        return [{}]
    own = dict([*own_tensors(module), *directions(module)])
    old = {name: tuple(x.shape) for name, x in own.items()}
    new = {name: saved.get(id(x), old[name]) for name, x in own.items()}
    if not old or not any(new.values()):
        return [{}]
    if isinstance(module, nn.GroupNorm) and "weight" in new:
        return _of_groups(module, new["weight"][0], heads, stamped)
    ways = [new_sizes(module, old, new, {})]
    if "weight" in new:  # of groups, the same channels of each went, or whole ones
        ways.append(new_sizes(module, old, new, {("weight", 0): np.arange(new["weight"][0])}))
    return [way for way in ways if _divides(way)] or ways


def _of_groups(module: nn.GroupNorm, channels: int, width: int | None, stamped: bool) -> list[dict[str, Any]]:
    """Return a group norm's sizes: whole groups went, or channels of each where the file says how many each had.

    Both may have gone, one after the other. Weights do not tell how, so that only a header with its stamp is taken at its word.
    """
    if width is None:
        counts = [max(1, channels // (module.num_channels // module.num_groups))]
    else:
        counts = list(range(1, module.num_groups + 1)) if stamped else [module.num_groups]
    fit = [n for n in counts if channels % n == 0 and (width is None or channels // n < width)]
    return [{"num_channels": channels, "num_groups": n} for n in fit or counts]


def _divides(way: Mapping[str, Any]) -> bool:
    groups = way.get("groups") or way.get("num_groups") or 1
    return not any(way.get(a, 0) % groups for a in ("in_channels", "out_channels", "num_channels"))


def _of_attention(module: nn.Module, saved: Saved, heads: int | None) -> dict[str, Any]:
    """Return an attention's sizes, as its weights have them; heads go as a whole."""
    shapes = {name: saved.get(id(x), tuple(x.shape)) for name, x in _walk(module)}
    joined = "in_proj_weight" in shapes
    rows = shapes["in_proj_weight"][0] // 3 if joined else shapes["q_proj_weight"][0]
    reads = {f"{x}dim": shapes["in_proj_weight" if joined else f"{x}_proj_weight"][1] for x in "kv"}
    own = vars(module)
    count = own["num_heads"] if heads is None else rows // own["head_dim"]
    wanted = count if heads in (None, count) else -1
    return {**reads, "embed_dim": shapes["out_proj.weight"][0], "num_heads": wanted}


def _cut(module: nn.Module, saved: Saved) -> set[tuple[int, int]]:
    """Return sizes of dimensions, before and in the file, of all that is below a module and has been cut."""
    shapes = [(tuple(x.shape), saved[id(x)]) for _, x in _walk(module) if id(x) in saved]
    return {(b, a) for before, after in shapes for b, a in zip(before, after, strict=True) if b != a}


def _is_shown(before: Any, after: Any, cut: set[tuple[int, int]]) -> bool:
    """Tell if the weights below a module have become less so as a size of it has."""
    if isinstance(before, tuple) or isinstance(after, tuple):
        alike = isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after)
        return alike and all(b == a or (b, a) in cut for b, a in zip(before, after, strict=True))
    if not 0 < after < before:
        return False
    return any(b * after == a * before for b, a in cut)
