"""Attributes of a model's modules, kept while the model is run or exported."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["attributes_kept"]

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, deque)
MUTABLE = frozenset((*MAPPINGS, *SEQUENCES, set))
LARGE = 10_000  # containers with more entries, such as vocabularies, are not searched for further containers


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give modules back the attributes that they had, each the same object, and the entries of their lists, dicts and sets.

    `torch.export` puts a copy in the place of every list, dict and tuple, so that two modules which shared one part ways; and a
    forward pass may note what it saw (`self.shapes.append(...)`). Values inside tensors and other objects are not restored.
    """
    held, empty = _containers(model)
    copies = [holder.copy() for holder in held]
    try:
        yield
    finally:
        for holder, before in zip(held, copies, strict=True):
            if not _same(holder, before):
                _restore(holder, before)
        for holder in empty:
            if holder:
                holder.clear()


def _containers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """List the attributes of each module and the containers in them that can be changed, each once; then the empty ones."""
    held, empty = list[Any](), list[Any]()
    seen: set[int] = {id(model)}
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if isinstance(item, nn.Module):
            item = item.__dict__
        if not isinstance(item, tuple):
            held.append(item)
        if len(item) > LARGE:
            continue
        for x in item.values() if isinstance(item, dict) else item:
            kind = type(x)
            if kind in MUTABLE and not x:
                empty.append(x)  # most are the hooks of a module
            elif (kind in MUTABLE or isinstance(x, tuple | nn.Module)) and id(x) not in seen:
                seen.add(id(x))
                stack.append(x)
    return held, empty


def _same(holder: Any, before: Any) -> bool:
    """Tell if a container holds the same objects in the same order; a set, the same objects."""
    if len(holder) != len(before):
        return False
    if isinstance(holder, dict):
        return all(map(operator.is_, holder, before)) and all(map(operator.is_, holder.values(), before.values()))
    if isinstance(holder, set):
        return set(map(id, holder)) == set(map(id, before))
    return all(map(operator.is_, holder, before))


def _restore(holder: Any, before: Any) -> None:
    if isinstance(holder, dict) and list(holder) == list(before):
        for key, value in before.items():
            if holder[key] is not value:
                holder[key] = value
        return
    holder.clear()
    holder.extend(before) if isinstance(holder, SEQUENCES) else holder.update(before)
