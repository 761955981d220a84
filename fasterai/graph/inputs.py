"""A network's inputs: their names by argument, and inputs cut to the indices that stay.

A name is that of the argument of `forward`; what stands inside of a dict, list or tuple follows as Python writes it:
`x`, `batch['cont']`, `args[0]`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from fasterai.core.checks import check_count
from fasterai.core.loop import Batch
from fasterai.display import Shown, Table
from fasterai.model.inputs import arguments
from fasterai.model.names import unwrap

__all__ = ["InputCut", "cut_inputs", "input_cuts", "input_names", "input_tensors", "less_of", "put_inputs"]

KEY = "_input_cuts"
MOST = 8  # indices that are shown


@dataclass(frozen=True, repr=False)
class InputCut(Shown):
    """Part of an input that stays: of one dimension the small model takes these indices alone.

    Attributes:
        argument: The name of the input, by the argument of `forward`.
        dim: The dimension that has lost indices.
        keep: The indices that stay, of the input as the dense model took it, rising.
        size: How many there were.
    """

    argument: str
    dim: int
    keep: tuple[int, ...]
    size: int

    def cut(self, x: Tensor) -> Tensor:
        """Return the indices of a whole input that stay.

        Raises:
            ValueError: It has another size than the dense model took.
        """
        if x.dim() <= self.dim or x.shape[self.dim] != self.size:
            shape = "x".join(map(str, x.shape)) or "a single number"
            raise ValueError(f"{self.argument} must have the size {self.size} in dimension {self.dim}, got {shape}")
        return x.index_select(self.dim, torch.as_tensor(self.keep, device=x.device))

    def then(self, later: InputCut) -> InputCut:
        """Return this cut and a later one of what it has left, as one.

        >>> InputCut("x", 1, (0, 2, 5), 6).then(InputCut("x", 1, (1, 2), 3)).keep
        (2, 5)
        """
        return InputCut(self.argument, self.dim, tuple(self.keep[i] for i in later.keep), self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"argument": self.argument, "dim": self.dim, "keep": list(self.keep), "size": self.size}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputCut:
        """Make a cut from the data of `to_dict`.

        Raises:
            TypeError: A part is of the wrong type.
            ValueError: The indices do not rise within the size, or there are none.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("argument"), str) or not isinstance(data.get("keep"), list):
            raise TypeError(f"an input's cut must hold argument, dim, keep and size, got {data!r}")
        keep = tuple(check_count("keep", i, 0) for i in data["keep"])
        size = check_count("size", data.get("size"))
        if not keep or keep[-1] >= size or any(a >= b for a, b in itertools.pairwise(keep)):
            raise ValueError(f"keep must hold rising indices below {size}, got {keep}")
        return cls(data["argument"], check_count("dim", data.get("dim")), keep, size)

    @property
    def words(self) -> str:
        """The cut in words, as reports have it."""
        return f"{self.argument}, dimension {self.dim}: {len(self.keep):,} of {self.size:,} stay ({self._listed()})"

    def _listed(self) -> str:
        return ", ".join(map(str, self.keep[:MOST])) + (", ..." if len(self.keep) > MOST else "")

    def _line(self) -> str:
        return f"<InputCut {self.argument}.{self.dim}: {len(self.keep):,} of {self.size:,} stay>"

    def _parts(self) -> Iterator[Table | str]:
        row = (self.argument, str(self.dim), f"{self.size:,}", f"{len(self.keep):,}", self._listed())
        yield Table(("input", "dimension", "before", "kept", "indices"), [row])


def input_names(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Name each leaf of positional arguments by the argument of the model's `forward` that it is, or is a part of."""
    names = _argument_names(model, len(inputs))
    parts = [(name, tree_flatten_with_path(given)[0]) for name, given in zip(names, inputs, strict=True)]
    return [name + keystr(path) for name, leaves in parts for path, _ in leaves]


def _argument_names(model: nn.Module, count: int) -> list[str]:
    parameters = list(inspect.signature(unwrap(model).forward).parameters.values())
    single = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return single + [f"{rest}[{i}]" for i in range(count - len(single))]


def input_tensors(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the tensors among positional arguments, by name."""
    return {n: x for n, x in zip(input_names(model, inputs), tree_flatten(inputs)[0], strict=True) if isinstance(x, Tensor)}


def cut_inputs(model: nn.Module, inputs: tuple[Any, ...], cuts: Iterable[InputCut]) -> tuple[Any, ...]:
    """Cut a model's positional arguments to the indices that stay; all that no cut names is unchanged.

    Raises:
        ValueError: An input has another size than its cut knows.
    """
    by_name = {cut.argument: cut for cut in cuts}
    if not by_name:
        return inputs
    leaves, spec = tree_flatten(inputs)
    found = [
        by_name[name].cut(x) if name in by_name and isinstance(x, Tensor) else x
        for name, x in zip(input_names(model, inputs), leaves, strict=True)
    ]
    result: tuple[Any, ...] = tree_unflatten(found, spec)
    return result


def less_of(model: nn.Module, cuts: Iterable[InputCut], batch: Batch) -> Batch:
    """Return what a small model takes of a batch: its inputs cut, in the order of the model's arguments."""
    return Batch(cut_inputs(model, arguments(model, batch), cuts), batch.targets)


def input_cuts(model: nn.Module) -> dict[str, InputCut]:
    """Return what a small model takes of each input that has lost indices, as the last removal or its file noted it."""
    return dict(vars(unwrap(model)).get(KEY, {}))


def put_inputs(model: nn.Module, cuts: Mapping[str, InputCut]) -> None:
    """Note on a model what it takes of its inputs."""
    if cuts:
        vars(unwrap(model))[KEY] = dict(cuts)
    else:
        vars(unwrap(model)).pop(KEY, None)
