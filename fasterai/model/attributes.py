"""Attributes of a model's modules, kept while the model is run or exported."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
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
    held = [(holder, holder.copy()) for holder in _holders(model)]
    try:
        yield
    finally:
        for holder, before in held:
            if not _same(holder, before):
                _restore(holder, before)


def _holders(model: nn.Module) -> Iterator[Any]:
    """Yield the attributes of each module, and every container in them that can be changed, each once."""
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        if isinstance(item, nn.Module):
            seen.add(id(item))
            yield item.__dict__
            stack += _nested(item.__dict__.values())
        elif type(item) in MUTABLE or isinstance(item, tuple):
            seen.add(id(item))
            if not isinstance(item, tuple):
                yield item
            if len(item) <= LARGE:
                stack += _nested(item.values() if isinstance(item, dict) else item)


def _nested(items: Iterable[Any]) -> list[Any]:
    return [x for x in items if type(x) in MUTABLE or isinstance(x, tuple | nn.Module)]


def _same(holder: Any, before: Any) -> bool:
    """Tell if a container holds the same objects in the same order; a set, the same objects."""
    if len(holder) != len(before):
        return False
    if isinstance(holder, dict):
        return all(a is b and holder[a] is before[b] for a, b in zip(holder, before, strict=True))
    if isinstance(holder, set):
        return {id(x) for x in holder} == {id(x) for x in before}
    return all(a is b for a, b in zip(holder, before, strict=True))


def _restore(holder: Any, before: Any) -> None:
    if isinstance(holder, dict) and list(holder) == list(before):
        for key, value in before.items():
            if holder[key] is not value:
                holder[key] = value
        return
    holder.clear()
    holder.extend(before) if isinstance(holder, SEQUENCES) else holder.update(before)
