"""Capture of what layers return, by hooks that leave again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import unknown
from fasterai.model.names import plain_name, unwrap

__all__ = ["Capture", "find_layers"]


class Capture:
    """Outputs of layers, by place: the last ones of a training forward pass.

    Args:
        layers: The layers, in the order in which their outputs are wanted; one may stand twice.
        graph: Whether passes with gradients are looked at; if not, those without.
    """

    def __init__(self, layers: Sequence[nn.Module], *, graph: bool) -> None:
        self._found: dict[int, Tensor] = {}
        self._layers = list(layers)
        self._graph = graph
        self._hooks = [one.register_forward_hook(self._note) for one in {id(one): one for one in layers}.values()]

    def _note(self, layer: nn.Module, _: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() == self._graph:
            self._found[id(layer)] = tensor_of(outputs)

    def take(self) -> list[Tensor | None]:
        """Return what was found in the order of the layers, None for those that did not run, and forget it."""
        found, self._found = self._found, {}
        return [found.get(id(one)) for one in self._layers]

    def remove(self) -> None:
        """Take the hooks off the layers; further calls do nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._found = [], {}


def tensor_of(outputs: Any) -> Tensor:
    """Return a layer's output: a tensor, or the first one of a tuple or dict."""
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else [outputs]
    found = next((x for x in values if isinstance(x, Tensor)), None)
    if found is None:
        raise ValueError(f"layers to compare must return a tensor, got {type(outputs).__name__}")
    return found


def find_layers(argument: str, model: nn.Module, layers: Sequence[str | nn.Module]) -> list[nn.Module]:
    """Find layers of a model by name, wrapped or not; modules of it may be given themselves.

    A name may leave out the model's own part that alone has such a layer: `layer2` is `net.layer2` of a LightningModule
    whose network is `net`.

    Raises:
        ValueError: A name is unknown, or several parts have it, or a module is none of the model's.
    """
    known = {plain_name(name): module for name, module in unwrap(model).named_modules(remove_duplicate=False) if name}
    found = []
    for one in layers:
        if isinstance(one, nn.Module):
            if all(one is not module for module in model.modules()):
                raise ValueError(f"{argument} must be layers of the model, got a {type(one).__name__} that is none of its")
            found.append(one)
        elif one in known:
            found.append(known[one])
        elif len(inside := {id(m): m for name, m in known.items() if name.partition(".")[2] == one}) == 1:
            found += inside.values()
        else:
            raise unknown(argument, one, known, "layers of the model")
    return found
