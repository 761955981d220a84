"""The channels of a captured feature that are left after a cut of the student, and adapters that follow.

A cut names parameters. Which channel of a feature belongs to which row of a parameter is asked of autograd's graph: a channel's
gradient is zero but for the row that makes it. Concatenated features are several ranges of channels, each with its parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.saved import check_parts, counts, list_of, mapping_of, tensor, text, whole
from fasterai.distill.losses.loss import Adapter
from fasterai.model.cuts import Cut
from fasterai.model.names import plain_name, unwrap
from fasterai.model.optimizers import cut_entry, states_of, strange_keys

__all__ = ["Following", "channel_dim", "check_following", "cut_adapter_", "find_kept", "renew_adapter_"]

Shapes = Mapping[str, tuple[int, ...]]
TRIES = 8  # channels without a row, such as dead ones, that are passed over


@dataclass(frozen=True, repr=False)
class Following:
    """Record of a student's features, and of the cuts since they were last seen.

    It is replaced and never changed, so that a removal that is undone is undone here too.

    Attributes:
        features: The shapes of the features at the last batch that was looked at.
        others: The shapes of the teacher's, which may be an average of the student.
        first: The shapes of both for which adapters were made.
        parameters: The shapes of the student's parameters then.
        cuts: The cuts since then.
    """

    features: tuple[tuple[int, ...], ...] = ()
    others: tuple[tuple[int, ...], ...] = ()
    first: tuple[tuple[tuple[int, ...], ...], ...] = ()
    parameters: Shapes = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()

    def seen(self, student: nn.Module, features: Sequence[Tensor], others: Sequence[Tensor]) -> Following:
        """Note features and parameters as they are now."""
        own, theirs = (tuple(tuple(x.shape) for x in found) for found in (features, others))
        return replace(self.at_present(student), features=own, others=theirs, first=self.first or (own, theirs), cuts=())

    def like_first(self, *both: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return tensors without values, of the shapes for which adapters were made, or the features if there were none."""
        shapes = self.first or [[x.shape for x in side] for side in both]
        return [[x.new_empty(s) for x, s in zip(side, own, strict=True)] for side, own in zip(both, shapes, strict=True)]

    def went_along(self, index: int, other: Tensor) -> bool:
        """Tell if the teacher's feature of a pair has got narrower too, as that of an average of the student does."""
        return index < len(self.others) and channel_dim(self.others[index], other.shape) is not None

    def was_alike(self, index: int) -> bool:
        """Tell if both features of a pair had as many channels."""
        own, other = self.features[index], self.others[index]
        return own[_usual(own)] == other[_usual(other)]

    def check_fit(self, features: Sequence[Tensor]) -> None:
        """Refuse features that have other channels than those that were seen, without a cut that says why.

        Raises:
            ValueError: They have, or there are not as many.
        """
        now, before = (tuple(s[_usual(s)] for s in shapes) for shapes in ([x.shape for x in features], self.features))
        if self.features and not self.cuts and now != before:
            raise ValueError(f"state must be of adapters for features of {now} channels, got one for {before}")

    def check_layers(self, count: int) -> None:
        """Refuse a record of another number of pairs of layers.

        Raises:
            ValueError: It is one.
        """
        rows = [*self.first, *(one for one in (self.features, self.others) if one)]
        odd = next((len(row) for row in rows if len(row) != count), None)
        if odd is not None or len(self.first) not in (0, 2):
            raise ValueError(f"state must be of {count} pairs of layers, got one of {len(self.first) if odd is None else odd}")

    def at_present(self, student: nn.Module) -> Following:
        """Note parameters as they are now."""
        shapes = {plain_name(name): tuple(p.shape) for name, p in unwrap(student).named_parameters()}
        return replace(self, parameters=shapes)

    def news(self, student: nn.Module, features: Sequence[Tensor]) -> dict[int, tuple[int, Any]]:
        """Find the features that have got narrower: place -> (dimension of the channels, those that stay, None if unclear)."""
        found = {}
        for index, (x, before) in enumerate(zip(features, self.features, strict=False)):
            dim = channel_dim(before, x.shape)
            if dim is not None:
                found[index] = dim, find_kept(x, dim, before[dim], student, self.parameters, self.cuts)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors, numbers and text."""
        cuts = [[{"name": n, "dim": d, "kept": torch.as_tensor(kept)} for (n, d), kept in cut.items()] for cut in self.cuts]
        return {
            "features": [list(shape) for shape in self.features],
            "others": [list(shape) for shape in self.others],
            "first": [[list(shape) for shape in side] for side in self.first],
            "parameters": {name: list(shape) for name, shape in self.parameters.items()} if cuts else {},
            "cuts": cuts,
        }

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Following:
        """Return what `state_dict` was made of."""
        return Following(
            tuple(tuple(shape) for shape in state["features"]),
            tuple(tuple(shape) for shape in state["others"]),
            tuple(tuple(tuple(shape) for shape in side) for side in state["first"]),
            {name: tuple(shape) for name, shape in state["parameters"].items()},
            tuple({(c["name"], c["dim"]): c["kept"].cpu().numpy() for c in cut} for cut in state["cuts"]),
        )


def check_following(what: str, value: Any) -> None:
    """Refuse what is no state of a `Following`."""

    def cut(what: str, value: Any) -> None:
        check_parts(value, "Distiller", {"name": text, "dim": whole, "kept": tensor})

    shapes = {"features": list_of(counts), "others": list_of(counts), "first": list_of(list_of(counts))}
    check_parts(value, "Distiller", {**shapes, "parameters": mapping_of(counts), "cuts": list_of(list_of(cut))})


def channel_dim(before: Sequence[int], after: Sequence[int]) -> int | None:
    """Find the dimension of a feature that has got smaller; None if none has.

    Tokens may differ in number from batch to batch: of three dimensions the last one counts then, of others the second.
    """
    if len(before) != len(after):
        return None
    smaller = [d for d in range(1, len(before)) if after[d] < before[d]]
    usual = _usual(before)
    return usual if usual in smaller else smaller[0] if len(smaller) == 1 else None


def _usual(shape: Sequence[int]) -> int:
    """Return the dimension of channels: the last of three, else the second."""
    return len(shape) - 1 if len(shape) == 3 else min(1, len(shape) - 1)


def joined_cuts(cuts: Sequence[Cut]) -> dict[tuple[str, int], Any]:
    """Join cuts that came one after the other: indices that stay, counted from before the first one."""
    result: dict[tuple[str, int], Any] = {}
    for cut in cuts:
        for place, kept in cut.items():
            result[place] = result[place][kept] if place in result else kept
    return result


def find_kept(feature: Tensor, dim: int, count: int, model: nn.Module, shapes: Shapes, cuts: Sequence[Cut]) -> Any:
    """Find which channels of a feature are left after cuts; None if it cannot be told.

    Args:
        feature: The feature after the cuts, with its graph.
        dim: The dimension of its channels.
        count: The number of channels before.
        model: The student after the cuts.
        shapes: The shapes of its parameters before.
        cuts: The cuts, in order.
    """
    kept = joined_cuts(cuts)
    named = {plain_name(n): p for n, p in unwrap(model).named_parameters() if p.requires_grad and plain_name(n) in shapes}
    size = feature.shape[dim]
    order = feature.detach().abs().float().movedim(dim, 0).flatten(1).mean(1).argsort(descending=True).tolist()
    parts: dict[int, tuple[int, int, Any]] = {}  # first channel -> (channels now, channels before, indices that stay)
    tries = 0
    while (free := [c for c in order if not any(s <= c < s + n for s, (n, *_) in parts.items())]) and tries < TRIES:
        part = _part_of(feature, dim, free[tries : tries + 1] + free, named)
        if part is None:
            tries += 1
            if tries >= len(free):
                break
            continue
        start, name, d = part
        before = shapes[name][d]
        parts[start] = (named[name].shape[d], before, kept.get((name, d), np.arange(before)))
    return _assembled(parts, size, count)


def _part_of(feature: Tensor, dim: int, channels: Sequence[int], named: Mapping[str, Tensor]) -> tuple[int, str, int] | None:
    """Find the range of channels that one belongs to: its first channel, the parameter and its dimension."""
    first = channels[0]
    size = feature.shape[dim]
    for name, d, i in _rows_of(feature, dim, first, named):
        start, length = first - i, named[name].shape[d]
        if start < 0 or start + length > size:
            continue
        second = next((c for c in channels if c != first and start <= c < start + length), None)
        if second is None or (name, d, second - start) in _rows_of(feature, dim, second, {name: named[name]}):
            return start, name, d
    return None


def _rows_of(feature: Tensor, dim: int, channel: int, named: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """List parameters of which one index alone, of the first or second dimension, has a gradient: (name, dimension, index)."""
    with torch.enable_grad():
        value = feature.select(dim, channel).float().square().sum()
    gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    found = []
    for name, gradient in zip(named, gradients, strict=True):
        for d in range(min(2, gradient.dim()) if gradient is not None else 0):
            assert gradient is not None
            rows = (gradient != 0).movedim(d, 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0
            if int(rows.sum()) == 1 and len(rows) > 1:
                found.append((name, d, int(rows.nonzero()[0])))
    return found


def _assembled(parts: Mapping[int, tuple[int, int, Any]], size: int, count: int) -> Any:
    """Put ranges of channels together, if they are all channels of before and of now."""
    found: list[Any] = []
    now = before = 0
    for start in sorted(parts):
        length, first, kept = parts[start]
        if start != now or len(kept) != length:
            return None
        found.append(np.asarray(kept) + before)
        now, before = now + length, before + first
    if now != size or before != count:
        return None
    return np.concatenate(found)


def cut_adapter_(adapter: Adapter, index: int, kept: Any, optimizer: Any) -> None:
    """Let an adapter follow a feature whose channels went, and the optimizer's state of its parameters with it."""
    shapes = {p: (f"an adapter's {name}", tuple(p.shape)) for name, p in adapter.named_parameters()}
    states = [(state, strange_keys(state)) for state in states_of(optimizer)]
    changed = adapter.keep_(index, kept) or {  # an adapter that does not say what has got smaller: what its shapes show
        p: {d: kept for d, (n, m) in enumerate(zip(shape, p.shape, strict=True)) if n != m} for p, (_, shape) in shapes.items()
    }
    for p, dims in changed.items():
        if not dims:
            continue
        _put(p, p.data)
        for state, strange in states:
            if state.get(p):
                state[p] = cut_entry(dict(state[p]), *shapes[p], dims, strange)


def renew_adapter_(adapter: Adapter, other: Adapter, optimizer: Any) -> None:
    """Give an adapter the values of a new one, of other shapes; its optimizer's state begins afresh."""
    for p, q in zip(adapter.parameters(), other.parameters(), strict=True):
        _put(p, q.data)
        for state in states_of(optimizer):
            if p in state:
                state[p] = {}
    for own, new in zip(adapter.modules(), other.modules(), strict=True):
        own._buffers = new._buffers


def _put(parameter: Tensor, data: Tensor) -> None:
    """Replace the values of a parameter by ones of another shape; it stays the same object.

    A loss that is still held keeps alive the node that gathers the parameter's gradients, with the shape that it had.
    Autograd makes a new one only where the type changes: so it changes in between.
    """
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64, device=data.device)
    parameter.data = data
