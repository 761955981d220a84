"""Shapes of a model's tensors before the first channel was removed, noted on the modules at each cut.

The note goes with copies and pickles of a module. It counts only while the tensor has the shape that the last cut left it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from fasterai.model.names import own_tensors

__all__ = ["Note", "count_at_first", "dense_shapes", "dense_shapes_of", "note", "noted_on", "put_note"]

Shape = tuple[int, ...]
#: Name of a parameter or buffer of a module -> its shape before the first cut, and after the last.
Note = dict[str, tuple[Shape, Shape]]

KEY = "_shapes_before_cuts"


def dense_shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Return the shapes of a module's own tensors before the first cut; the present shape where none is noted."""
    noted = _noted(module)
    return {name: noted.get(name, shape) for name, shape in _own(module)}


def dense_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the known shapes before the first cut, by name; for a model that was never cut the present ones."""
    is_cut = any(noted_on(module) for module in model.modules())
    return {
        f"{prefix}.{name}" if prefix else name: shape
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, shape in (_noted(module) if is_cut else dense_shapes_of(module)).items()
    }


def count_at_first(model: nn.Module) -> int:
    """Return the number of parameters before the first cut."""
    counts = {
        id(parameter): math.prod(dense_shapes_of(module)[name])
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    return sum(counts.values())


def note(module: nn.Module, dense: Mapping[str, Shape]) -> Note:
    """Make the note for a module that was just cut: tensor name -> (dense shape, present shape)."""
    return {name: (dense[name], shape) for name, shape in _own(module) if name in dense}


def noted_on(module: nn.Module) -> Note | None:
    """Return the note that the last cut left on a module."""
    return vars(module).get(KEY)


def put_note(module: nn.Module, noted: Note | None) -> None:
    """Set the note of a module, or remove it if there is nothing to note."""
    if noted:
        vars(module)[KEY] = noted
    else:
        vars(module).pop(KEY, None)


def _noted(module: nn.Module) -> dict[str, Shape]:
    known = noted_on(module) or {}
    return {name: known[name][0] for name, shape in _own(module) if name in known and known[name][1] == shape}


def _own(module: nn.Module) -> Iterator[tuple[str, Shape]]:
    return ((name, tuple(tensor.shape)) for name, tensor in own_tensors(module) if not is_lazy(tensor))
