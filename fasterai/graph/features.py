"""The dimensions of inputs that may lose indices, as a user names them: read and checked against the example inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasterai.core.checks import unknown
from fasterai.display import Shown, Table
from fasterai.graph.inputs import input_cuts, input_tensors

__all__ = ["Asked", "Features", "FeaturesLike", "check_features", "check_may_go", "kept_inputs", "read_features"]

Place = tuple[str, int]  # an input's name, and one of its dimensions


@dataclass(frozen=True, repr=False)
class Features(Shown):
    """The dimensions of inputs that may lose indices, and indices of them that stay all the same.

    Attributes:
        dims: Argument -> the dimension; True for the only one that it can be. For a single input the bare dimension or True.
        keep: Argument -> the indices that stay whatever the weights say. For a single dimension the bare indices.
    """

    dims: Mapping[str, int | bool] | int | bool
    keep: Mapping[str, Sequence[int]] | Sequence[int] = field(default_factory=dict)

    def _line(self) -> str:
        dims = self.dims if isinstance(self.dims, Mapping) else {"the input": self.dims}
        named = ", ".join(f"{name}.{'?' if isinstance(d, bool) else d}" for name, d in dims.items())
        lists = self.keep.values() if isinstance(self.keep, Mapping) else [self.keep]
        held = sum(len(indices) for indices in lists)
        stay = f", {held} of them stay" if held else ""
        return f"<Features: {named or 'none'} may lose indices{stay}>"

    def _parts(self) -> Iterator[Table | str]:
        dims = self.dims if isinstance(self.dims, Mapping) else {"the input": self.dims}
        keep = self.keep if isinstance(self.keep, Mapping) else dict.fromkeys(dims, self.keep)
        body = [(name, str(d), ", ".join(map(str, keep.get(name, ()))) or "-") for name, d in dims.items()]
        yield Table(("input", "dimension", "stay"), body) if body else "no input may lose indices"


FeaturesLike = Features | Mapping[str, int | bool] | int | bool | None


@dataclass(frozen=True)
class Asked:
    """One dimension of an input that may lose indices: which, and those that stay all the same."""

    argument: str
    dim: int
    keep: tuple[int, ...] = ()


def read_features(features: FeaturesLike, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Asked, ...]:
    """Return the dimensions of inputs that may lose indices, by argument.

    Raises:
        TypeError: They are no `Features`, dict, dimension or True, or an index is no number.
        ValueError: An input, a dimension or an index does not exist, several could be meant, or it is that of the samples.
    """
    check_features(features)
    if features is None or features is False:
        return ()
    wanted = features if isinstance(features, Features) else Features(features)
    tensors = input_tensors(model, inputs)
    dims = {}
    for name, dim in _by_argument(wanted.dims, tensors).items():
        found = _find(name, tensors)
        dims[found] = _dimension(found, dim, tensors[found])
    given = wanted.keep if isinstance(wanted.keep, Mapping) else _of_the_only(wanted.keep, dims)
    keep = {_find(name, tensors): indices for name, indices in given.items()}
    for name in keep.keys() - dims.keys():
        raise unknown("keep", name, dims, "of inputs that features names, of")
    before = input_cuts(model)
    for name, dim in dims.items():
        if name in before and before[name].dim != dim:
            raise ValueError(f"features must be dimension {before[name].dim} of {name}, which was cut before, got {dim}")
    return tuple(Asked(name, d, _indices(name, keep.get(name, ()), tensors[name].shape[d])) for name, d in dims.items())


def check_features(features: FeaturesLike) -> FeaturesLike:
    """Return what may stand for features, before there are inputs to hold it against.

    Raises:
        TypeError: It is no `Features`, dict, dimension or True.
    """
    dims = features.dims if isinstance(features, Features) else features
    if not (features is None or isinstance(dims, int | Mapping)):
        raise TypeError(f"features must be a dict of inputs to dimensions, a dimension or True, got {dims!r}")
    return features


def _by_argument(dims: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    if isinstance(dims, Mapping):
        return dims
    able = [name for name, x in tensors.items() if x.dim() > 1]
    if len(able) != 1:
        first = able[0] if able else "x"
        repair = f"pass features={{{first!r}: 1}}"
        raise ValueError(f"features must say which input is meant, got {dims!r}; {_listed(tensors)}: {repair}")
    return {able[0]: dims}


def _listed(tensors: Mapping[str, Tensor]) -> str:
    shown = (f"{name} ({'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')})" for name, x in tensors.items())
    return f"the inputs are {', '.join(shown) or 'no tensors'}"


def _find(name: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the full name of an input, also from the key under which it stands in a dict."""
    if not isinstance(name, str):
        raise TypeError(f"features must name inputs by their argument, got {name!r} ({type(name).__name__})")
    inside = [full for full in tensors if full == name] or [full for full in tensors if full.endswith(f"[{name!r}]")]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ValueError(f"features must name one input, got {name!r}, which may be {', '.join(inside)}")
    raise unknown("features", name, tensors, "inputs, of")


def _dimension(name: str, dim: Any, x: Tensor) -> int:
    """Return a dimension counted from the front, or refuse it."""
    shape = "x".join(map(str, x.shape))
    able = [d for d in range(1, x.dim()) if x.shape[d] > 1]
    if dim is True and len(able) == 1:
        return able[0]
    if dim is True:
        likely = 1 if not able else able[-1] if x.dim() == 3 else able[0]  # (N, L, F), (N, C, H, W)
        pixels = "; to remove single pixels let the model take flat images, as (N, 784)" if x.dim() > 3 else ""
        raise ValueError(
            f"features must say which dimension of {name} is meant, got True for {shape}, where {able or 'none'} "
            f"{'could be' if able else 'has several indices'}: pass features={{{name!r}: {likely}}}{pixels}"
        )
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"features must be dimensions or True, got {dim!r} for {name} ({type(dim).__name__})")
    found = dim + x.dim() if dim < 0 else dim
    if found == 0:
        raise ValueError(f"features must not be the dimension of the samples, got {dim} for {name} ({shape})")
    if found not in able:
        raise ValueError(f"features must be dimensions of several indices, of {able}, got {dim} for {name} ({shape})")
    return found


def _of_the_only(keep: Any, dims: Mapping[str, int]) -> Mapping[str, Any]:
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise TypeError(f"keep must be indices, or a dict of inputs to indices, got {keep!r} ({type(keep).__name__})")
    if len(dims) != 1:
        raise ValueError(f"keep must say which input is meant, got {keep!r} for {', '.join(dims) or 'none'}; pass a dict")
    return {next(iter(dims)): keep}


def _indices(name: str, keep: Any, size: int) -> tuple[int, ...]:
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise TypeError(f"keep must be indices of {name}, got {keep!r} ({type(keep).__name__})")
    found = []
    for i in keep:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise TypeError(f"keep must be indices of {name}, got {i!r} ({type(i).__name__})")
        if not -size <= i < size:
            raise ValueError(f"keep must be indices of {name} below {size}, got {i}")
        found.append(int(i) % size)
    return tuple(sorted(set(found)))


# --- what stays -----------------------------------------------------------------------------------------------------------


def kept_inputs(tensors: Mapping[str, Tensor], may_go: Collection[Place], reasons: Mapping[Place, str]) -> dict[Place, str]:
    """Say of each dimension of inputs why it stays, where all of it does.

    Args:
        tensors: Input -> tensor.
        may_go: Inputs and dimensions that may lose indices.
        reasons: Input and dimension -> why indices of it stay, for those that were asked for.
    """
    places = [(name, d) for name, x in tensors.items() for d in range(x.dim())]
    return {place: _why(place, tensors[place[0]], reasons.get(place)) for place in places if place not in may_go}


def _why(place: Place, x: Tensor, reason: str | None) -> str:
    name, d = place
    if reason is not None:
        return reason + ("; single pixels may go where the model takes flat images, as (N, 784)" if x.dim() > 3 else "")
    if x.shape[d] < 2:
        return "it has a single index"
    if d == 0:
        return "it is that of the samples"
    return f"it is an input, which stays whole unless features={{{name!r}: {d}}} asks for less of it"


def check_may_go(features: FeaturesLike, model: nn.Module, inputs: tuple[Any, ...], stay: Mapping[Place, str]) -> None:
    """Refuse to be asked for fewer indices of an input where all of them have to stay.

    Raises:
        ValueError: They have to; the message says why.
    """
    for asked in read_features(features, model, inputs):
        why = stay.get((asked.argument, asked.dim))
        if why is not None:
            raise ValueError(
                f"features must be dimensions whose indices may go, got {asked.dim} of {asked.argument}, "
                f"which stays whole: {why}"
            )
