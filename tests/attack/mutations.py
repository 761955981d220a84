"""Changes by chance: of nested states, and of bytes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.attack import oracles

WRONG: tuple[Any, ...] = (
    *(None, "x", "", -5, 10**12, 0.37, -0.5, 1e308, math.nan, math.inf, True, [], {}, [1, "x"], {"x": 1}, 2**70),
    *(torch.tensor(3.0), torch.zeros(2, 2), torch.tensor([True, False])),
)
#: Changes that no reader can see, as what is there instead is as good.
UNSEEN = ("values", "extra")


def mutated(draw: random.Random, state: Any, plain: bool = False) -> tuple[Any, str, str]:
    """A copy of a state with one change: the state, the kind of the change, and the change in words.

    Args:
        draw: Chance.
        state: Dicts and lists of numbers, texts and tensors.
        plain: True to put nothing in that JSON does not know.
    """
    result = oracles.copied(state)
    containers = [(path, node) for path, node in _walk(result) if isinstance(node, dict | list) and node]
    shallow = [pair for pair in containers if len(pair[0]) < 3]
    path, node = draw.choice(shallow if shallow and draw.random() < 0.6 else containers)
    key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    kind = draw.choice(("remove", "wrong", "wrong", "swap", "rename", "extra", "alter", "alter"))
    where = "/".join(map(str, (*path, key)))
    if kind == "remove":
        del node[key]
    elif kind == "swap" and len(node) > 1:
        other = draw.choice([k for k in (node if isinstance(node, dict) else range(len(node))) if k != key])
        node[key], node[other] = node[other], node[key]
        where += f" with {other}"
    elif kind == "rename" and isinstance(node, dict):
        node[f"{key}x" if isinstance(key, str) else -1] = node.pop(key)
    elif kind == "extra":
        node.update({"of a later version": 1}) if isinstance(node, dict) else node.append(node[-1])
        kind = "extra" if isinstance(node, dict) else "longer"
    elif kind == "alter":
        node[key], kind = _altered(draw, node[key])
    else:
        kind = "wrong"
        node[key] = draw.choice([x for x in WRONG if not (plain and isinstance(x, Tensor))])
    return result, kind, f"{kind} at {where} -> {_said(node, key)}"


def _said(node: Any, key: Any) -> str:
    value = node.get(key, "gone") if isinstance(node, dict) else node[key] if key < len(node) else "gone"
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _walk(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    inner = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    return [(path, node), *(found for key, value in inner for found in _walk(value, (*path, key)))]


def _altered(draw: random.Random, value: Any) -> tuple[Any, str]:
    """A value of the same type, and if a reader can know it from the right one."""
    if isinstance(value, Tensor):
        return _altered_tensor(draw, value)
    if isinstance(value, bool):
        return not value, "values"
    if isinstance(value, int | float):
        return draw.choice((value + 1, -value - 1, value * 1000 + 7, value / 2)), "number"
    if isinstance(value, str):
        return draw.choice((value[:-1], value + "x", value.upper())), "text"
    return ("x" if value is None else type(value)(value)), "wrong" if value is None else "extra"


def _altered_tensor(draw: random.Random, value: Tensor) -> tuple[Tensor, str]:
    changes = {
        "values": lambda: ~value if value.dtype is torch.bool else value.flip(0) if value.dim() else value + 1,
        "shape": lambda: value.unsqueeze(0),
        "empty": lambda: value.flatten()[:0],
        "shorter": lambda: value[:-1] if value.dim() else value.reshape(1, 1),
        "dtype": lambda: value.to(torch.int16 if value.dtype is not torch.int16 else torch.float64),
        "complex": lambda: value.to(torch.complex64),
        "meta": lambda: value.to("meta"),
    }
    name = draw.choice(tuple(changes))
    return changes[name](), name


def mutated_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """The content of a file with its bits flipped, cut, or moved."""
    kind = draw.choice(("bits", "bits", "cut", "longer", "zeros", "head", "empty", "foreign"))
    data = bytearray(content)
    if kind in ("bits", "head"):
        end = len(data) if kind == "bits" else min(len(data), 600)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "longer":
        data += draw.randbytes(draw.randint(1, 64))
    elif kind == "zeros":
        begin = draw.randrange(len(data))
        data[begin : begin + 64] = bytes(len(data[begin : begin + 64]))
    else:
        data = (
            bytearray() if kind == "empty" else bytearray(draw.choice((b"{}", b"\x80\x04N.", b"PK\x03\x04", b"null", b"[1]")))
        )
    return bytes(data), kind


def mutated_header(draw: random.Random, content: bytes) -> tuple[bytes, str, str]:
    """A file of safetensors with one change in its header, where values of JSON lie inside of texts."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if metadata and draw.random() < 0.85:
        inner = {name: _json_or_text(text) for name, text in metadata.items()}
        changed, kind, words = mutated(draw, inner, plain=True)
        header["__metadata__"] = {str(n): x if isinstance(x, str) else json.dumps(x) for n, x in changed.items()}
    else:
        header, kind, words = mutated(draw, header, plain=True)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :], kind, words


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
