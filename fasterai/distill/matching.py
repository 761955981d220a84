"""Pairs of layers whose outputs can be compared: names of a model's layers, and pairs that are proposed for two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.distill.capture import unknown_layer
from fasterai.distill.losses.shapes import UnlikeShapesError, as_maps, grid_of
from fasterai.model.inputs import as_tuple
from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import at_rest, copies, device_of
from fasterai.model.supported import check_model

__all__ = ["get_model_layers", "get_module_by_name", "match_feature_layers", "outputs_of_layers"]

MOST_PAIRS = 4  # of layers that are paired by their depth


@dataclass(frozen=True)
class _Output:
    """A layer that has run: its name, its class, the shape of what it has returned, and how many layers with weights it has."""

    name: str
    kind: type
    shape: tuple[int, ...]
    weighted: int

    @property
    def level(self) -> int:
        """The number of modules that it is in."""
        return self.name.count(".")

    @property
    def places(self) -> tuple[int, ...]:
        """The sizes of its places; of tokens those of the square that they are, if they are one."""
        if len(self.shape) != 3:
            return self.shape[2:]
        return grid_of(self.shape[1]) or self.shape[1:2]

    @property
    def is_feature(self) -> bool:
        """True if it has places, and its channels, if they can be told, where they should be."""
        _, *rest = self.shape
        channels_last = len(rest) == 3 and rest[0] == rest[1] != rest[2]
        return len(rest) > 1 and max(self.places) > 1 and not channels_last


def get_model_layers(model: nn.Module, get_layer_repr: bool = False) -> list[str] | dict[str, str]:
    """List the names of a model's layers, each before those inside it; with `get_layer_repr` as name -> description.

    >>> get_model_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    ['0', '1']
    """
    found = {plain_name(name): module for name, module in unwrap(model).named_modules() if name}
    return {name: repr(module) for name, module in found.items()} if get_layer_repr else list(found)


def get_module_by_name(module: nn.Module, access_string: str) -> nn.Module:
    """Return a layer by its name, such as `layer1.0.conv2`.

    Raises:
        ValueError: There is none of that name; the near ones are named.
    """
    found: dict[str, nn.Module] = {plain_name(n): one for n, one in unwrap(module).named_modules(remove_duplicate=False)}
    if access_string not in found:
        raise unknown_layer("access_string", access_string, found)
    return found[access_string]


def match_feature_layers(student: nn.Module, teacher: nn.Module, sample_input: Any) -> dict[str, list[str]]:
    """Pair layers whose features can be compared, the first ones first: a proposal. Nothing in the models changes.

    Layers are the last ones before the size of the maps changes, paired where both have the same size. If that gives fewer than
    two pairs, or one of the two has one size throughout and blocks, as a vision transformer has, up to four are paired by their
    depth. Both run once, in eval mode.

    Args:
        student: The student.
        teacher: The teacher.
        sample_input: An input of both: a tensor, a tuple of arguments, or a dict of keywords.

    Returns:
        Names under `student` and under `teacher`, as many, as `Distiller` takes them.

    Raises:
        ValueError: There is no such pair.
        TypeError: The student or the teacher is no network.
    """
    check_model(student, "student")
    check_model(teacher, "teacher")
    own, other = _stages(_outputs_of(student, sample_input)), _stages(_outputs_of(teacher, sample_input))
    pairs = _by_size(own[0], other[0]) if not own[1] and not other[1] else []
    if len(pairs) < 2:
        pairs = _by_depth(own, other)
    pairs = [pair for pair in pairs if _is_comparable(*pair)]
    if not pairs:
        raise ValueError(
            "student and teacher must have layers whose outputs can be compared, got none among "
            f"{_listed(own[0])} of the student and {_listed(other[0])} of the teacher; "
            "name them yourself: get_model_layers(model) lists them"
        )
    return {"student": [one.name for one, _ in pairs], "teacher": [one.name for _, one in pairs]}


def _listed(stages: Sequence[_Output]) -> str:
    return ", ".join(f"{one.name} {one.shape}" for one in stages) or "(no layer with places)"


def _outputs_of(model: nn.Module, sample_input: Any) -> list[_Output]:
    """Run a model, and list the layers that have returned a tensor once, in the order in which they were done."""
    layers = [(plain_name(name), module) for name, module in unwrap(model).named_modules() if name]
    seen = outputs_of_layers(model, sample_input, [module for _, module in layers])
    counts = Counter(place for place, _ in seen)
    return [
        _Output(layers[place][0], type(layers[place][1]), tuple(x.shape), _weighted(layers[place][1]))
        for place, x in seen
        if counts[place] == 1
    ]


def outputs_of_layers(model: nn.Module, sample_input: Any, layers: Sequence[nn.Module]) -> list[tuple[int, Tensor]]:
    """Run a model once in eval mode, and list what its layers return, in the order in which they are done; nothing changes.

    Args:
        model: The network.
        sample_input: Its inputs: a tensor, a tuple of arguments, or a dict of keywords.
        layers: The layers that are watched.

    Returns:
        The place of a layer among those given, and its output or the first tensor of it; nothing of layers without one.
    """
    model, seen = unwrap(model), list[tuple[int, Tensor]]()
    keywords = dict(sample_input) if isinstance(sample_input, Mapping) else {}
    inputs = () if keywords else copies(as_tuple(sample_input))
    device = device_of(model, inputs)
    inputs, keywords = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (inputs, keywords))

    def note(place: int, _: nn.Module, __: Any, outputs: Any) -> None:
        values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
        tensors = [x for x in (values if isinstance(values, tuple | list) else [values]) if isinstance(x, Tensor)]
        seen.extend((place, x) for x in tensors[:1])

    hooks = [layer.register_forward_hook(partial(note, place)) for place, layer in enumerate(layers)]
    try:
        with at_rest(model):
            model(*inputs, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _weighted(module: nn.Module) -> int:
    return sum(any(True for _ in one.parameters(recurse=False)) for one in module.modules())


def _stages(outputs: Sequence[_Output]) -> tuple[list[_Output], bool]:
    """Return the layers that end a network's stages, and whether they are blocks that return the same shape."""
    groups: dict[Any, list[_Output]] = {}
    for one in outputs:
        groups.setdefault((one.name.rpartition(".")[0], one.kind, one.shape), []).append(one)
    blocks = max((group for group in groups.values() if len(group) > 1), key=_weight, default=[])
    sizes = {one.places for one in outputs if one.is_feature and blocks and one.level <= blocks[0].level}
    if blocks and sizes == {blocks[0].places}:
        return blocks, True
    last: dict[tuple[int, ...], _Output] = {}
    for one in outputs:
        # A layer inside of the next block may have the size of this one still: it is further in.
        if one.is_feature and (one.places not in last or one.level <= last[one.places].level):
            last.pop(one.places, None)
            last[one.places] = one
    return list(last.values()), False


def _weight(outputs: Iterable[_Output]) -> int:
    return sum(one.weighted for one in outputs)


def _by_size(own: Sequence[_Output], other: Sequence[_Output]) -> list[tuple[_Output, _Output]]:
    found = {one.places: one for one in other}
    return [(one, found[one.places]) for one in own if one.places in found]


def _by_depth(own: tuple[list[_Output], bool], other: tuple[list[_Output], bool]) -> list[tuple[_Output, _Output]]:
    count = min(len(own[0]), len(other[0]), MOST_PAIRS)
    return list(zip(_spread(*own, count), _spread(*other, count), strict=True))


def _spread(stages: list[_Output], are_blocks: bool, count: int) -> list[_Output]:
    """Choose so many stages: of blocks at equal distances up to the last, else the last ones."""
    if not are_blocks:
        return stages[len(stages) - count :]
    return [stages[(i + 1) * len(stages) // count - 1] for i in range(count)]


def _is_comparable(one: _Output, other: _Output) -> bool:
    try:
        as_maps(torch.empty(one.shape, device="meta"), torch.empty(other.shape, device="meta"))
    except UnlikeShapesError:
        return False
    return True
