"""Adapters: the parts of losses of features that train with the student, so that its features compare with the teacher's.

All read maps `(B, C, *S)`, as `shapes.py` makes them. When channels of the student's layer go in the middle of a run, the layer
that reads them gets smaller.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.distill.losses.loss import Adapter
from fasterai.distill.losses.shapes import UnlikeShapesError, resize
from fasterai.model.cuts import kept_slices

__all__ = ["Fusions", "Generators", "Heads", "Projections", "ReadingAdapter", "align", "pointwise"]

CONVOLUTIONS: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS: Mapping[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NORMS: Mapping[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ALIGN = "name layers of as many channels, or pass the adapter that the loss makes, adapter=loss.adapter(student, teacher)"
Maps = Sequence[Tensor]


class ReadingAdapter(Adapter):
    """Adapter with one layer for each pair that reads the student's channels.

    Args:
        pairs: The number of pairs.
    """

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs

    @abstractmethod
    def reader(self, index: int) -> nn.Module | None:
        """Return the layer that reads the student's feature of a pair, along dimension 1 of its weight; None without one."""

    def keep_(self, index: int, kept: Any) -> Mapping[nn.Parameter, Mapping[int, Any]]:
        """Follow the student, whose channels went: those `kept`, in order, of the feature of a pair stay.

        Returns:
            What has got smaller: parameter -> dimension -> the indices that stay, by which an optimizer's state is cut.
        """
        weight = getattr(self.reader(index), "weight", None)
        if not isinstance(weight, nn.Parameter):
            self._choose(index, torch.as_tensor(kept))
            return {}
        grad = None if weight.grad is None else kept_slices(weight.grad, {1: kept})
        _put_(weight, kept_slices(weight.data, {1: kept}), grad)
        return {weight: {1: kept}}

    def _choose(self, index: int, kept: Tensor) -> None:
        """Answer to channels that no layer reads."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take on the shapes of a saved state, which may be that of a student with more or fewer channels."""
        self._adopt(state, prefix)
        weights = {id(getattr(self.reader(i), "weight", None)) for i in range(self.pairs)}
        for name, p in self.named_parameters():
            saved = state.get(prefix + name)
            if id(p) in weights and isinstance(saved, Tensor) and saved.dim() == p.dim():
                p.data = p.data.new_empty(p.shape[:1] + saved.shape[1:2] + p.shape[2:])
        super()._load_from_state_dict(state, prefix, *rest)

    def _adopt(self, state: Mapping[str, Any], prefix: str) -> None:
        """Take on the parts of a saved state, where they depend on channels that have gone."""


class Projections(ReadingAdapter):
    """A 1x1 convolution, on vectors and tokens a linear layer, for each pair whose channels differ.

    Where a pair fits as it is and channels of the student go later, the same channels of the teacher are left out.

    Args:
        student: The student's maps.
        teacher: The teacher's.
    """

    def __init__(self, student: Maps = (), teacher: Maps = ()) -> None:
        super().__init__(len(student))
        self.layers = _projections(student, teacher)

    def reader(self, index: int) -> nn.Module | None:
        """Return the projection of a pair; None if it needs none."""
        return _part(self.layers, index)

    def forward(self, index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of a pair with the same channels."""
        layer, chosen = self.reader(index), getattr(self, f"chosen_{index}", None)
        return (
            student if layer is None else layer(student),
            teacher if chosen is None else teacher.index_select(1, chosen.to(teacher.device)),
        )

    def _choose(self, index: int, kept: Tensor) -> None:
        before = getattr(self, f"chosen_{index}", None)
        self.register_buffer(f"chosen_{index}", kept.clone() if before is None else before[kept.to(before.device)])

    def _adopt(self, state: Mapping[str, Any], prefix: str) -> None:
        start = f"{prefix}chosen_"
        for key in [key for key in state if key.startswith(start)]:
            _remove(self.layers, key.removeprefix(start))
            self.register_buffer(key.removeprefix(prefix), torch.empty_like(state[key]))


class Generators(ReadingAdapter):
    """Two convolutions of 3 with a ReLU between them for each pair, after a projection where channels differ.

    Args:
        student: The student's maps.
        teacher: The teacher's, with the same number of dimensions.
    """

    def __init__(self, student: Maps, teacher: Maps) -> None:
        super().__init__(len(student))
        self.layers = _projections(student, teacher)
        self.generators = nn.ModuleList(_generator(x.dim() - 2, x.shape[1]) for x in teacher)

    def reader(self, index: int) -> nn.Module | None:
        """Return the projection of a pair, or the first convolution."""
        generator = self.generators[index]
        assert isinstance(generator, nn.Sequential)
        return _part(self.layers, index) or generator[0]

    def forward(self, index: int, student: Tensor, ratio: float) -> Tensor:
        """Return what is generated of the student's map, a random share of whose channels is set to zero in each sample."""
        layer = _part(self.layers, index)
        aligned = student if layer is None else layer(student)
        places = (1,) * (aligned.dim() - 2)
        keep = torch.rand(*aligned.shape[:2], *places, device=aligned.device) >= ratio
        result: Tensor = self.generators[index](aligned * keep)
        return result

    def _adopt(self, state: Mapping[str, Any], prefix: str) -> None:
        for i in list(self.layers):
            first = state.get(f"{prefix}generators.{i}.0.weight")
            if f"{prefix}layers.{i}.weight" not in state and first is not None and first.shape[0] != first.shape[1]:
                _remove(self.layers, i)


class Heads(ReadingAdapter):
    """Two linear layers for each pair, the student's and the teacher's, into one space.

    Args:
        student: The student's vectors `(B, C)`.
        teacher: The teacher's.
        dim: The number of dimensions of the space.
    """

    def __init__(self, student: Maps, teacher: Maps, dim: int) -> None:
        super().__init__(len(student))
        self.students = nn.ModuleList(nn.Linear(x.shape[1], dim) for x in student)
        self.teachers = nn.ModuleList(nn.Linear(x.shape[1], dim) for x in teacher)

    def reader(self, index: int) -> nn.Module:
        """Return the student's layer of a pair."""
        return self.students[index]

    def forward(self, index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of a pair in the common space, of length 1."""
        return F.normalize(self.students[index](student)), F.normalize(self.teachers[index](teacher))


class Fusions(ReadingAdapter):
    """Fusion of the student's maps from the last one to the first by attention (ABF), each brought to its teacher's shape.

    Args:
        student: The student's maps, the deepest last.
        teacher: The teacher's, with the same number of dimensions.
        middle: The number of channels in which maps are fused.
    """

    def __init__(self, student: Maps, teacher: Maps, middle: int) -> None:
        super().__init__(len(student))
        dims = student[0].dim() - 2
        conv, norm = CONVOLUTIONS[dims], NORMS[dims]

        def normed(layer: Any, channels: int) -> nn.Sequential:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # as in the authors' code
            return nn.Sequential(layer, norm(channels, track_running_stats=False))

        self.inner = nn.ModuleList(normed(conv(s.shape[1], middle, 1, bias=False), middle) for s in student)
        self.weights = nn.ModuleList(nn.Sequential(conv(2 * middle, 2, 1), nn.Sigmoid()) for _ in student[1:])
        self.outer = nn.ModuleList(normed(conv(middle, t.shape[1], 3, padding=1, bias=False), t.shape[1]) for t in teacher)

    def reader(self, index: int) -> nn.Module:
        """Return the first convolution of a pair."""
        inner = self.inner[index]
        assert isinstance(inner, nn.Sequential)
        return inner[0]

    def forward(self, student: Maps, teacher: Maps) -> list[Tensor]:
        """Return the fused maps, in the order and the shapes of the teacher's."""
        found, deeper = [], None
        for i in reversed(range(len(student))):
            own = self.inner[i](student[i])
            if deeper is not None:
                deeper = F.interpolate(deeper, size=own.shape[2:], mode="nearest")
                shares = self._shares(i, own, deeper)
                own = own * shares[:, :1] + deeper * shares[:, 1:]
            deeper = (
                own if own.shape[2:] == teacher[i].shape[2:] else F.interpolate(own, size=teacher[i].shape[2:], mode="nearest")
            )
            found.append(self.outer[i](deeper))
        return found[::-1]

    def _shares(self, index: int, own: Tensor, deeper: Tensor) -> Tensor:
        """Return the shares of two maps at each place: the layer of both side by side, without a copy of them."""
        layer = self.weights[index][0]  # type: ignore[index]
        function, channels = FUNCTIONS[own.dim() - 2], own.shape[1]
        first = function(own, layer.weight[:, :channels], layer.bias)
        return torch.sigmoid(first + function(deeper, layer.weight[:, channels:]))


def align(index: int, student: Tensor, teacher: Tensor, adapter: Adapter | None) -> tuple[Tensor, Tensor]:
    """Return the maps of a pair in the same shape: the student's through the adapter, in the size of the teacher's.

    Raises:
        UnlikeShapesError: They have different channels, and the adapter has no layer for them.
    """
    student = resize(student, teacher.shape[2:])
    if isinstance(adapter, Projections):
        student, teacher = adapter(index, student, teacher)
    if student.shape != teacher.shape:
        raise UnlikeShapesError(index, student.shape, teacher.shape, ALIGN)
    return student, teacher


def pointwise(dims: int, inputs: int, outputs: int) -> nn.Module:
    """Make a layer of channels alone for maps with so many dimensions of places."""
    return CONVOLUTIONS[dims](inputs, outputs, 1) if dims else nn.Linear(inputs, outputs)  # type: ignore[no-any-return]


def _projections(student: Maps, teacher: Maps) -> nn.ModuleDict:
    sizes = [(s.dim() - 2, s.shape[1], t.shape[1]) for s, t in zip(student, teacher, strict=True)]
    return nn.ModuleDict({str(i): pointwise(*size) for i, size in enumerate(sizes) if size[1] != size[2]})


def _generator(dims: int, channels: int) -> nn.Module:
    conv = CONVOLUTIONS[dims]
    return nn.Sequential(conv(channels, channels, 3, padding=1), nn.ReLU(), conv(channels, channels, 3, padding=1))


def _part(parts: nn.ModuleDict, index: int) -> nn.Module | None:
    key = str(index)
    return parts[key] if key in parts else None  # noqa: SIM401 - it has no `get`


def _remove(parts: nn.ModuleDict, key: str) -> None:
    if key in parts:
        del parts[key]


def _put_(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    """Replace a parameter's values by ones of another shape; it stays the same object.

    Autograd makes a new node that gathers the gradients only where the type changes: so it changes in between.
    """
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64, device=data.device)
    parameter.data = data
    parameter.grad = grad
