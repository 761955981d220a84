"""L3. Keeps the masks of a model: the one record of what is pruned, and the one place that applies it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.granularities import Granularity
from fasterai.core.loop import Fit
from fasterai.core.masks import apply_masks_, like
from fasterai.core.selection import count_true
from fasterai.core.targets import Selection, unwrap
from fasterai.core.types import Target
from fasterai.sparse.dataflow import Flow
from fasterai.sparse.partners import Partner, find_partners, kept_outputs, revive_, without_outputs
from fasterai.sparse.report import Reached, Row, SparsityReport

__all__ = ["Keeper"]


class Keeper:
    """The decisions per unit of a model's targets, and what follows from them.

    Attributes:
        model: The model, wrapped or not.
        granularity: What a unit is.
        selection: The targets, and what was left out and why.
        flow: What the data flow shows, None as long as it is not known.
        keep: Target name -> decisions so far, bool of the units' shape; a target without any is dense.
        noted: Name of a bias, or a norm's scale or shift -> its values for outputs that are pruned, to give back if they
            return.
        moves: How often the masks have moved.
    """

    def __init__(self, model: nn.Module, granularity: Granularity, selection: Selection) -> None:
        self.model = model
        self.granularity = granularity
        self.selection = selection
        self.flow: Flow | None = None
        self.keep: dict[str, Tensor] = {}
        self.noted: dict[str, Tensor] = {}
        self.moves = 0
        self._counted: dict[str, tuple[Tensor, int]] = {}  # decisions -> how many prune, which is asked for at every move
        self._partners: tuple[Partner, ...] = find_partners(model, selection, granularity, None)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self.selection.targets

    @property
    def active(self) -> list[Target]:
        """The targets that train now or were named."""
        return [t for t in self.targets if t.parameter.requires_grad or t.name in self.selection.named]

    def name(self, names: Iterable[str]) -> None:
        """Take targets as named by the user, so that they are not left out again."""
        self.selection = replace(self.selection, named=self.selection.named | frozenset(names))

    def see(self, flow: Flow) -> None:
        """Take over what the data flow shows: norms that read a target, and targets that make the output."""
        self.flow = flow
        self.selection = without_outputs(self.selection, self.granularity, flow)
        self._partners = find_partners(self.model, self.selection, self.granularity, flow)

    def check_trained(self, fit: Fit) -> None:
        """Refuse a run whose optimizer trains another model.

        Raises:
            ValueError: No target is among the optimizer's parameters.
        """
        trained = {id(p) for group in getattr(fit.optimizer, "param_groups", ()) for p in group["params"]}
        if trained and not any(id(t.parameter) in trained for t in self.targets):
            raise ValueError(
                f"optimizer must train the sparsifier's model, got one that holds none of its targets ({self.targets[0].name}, "
                "...): make the optimizer anew after the model"
            )

    def units(self, target: Target) -> int:
        """How many units a target has."""
        return math.prod(self.granularity.unit_shape(target.layout))

    def replace(self, chosen: Mapping[str, Tensor]) -> bool:
        """Take over new decisions for some targets; the weights are not touched, partners of returning outputs are.

        Returns:
            Whether the masks have moved.
        """
        by_name = {t.name: t for t in self.targets}
        # Single weights are held in the weight's memory format, so that both are read in the same order.
        held = {n: like(by_name[n].parameter, k) if k.shape == by_name[n].parameter.shape else k for n, k in chosen.items()}
        after = {**self.keep, **held}
        revive_(self._partner_keeps(self.keep, after), self.noted)
        counts = {n: self._pruned(by_name[n]) for n in held}
        self.keep = after
        # Choices are nested, so that equal counts are equal masks.
        moved = any(self._pruned(by_name[n]) != count for n, count in counts.items())
        self.moves += moved
        return moved

    def apply_(self) -> None:
        """Set all masked weights to zero, and the biases and norms of silent outputs."""
        apply_masks_(self._pairs())

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for target in self.targets:
            keep = self.keep.get(target.name)
            if keep is not None:
                yield target.parameter.detach().view(target.layout.shape), self.granularity.expand(keep, target.layout)
        for partner, _, keep in self._partner_keeps(self.keep, self.keep):
            yield partner.parameter, keep

    def _partner_keeps(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Iterator[tuple[Partner, Tensor, Tensor]]:
        by_name = {t.name: t for t in self.targets}
        for partner in self._partners:
            if partner.target in after:
                new = kept_outputs(after[partner.target], by_name[partner.target])
                old = before.get(partner.target)
                yield partner, torch.ones_like(new) if old is None else kept_outputs(old, by_name[partner.target]), new

    def forget_stale(self) -> bool:
        """Drop masks that the weights no longer obey: others were loaded, or they trained without being held."""
        stale = [t.name for t in self.targets if self._disobeying(t)]
        self.keep = {n: k for n, k in self.keep.items() if n not in stale}
        return bool(stale)

    def _disobeying(self, target: Target) -> int:
        """How many masked weights of a target are not zero."""
        keep = self.keep.get(target.name)
        if keep is None:
            return 0
        view = target.parameter.detach().view(target.layout.shape)
        return count_true(view.ne(0) & ~self.granularity.expand(keep, target.layout))

    # --- what is held ------------------------------------------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """Target name -> a new bool tensor of the parameter's shape, True = keep."""
        result = {}
        for t in self.targets:
            keep = self.keep.get(t.name)
            if keep is None:
                result[t.name] = torch.ones_like(t.parameter, dtype=torch.bool)
            else:
                expanded = self.granularity.expand(keep, t.layout).expand(t.layout.shape)
                result[t.name] = expanded.reshape(t.parameter.shape).clone()
        return result

    def reached(self) -> Reached:
        """The sparsity, counted from the masks."""
        units = {t.name: self.units(t) for t in self.targets}
        pruned = {t.name: self._pruned(t) for t in self.targets}
        masked = sum(self._masked_weights(t) for t in self.targets)
        weights = sum(t.parameter.numel() for t in self.targets)
        per_target = {n: pruned[n] / units[n] if units[n] else 0.0 for n in units}
        return Reached(sum(pruned.values()) / max(1, sum(units.values())), masked / max(1, weights), per_target)

    def _pruned(self, target: Target) -> int:
        keep = self.keep.get(target.name)
        if keep is None:
            return 0
        counted = self._counted.get(target.name)
        if counted is None or counted[0] is not keep:
            counted = self._counted[target.name] = (keep, self.units(target) - count_true(keep))
        return counted[1]

    def _masked_weights(self, target: Target) -> int:
        keep = self.keep.get(target.name)
        if keep is None:
            return 0
        expanded = self.granularity.expand(keep, target.layout)
        return (expanded.numel() - count_true(expanded)) * (target.parameter.numel() // max(1, expanded.numel()))

    def report(self) -> SparsityReport:
        """What is held, target by target, and what was left out and why."""
        rows = []
        for t in self.targets:
            weight = t.parameter.detach()
            zeros = weight.numel() - int(torch.count_nonzero(weight))
            counts = (self.units(t), self._pruned(t), weight.numel(), zeros, self._masked_weights(t), self._disobeying(t))
            rows.append(Row(t.name, tuple(weight.shape), *counts))
        active = {t.name for t in self.active}
        left_out = {**self.selection.left_out, **{t.name: "frozen" for t in self.targets if t.name not in active}}
        parameters = [p.detach() for p in unwrap(self.model).parameters()]
        total = sum(p.numel() for p in parameters)
        zeros = total - sum(int(torch.count_nonzero(p)) for p in parameters)
        return SparsityReport(repr(self.granularity), tuple(rows), left_out, total, zeros)

    # --- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of what is held, by name, and what it belongs to."""
        return {
            "granularity": repr(self.granularity),
            "shapes": {t.name: list(t.parameter.shape) for t in self.targets},
            "keep": {n: k.clone() for n, k in self.keep.items()},
            "noted": {n: s.clone() for n, s in self.noted.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved: copies, on the parameters' devices.

        Raises:
            ValueError: It is of another model or granularity; what differs is named.
        """
        if state["granularity"] != repr(self.granularity):
            raise ValueError(f"state must be of granularity {self.granularity!r}, got {state['granularity']!r}")
        own, theirs = {t.name: list(t.parameter.shape) for t in self.targets}, state["shapes"]
        differences = [f"{n} is missing" for n in own if n not in theirs]
        differences += [f"{n} is not a target here" for n in theirs if n not in own]
        differences += [
            f"{n} is {tuple(theirs[n])}, here {tuple(own[n])}" for n in own if list(theirs.get(n, own[n])) != own[n]
        ]
        if differences:
            raise ValueError(f"state must be of the same model and targets, got one where {'; '.join(differences[:5])}")
        units = {t.name: self.granularity.unit_shape(t.layout) for t in self.targets}
        for name, keep in state["keep"].items():
            if keep.dtype is not torch.bool or tuple(keep.shape) != units.get(name):
                wanted = f"bool of shape {units[name]}" if name in units else f"of {', '.join(units)}"
                raise ValueError(f"state's keep must be {wanted}, got {name}: {keep.dtype} of shape {tuple(keep.shape)}")
        devices = {t.name: t.parameter.device for t in self.targets}
        devices |= {p.name: p.parameter.device for p in self._partners}
        self.keep = {n: k.to(devices[n], copy=True) for n, k in state["keep"].items()}
        self.noted = {n: s.to(devices.get(n, s.device), copy=True) for n, s in state["noted"].items()}
