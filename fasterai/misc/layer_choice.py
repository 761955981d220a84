"""Choice of the layers of a model to replace by others, with the reason for which each other one stays, and the replacement."""

from __future__ import annotations

import dis
import fnmatch
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, Generic, TypeVar

from torch import nn

from fasterai.core.checks import unknown

__all__ = ["Kind", "choose_layers", "replace_modules"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Kind(Generic[M]):
    """A kind of layers that can be replaced.

    Attributes:
        classes: Their classes; a subclass of one may compute more, and stays.
        noun: What they are called in messages.
        own: The attributes that what replaces them has not.
    """

    classes: tuple[type[M], ...]
    noun: str
    own: frozenset[str]


def choose_layers(
    model: nn.Module, kind: Kind[M], layers: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> tuple[dict[str, M], dict[str, str]]:
    """Choose the layers to replace, by name, and say for each other one of the kind why it stays."""
    known = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind.classes)}
    asked = None if layers is None else _matching("layers", layers, known, kind.noun)
    excluded = set() if exclude is None else _matching("exclude", exclude, known, kind.noun)
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    readers = _direct_readers(model, kind)
    chosen: dict[str, M] = {}
    left: dict[str, str] = {}
    for layer in dict.fromkeys(known.values()):
        names = [n for n, m in known.items() if m is layer]
        why = None
        if asked is not None and not asked.intersection(names):
            why = "not named in layers"
        elif excluded.intersection(names):
            why = "named in exclude"
        elif layer in readers:
            why = f"{readers[layer]} reads its weight directly"
        elif type(layer) not in kind.classes:
            why = f"a {type(layer).__name__} may compute more than a {kind.noun}"
        elif layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            why = "it has hooks, which would be lost"
        elif holders[id(layer.weight)] > 1:
            why = "its weight is shared with another module"
        if why is None:
            chosen[names[0]] = layer
        else:
            left[names[0]] = why
    return chosen, left


def _matching(argument: str, patterns: str | Iterable[str], known: Iterable[str], noun: str) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {n for n in known if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)}
        if not hits:
            raise unknown(argument, pattern, known, f"the name of a {noun} or of a module that holds one, or a glob, of")
        found |= hits
    return found


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the new modules in the place of the old ones, under each of their names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _direct_readers(model: nn.Module, kind: Kind[Any]) -> dict[nn.Module, str]:
    """Find the layers whose weight or other attribute is read by a module above them: layer -> that module's class.

    Attention and the encoder layers' fast path call no `forward` of their linear layers but take the weights, and so may any
    module: its methods are searched for `<layer>.weight`.
    """
    readers: dict[nn.Module, str] = {}
    for module in model.modules():
        read = set(_read_attributes(type(module), kind.own))
        for path, layer in module.named_modules():
            if isinstance(layer, kind.classes) and path and path.rpartition(".")[2] in read:
                readers.setdefault(layer, type(module).__name__)
    return readers


def _read_attributes(cls: type, own: frozenset[str]) -> Iterator[str]:
    """List every `name` for which a method of the class reads `name.weight` or the like.

    Methods that set initial values are left out.
    """
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in vars(base).values():
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType) and not any(part in function.__name__ for part in ("init", "reset")):
                steps = [(step.opname, step.argval) for step in dis.get_instructions(function)]
                for (_, name), (opname, attribute) in pairwise(steps):
                    if opname in ("LOAD_ATTR", "LOAD_METHOD") and attribute in own and isinstance(name, str):
                        yield name
