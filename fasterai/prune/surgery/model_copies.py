"""Copies of a model that are kept beside it, such as moving averages: found, and checked against its shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fasterai.model.names import unwrap
from fasterai.prune.surgery.replay import shapes_of

__all__ = ["Copies", "check_copies", "matching_copies"]

Copies = nn.Module | Sequence[nn.Module] | Callable[[], Any] | None


def check_copies(copies: Copies) -> Copies:
    """Return `copies` if it is a module, several, or a function that returns them; refuse anything else.

    Raises:
        TypeError: It is something else.
    """
    several = copies if isinstance(copies, list | tuple) else [copies]
    if copies is None or all(isinstance(c, nn.Module) or callable(c) for c in several):
        return copies
    raise TypeError(f"copies must be modules of the model's structure, or a function that gives them, got {copies!r}")


def matching_copies(copies: Copies, model: nn.Module, path: str = "") -> list[nn.Module]:
    """Find for each copy the module in it that is built as the model is.

    Args:
        copies: A module, several, or a function that gives them now. A moving average of torch, timm or Lightning holds its
            copy as `module`; that is found.
        model: The model that they are copies of.
        path: The model's name in the whole that a copy may be of.

    Raises:
        ValueError: A copy is of another structure; where it differs is named.
    """
    shapes = shapes_of(model)
    return [_matching(copy, shapes, path) for copy in _given(copies)]


def _given(copies: Copies) -> list[nn.Module]:
    if not isinstance(copies, nn.Module) and callable(copies):
        copies = copies()
    if isinstance(copies, list | tuple):
        return [given for one in copies for given in _given(one)]
    if copies is None or isinstance(copies, nn.Module):
        return [] if copies is None else [copies]
    raise TypeError(f"copies must give modules of the model's structure, got {copies!r} ({type(copies).__name__})")


def _matching(copy: nn.Module, shapes: dict[str, tuple[int, ...]], path: str) -> nn.Module:
    candidates = _candidates(copy, path)
    found = [shapes_of(candidate) for candidate in candidates]
    for candidate, own in zip(candidates, found, strict=True):
        if own == shapes:
            return candidate
    closest = max(found, key=lambda own: len(own.keys() & shapes.keys()))
    name = next(n for n in [*shapes, *closest] if shapes.get(n) != closest.get(n))
    raise ValueError(
        f"copies must be modules of the model's structure, got {type(copy).__name__} where {name} is "
        f"{closest.get(name, 'missing')}, in the model {shapes.get(name, 'missing')}"
    )


def _candidates(copy: nn.Module, path: str) -> list[nn.Module]:
    """List the copy, the modules that it wraps, and in each of them the part at `path`."""
    wholes = [unwrap(copy)]
    while isinstance(wholes[-1]._modules.get("module"), nn.Module):
        wholes.append(unwrap(wholes[-1].get_submodule("module")))
    parts = [whole.get_submodule(path) for whole in wholes if path and _has(whole, path)]
    return wholes + parts


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())
