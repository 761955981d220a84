"""Capture of what layers return, by hooks that leave again."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import unknown
from fasterai.display import brief
from fasterai.model.names import plain_name, unwrap

__all__ = ["Capture", "check_list", "find_layers", "unknown_layer"]

ALIKE = 0.5  # the least likeness of names that are proposed: of b3 and b1 it is 0.5
LIST = "get_model_layers(model) lists them"


class Capture:
    """Outputs of layers in the last forward pass; where a layer runs several times in a pass, the last output.

    Args:
        argument: The argument that the layers were given as, for messages.
        model: The model that they are of.
        layers: The layers, in the order in which their outputs are wanted; one may stand twice.
        graph: Whether passes with gradients are looked at; if not, those without.
    """

    def __init__(self, argument: str, model: nn.Module, layers: Sequence[nn.Module], *, graph: bool) -> None:
        names = {id(module): plain_name(name) for name, module in unwrap(model).named_modules()}
        self._argument = argument
        self._names = [names.get(id(one), type(one).__name__) for one in layers]
        self._found: dict[int, Tensor] = {}
        self._layers = {id(one): place for place, one in enumerate(layers)}
        self._places = [self._layers[id(one)] for one in layers]
        if any(is_compiled(model, one) for one in layers):
            torch.compiler.reset()  # a hook that comes after a compiled call is not called
        self._hooks = [
            layers[place].register_forward_hook(_Note(argument, self._found, place, graph)) for place in {*self._places}
        ]

    def take(self) -> list[Tensor]:
        """Return what was found in the order of the layers, and forget it.

        Raises:
            ValueError: A layer did not run.
        """
        found = dict(self._found)
        self._found.clear()
        silent = [name for name, place in zip(self._names, self._places, strict=True) if place not in found]
        if silent:
            raise ValueError(
                f"{self._argument} must be layers that run in each forward pass, and whose outputs autograd follows where they "
                f"train, got {silent[0]!r}, which gave no output; name one that the model's forward calls"
            )
        return [found[place] for place in self._places]

    def forget(self) -> None:
        """Forget what passes besides those of the training have left."""
        self._found.clear()

    def remove(self) -> None:
        """Take the hooks off the layers; further calls do nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._found.clear()


class _Note:
    """The hook of one layer; copies and files of the model have one in its place that does nothing."""

    def __init__(self, argument: str, found: dict[int, Tensor], place: int, graph: bool) -> None:
        self._argument, self._found, self._place, self._graph = argument, found, place, graph

    def __call__(self, layer: nn.Module, _: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() == self._graph and not torch.compiler.is_exporting():
            self._found[self._place] = tensor_of(self._argument, outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(layer: nn.Module, inputs: Any, outputs: Any) -> None:
    """Return nothing: the hook of copies of a model."""


def tensor_of(argument: str, outputs: Any) -> Tensor:
    """Return a layer's output: a tensor, or the first one of a tuple or dict."""
    values = list(outputs.values()) if isinstance(outputs, dict) else outputs
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"{argument} must be layers that return a tensor, or one in a tuple or dict, got {type(outputs).__name__}")


def find_layers(argument: str, model: nn.Module, layers: Sequence[str | nn.Module]) -> list[nn.Module]:
    """Find layers of a model by name, wrapped or not; modules of it may be given themselves.

    A name may leave out the model's own part that alone has such a layer: `layer2` is `net.layer2` of a LightningModule
    whose network is `net`.

    Raises:
        ValueError: A name is unknown, or several parts have it, or a module is none of the model's.
        TypeError: It is no list, or an entry is neither a name nor a module.
    """
    check_list(argument, layers)
    inner = unwrap(model)
    known = {plain_name(name): module for name, module in inner.named_modules(remove_duplicate=False) if name}
    own = {id(module) for module in model.modules()}
    found = []
    for one in layers:
        if isinstance(one, nn.Module):
            if id(one) not in own:
                raise ValueError(
                    f"{argument} must be layers of the model, got a {type(one).__name__} that is none of its; pass a name"
                )
            found.append(unwrap(one))
        elif not isinstance(one, str):
            raise TypeError(f"{argument} must be names of layers or modules, got {one!r} ({type(one).__name__})")
        elif one in known:
            found.append(unwrap(known[one]))
        elif len(inside := {id(m): m for name, m in known.items() if name.partition(".")[2] == one}) == 1:
            found += [unwrap(module) for module in inside.values()]
        else:
            raise unknown_layer(argument, one, known)
    return found


def check_list(argument: str, layers: object) -> None:
    """Refuse a layer, or its name, where a list of them is meant.

    Raises:
        TypeError: It is one.
    """
    if isinstance(layers, str | nn.Module):
        raise TypeError(f"{argument} must be a list of layers, got {brief(layers)}; pass [{brief(layers)}]")


def unknown_layer(argument: str, name: str, known: Iterable[str]) -> ValueError:
    """Make the error for a layer that is not known; it names the closest ones, whatever modules they are in."""
    names = [one for one in known if one]
    inner = next((part for part in _tails(name) if part in names), None)
    within = [one for one in names if one.endswith(f".{name}")]
    close = difflib.get_close_matches(name, names, n=3, cutoff=ALIKE)
    last = [one for one in names if difflib.get_close_matches(name, [one.rpartition(".")[2]], cutoff=ALIKE)]
    proposed = ([inner] if inner else within or close or last)[:3]
    return unknown(argument, name, names, "layers of the model:", f"did you mean {_either(proposed)}?" if proposed else LIST)


def _tails(name: str) -> list[str]:
    """Return a name without its first part, its first two and so on: of a.b.c `b.c` and `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _either(names: Sequence[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def is_compiled(model: nn.Module, layer: nn.Module) -> bool:
    """Tell if a layer is part of a module that `torch.compile` has compiled, or may be: what it traces, it traces whole."""
    return any(
        any(inner is layer for inner in module.modules())
        for module in model.modules()
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
    )


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its hooks, and without what others have put in the place of its methods."""
    memo: dict[int, Any] = {}
    own = {id(module) for module in model.modules()}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") or "_hooks_" in name:
                memo[id(value)] = type(value)() if isinstance(value, dict) else value
            elif id(getattr(value, "__self__", module)) not in own:
                memo[id(value)] = value
    return copy.deepcopy(model, memo)
