"""File of a ticket: safetensors of weights, packed decisions and places, with all else as JSON in the header.

A file is whatever somebody has written. It is checked part by part before a ticket is made of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.files import write_tensors
from fasterai.model.snapshots import sum_of
from fasterai.sparse.tickets.units import Place, Units

__all__ = ["read_ticket", "stamp_of", "write_ticket"]

TICKET_FORMAT = "fasterai-ticket-1"
WEIGHTS = "weights/"

#: What a ticket is made of: `weights`, `units`, `settings` and `results`.
Content = Mapping[str, Any]


def write_ticket(path: str | os.PathLike[str], content: Content) -> None:
    """Write a ticket's file, whole or not at all; equal tickets are equal bytes."""
    tensors = _tensors(content)
    header = _header(content)
    write_tensors(path, tensors, header | {"stamp": _sum(header, tensors)})


def stamp_of(content: Content) -> str:
    """Return a sum of all that a ticket holds: header and tensors."""
    return _sum(_header(content), _tensors(content))


def _header(content: Content) -> dict[str, str]:
    units = [[one.name, len(one.keep), [[p.name, [*map(len, p.axes)]] for p in one.places]] for one in content["units"]]
    entries = {"units": units, "settings": content["settings"], "results": content["results"]}
    return {"format": TICKET_FORMAT} | {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}


def _tensors(content: Content) -> dict[str, Tensor]:
    tensors = {WEIGHTS + name: x.contiguous() for name, x in content["weights"].items()}
    for i, one in enumerate(content["units"]):
        tensors[f"keep/{i}"] = torch.from_numpy(np.packbits(one.keep.numpy()))
        for j, place in enumerate(one.places):
            tensors[f"place/{i}/{j}"] = torch.cat([axis.to(torch.int32) for axis in place.axes])
    return tensors


def _sum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return a sum of a file's content; a copy that was cut or changed has another one."""
    return sum_of(tensors, {key: value for key, value in header.items() if key != "stamp"})


def read_ticket(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ticket's file as the arguments of a `Ticket`.

    Raises:
        ValueError: It is truncated, changed or foreign; what is wrong is named.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        _expect(header.get("format") == TICKET_FORMAT, "a ticket's format")
        _expect(header.get("stamp") == _sum(header, tensors), "the content that it was saved with")
        return _parts(header, tensors)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"path must be a file that Ticket.save wrote, got {path}: {error}") from error


def _parts(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    described, settings, results = (json.loads(header.get(key, "null")) for key in ("units", "settings", "results"))
    _expect(_is_map(settings, lambda value: isinstance(value, str)), "settings in words")
    _expect(_is_list(results, lambda value: value is None or isinstance(value, float)), "results that are numbers")
    _expect(_is_list(described, _is_described), "units")
    weights = {name.removeprefix(WEIGHTS): x for name, x in tensors.items() if name.startswith(WEIGHTS)}
    units = [_units(i, one, tensors, weights) for i, one in enumerate(described)]
    return {"weights": weights, "units": units, "settings": settings, "results": results}


def _is_described(value: Any) -> bool:
    named = isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and _is_count(value[1])
    return named and _is_list(value[2], lambda p: _is_list(p) and len(p) == 2 and isinstance(p[0], str) and _is_sizes(p[1]))


def _units(i: int, described: Any, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Units:
    """Make units of a file's description of them."""
    name, count, places = described
    packed = tensors.get(f"keep/{i}")
    _expect(packed is not None and packed.dtype is torch.uint8 and packed.shape == (-(-count // 8),), f"decisions of {name}")
    assert packed is not None
    keep = torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(np.bool_))
    return Units(name, keep, tuple(_places(i, places, count, tensors, weights)))


def _places(
    i: int, described: Any, count: int, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Iterator[Place]:
    for j, (name, sizes) in enumerate(described):
        joined = tensors.get(f"place/{i}/{j}")
        fits = joined is not None and joined.dtype is torch.int32 and joined.shape == (sum(sizes),)
        _expect(fits and name in weights and weights[name].numel() == math.prod(sizes), f"a place of units in {name}")
        assert joined is not None
        ends = [0, *accumulate(sizes)]
        axes = tuple(joined[a:b] for a, b in pairwise(ends))
        low, high = (sum(int(f(axis)) for axis in axes if len(axis)) for f in (torch.min, torch.max))
        _expect(low >= 0 and high < max(1, count), f"units in {name} that there are")
        yield Place(name, axes)


def _expect(holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"it must hold {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: Any) -> bool:
    return _is_list(value, _is_count)


def _is_list(value: Any, is_entry: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, list) and all(map(is_entry, value))


def _is_map(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_entry, value.values()))
