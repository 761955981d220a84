"""Keeps the masks of a model: the one record of what is pruned, and the one place that applies it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.loop import Fit
from fasterai.core.selection import count_true
from fasterai.core.types import Target
from fasterai.graph.channels import ChannelGraph
from fasterai.model.cuts import Cut, follow, sliced
from fasterai.model.masks import apply_masks_, like
from fasterai.model.names import unwrap
from fasterai.model.norms import Flow
from fasterai.model.sharded import check_plain
from fasterai.model.targets import Selection, all_targets
from fasterai.sparse.report import Reached, Row, SparsityReport
from fasterai.units.channels import channel_pools
from fasterai.units.partners import find_partners, revive_, without_outputs
from fasterai.units.pool import Pool
from fasterai.units.targets import TargetPool

__all__ = ["MaskRecord"]


class MaskRecord:
    """The decisions per unit of a model's targets, and what follows from them.

    Attributes:
        model: The model, wrapped or not.
        granularity: What a unit is.
        selection: The targets, and what was left out and why.
        pools: The units; none as long as coupled channels are not known.
        flow: What the data flow shows, None as long as it is not known.
        keep: Pool's name -> decisions so far, bool of the units' shape; a pool without any is dense.
        noted: Name of a bias, or a norm's scale or shift -> its values for outputs that are pruned, to give back if they
            return.
        moves: How often the masks have moved.
        trained: Names of pools that have trained in the run under way, or in the last one if it was not completed.
    """

    def __init__(self, model: nn.Module, granularity: Granularity, selection: Selection) -> None:
        self.model = model
        self.granularity = granularity
        self.selection = selection
        self.flow: Flow | None = None
        self.keep: dict[str, Tensor] = {}
        self.noted: dict[str, Tensor] = {}
        self.moves = 0
        self.trained: set[str] = set()
        self._merged: dict[str, tuple[Pool, Tensor]] = {}
        self._merged_of: Mapping[str, Tensor] | None = None  # the decisions that the merged masks are of
        self._counted: dict[str, tuple[Tensor, int]] = {}  # decisions -> how many prune, which is asked for at every move
        self.pools: tuple[Pool, ...] = () if isinstance(granularity, Coupled) else self._target_pools()
        follow(model, self)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self.selection.targets

    @property
    def active(self) -> list[Pool]:
        """The pools that train, or have trained in the run under way, or were named.

        Networks that take turns in a batch, as in a GAN, are frozen for moments.
        """
        return [p for p in self.pools if p.trains or p.name in self.trained or p.makers & self.selection.named]

    def note_trained(self) -> None:
        """Note what trains at this moment of a run."""
        self.trained |= {p.name for p in self.pools if p.name not in self.trained and p.trains}

    @property
    def is_seen(self) -> bool:
        """Whether example inputs have shown all that they can."""
        return bool(self.pools) if isinstance(self.granularity, Coupled) else self.flow is not None

    def name(self, names: Iterable[str]) -> None:
        """Take targets as named by the user, so that they are not left out again."""
        self.selection = replace(self.selection, named=self.selection.named | frozenset(names))

    def see(self, flow: Flow) -> None:
        """Take over what the data flow shows: norms that read a target, and targets that make the output."""
        self.flow = flow
        self.selection = without_outputs(self.selection, self.granularity, flow)
        self.pools, self._merged_of = self._target_pools(), None

    def _target_pools(self) -> tuple[Pool, ...]:
        partners = find_partners(self.model, self.selection, self.granularity, self.flow)
        return tuple(
            TargetPool(t, self.granularity, tuple(p for p in partners if p.target == t.name)) for t in self.selection.targets
        )

    def couple(self, graph: ChannelGraph) -> None:
        """Take over the coupled channels that the targets make.

        Raises:
            ValueError: There are none that may go; why is said.
        """
        assert isinstance(self.granularity, Coupled)
        chosen = {t.name for t in self.targets}
        pools = [p for p in channel_pools(self.model, graph, self.granularity) if p.makers & chosen]
        if not pools:
            why = "; ".join(f"{t.name}: {_why_pinned(t, graph)}" for t in self.targets[:3])
            raise ValueError(f"targets must make channels that may go, got none that do ({why})")
        weights = {t.name: t for p in pools for t in p.targets}
        left_out = {t.name: _why_pinned(t, graph) for t in self.targets if t.name not in weights}
        left_out = {n: why for n, why in {**self.selection.left_out, **left_out}.items() if n not in weights}
        self.selection = Selection(tuple(weights.values()), left_out, self.selection.named)
        self.pools = tuple(pools)

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        fresh = {t.name: t for t in all_targets(unwrap(self.model))}
        before = [p for p in self.pools if p.is_left(fresh)]  # layers may have been taken off or folded since
        self.pools = tuple(p.cut(cut, fresh) for p in before)
        after = {p.name: p for p in self.pools}
        self.keep = {p.name: p.cut_keep(self.keep[p.name], cut, after[p.name]) for p in before if p.name in self.keep}
        self.noted = {n: sliced(values, cut, n) for n, values in self.noted.items()}
        self.selection = replace(self.selection, targets=tuple(fresh[t.name] for t in self.targets if t.name in fresh))
        self._counted = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows its own model."""
        self.__dict__.update({"trained": set(), **state})  # pickles of earlier versions have none
        follow(self.model, self)

    def check_plain(self) -> None:
        """Refuse weights that masks cannot be multiplied into.

        Raises:
            ValueError: One is sharded, or no plain tensor; it is named.
        """
        check_plain([place for pool in self.pools for place in pool.places] or self.targets, self.selection.named)

    def check_trained(self, fit: Fit) -> None:
        """Refuse a run whose optimizer trains another model.

        Raises:
            ValueError: No target is among the optimizer's parameters, or one is no plain tensor.
        """
        self.check_plain()
        groups = [group for one in fit.optimizers for group in getattr(one, "param_groups", ())]
        trained = {id(p) for group in groups for p in group["params"]}
        if trained and not any(id(t.parameter) in trained for t in self.targets):
            raise ValueError(
                f"optimizer must train the sparsifier's model, got one that holds none of its targets ({self.targets[0].name}, "
                "...): make the optimizer anew after the model"
            )

    def replace(self, chosen: Mapping[str, Tensor]) -> bool:
        """Take over new decisions for some pools; the weights are not touched, vectors of returning outputs are.

        Returns:
            Whether the masks have moved.
        """
        by_name = {p.name: p for p in self.pools}
        held = {n: _like_weight(by_name[n], k) for n, k in chosen.items()}
        after = {**self.keep, **held}
        revive_(self._vectors(self.keep, after), self.noted)
        before, self.keep = self.keep, after
        # Choices are nested, so that equal counts are equal masks. Mostly the first pool tells, so that few masks are counted.
        moved = any((count_true(before[n]) if n in before else by_name[n].count) != count_true(k) for n, k in held.items())
        self.moves += moved
        return moved

    def apply_(self) -> None:
        """Set all masked weights to zero, and the biases and norms of silent outputs.

        Raises:
            ValueError: A weight that is masked is no plain tensor any more. Nothing is changed then.
        """
        check_plain(place for pool in self.pools if pool.name in self.keep for place in pool.places)
        apply_masks_(self._pairs())

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, (pool, mask) in self._merge().items():
            yield pool.tensor(name), mask

    def _merge(self) -> dict[str, tuple[Pool, Tensor]]:
        """One mask for each weight and vector, made once per decision: channels of two pools cross in the weight between."""
        if self._merged_of is not self.keep:
            merged: dict[str, tuple[Pool, Tensor]] = {}
            for pool in self.pools:
                keep = self.keep.get(pool.name)
                for name, mask in (*pool.masks(keep), *pool.vectors(keep)) if keep is not None else ():
                    merged[name] = (pool, merged[name][1] & mask if name in merged else mask)
            self._merged, self._merged_of = merged, self.keep
        return self._merged

    def _vectors(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for pool in self.pools:
            if pool.name in after:
                old = before[pool.name] if pool.name in before else torch.ones_like(after[pool.name])
                for (name, new), (_, was) in zip(pool.vectors(after[pool.name]), pool.vectors(old), strict=True):
                    yield name, pool.tensor(name), was, new

    def forget_stale(self) -> bool:
        """Drop masks that the weights no longer obey: others were loaded, or they trained without being held."""
        stale = [p.name for p in self.pools if self._disobeying(p)]
        self.keep = {n: k for n, k in self.keep.items() if n not in stale}
        return bool(stale)

    def _disobeying(self, pool: Pool) -> int:
        """How many masked weights of a pool are not zero."""
        keep = self.keep.get(pool.name)
        masks = {} if keep is None else _crossed(pool.masks(keep))
        return sum(count_true(pool.tensor(name).ne(0) & ~mask) for name, mask in masks.items())

    # --- what is held ------------------------------------------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """Target name -> a new bool tensor of the parameter's shape, True = keep."""
        shapes = {t.name: t.parameter.shape for t in self.targets}
        result = {t.name: torch.ones_like(t.parameter, dtype=torch.bool) for t in self.targets}
        for name, (pool, mask) in self._merge().items():
            if name in shapes:
                result[name] = mask.expand(pool.tensor(name).shape).reshape(shapes[name]).clone()
        return result

    def reached(self) -> Reached:
        """The sparsity, counted from the masks."""
        units = {p.name: p.count for p in self.pools}
        pruned = {p.name: self._pruned(p) for p in self.pools}
        weights = sum(t.parameter.numel() for t in self.targets)
        per_pool = {n: pruned[n] / units[n] if units[n] else 0.0 for n in units}
        return Reached(sum(pruned.values()) / max(1, sum(units.values())), self._masked() / max(1, weights), per_pool)

    def _pruned(self, pool: Pool) -> int:
        keep = self.keep.get(pool.name)
        if keep is None:
            return 0
        counted = self._counted.get(pool.name)
        if counted is None or counted[0] is not keep:
            counted = self._counted[pool.name] = (keep, pool.count - count_true(keep))
        return counted[1]

    def _masked(self) -> int:
        """How many weights of the targets the masks set to zero."""
        if isinstance(self.granularity, Coupled):  # channels of two pools cross in the weight between them
            masks = self.masks()
            return sum(masks[t.name].numel() - count_true(masks[t.name]) for t in self.targets)
        return sum(self._masked_weights(p) for p in self.pools)

    def _masked_weights(self, pool: Pool) -> int:
        keep = self.keep.get(pool.name)
        if keep is None:
            return 0
        # A mask is smaller than its weight where one decision stands for several.
        sizes = ((pool.tensor(name).numel(), mask) for name, mask in _crossed(pool.masks(keep)).items())
        return sum((m.numel() - count_true(m)) * (size // max(1, m.numel())) for size, m in sizes)

    def report(self) -> SparsityReport:
        """What is held, target by target, and what was left out and why."""
        rows = tuple(self._row(p) for p in self.pools)
        active = {p.name for p in self.active}
        left_out = {**self.selection.left_out, **{p.name: "frozen" for p in self.pools if p.name not in active}}
        parameters = [p.detach() for p in unwrap(self.model).parameters()]
        total = sum(p.numel() for p in parameters)
        zeros = total - sum(int(torch.count_nonzero(p)) for p in parameters)
        return SparsityReport(repr(self.granularity), rows, left_out, total, zeros, self._together(rows))

    def _row(self, pool: Pool) -> Row:
        zeros = sum(_zeros(t) for t in pool.targets)
        counts = (pool.count, self._pruned(pool), pool.weights, zeros, self._masked_weights(pool), self._disobeying(pool))
        shape = tuple(pool.targets[0].parameter.shape) if isinstance(pool, TargetPool) else pool.shape
        return Row(pool.name, shape, *counts)

    def _together(self, rows: Sequence[Row]) -> Row:
        """All targets as one."""
        sums = (sum(r.units for r in rows), sum(r.pruned for r in rows))
        weights, zeros = sum(t.parameter.numel() for t in self.targets), sum(_zeros(t) for t in self.targets)
        merged, names = self._merge(), {t.name for t in self.targets}
        masks = ((pool.tensor(n), mask) for n, (pool, mask) in merged.items() if n in names)
        disobeying = sum(count_true(weight.ne(0) & ~mask) for weight, mask in masks)
        return Row("all targets", (), *sums, weights, zeros, self._masked(), disobeying)

    # --- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of what is held, by name, and what it belongs to."""
        return {
            "granularity": repr(self.granularity),
            "shapes": {t.name: list(t.parameter.shape) for t in self.targets},
            "keep": {n: k.clone() for n, k in self.keep.items()},
            "noted": {n: s.clone() for n, s in self.noted.items()},
            "trained": sorted(self.trained),
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
        units = {p.name: p.shape for p in self.pools}
        for name, keep in state["keep"].items():
            if keep.dtype is not torch.bool or tuple(keep.shape) != units.get(name):
                wanted = f"bool of shape {units[name]}" if name in units else f"of {', '.join(units)}"
                raise ValueError(f"state's keep must be {wanted}, got {name}: {keep.dtype} of shape {tuple(keep.shape)}")
        devices = {p.name: p.device for p in self.pools}
        devices_of_vectors = {
            name: p.tensor(name).device
            for p in self.pools
            for name, _ in p.vectors(torch.ones(p.shape, dtype=torch.bool, device=p.device))
        }
        self.keep = {n: k.to(devices[n], copy=True) for n, k in state["keep"].items()}
        self.noted = {n: s.to(devices_of_vectors.get(n, s.device), copy=True) for n, s in state["noted"].items()}
        self.trained |= set(state.get("trained", ()))  # states of earlier versions have none


def _like_weight(pool: Pool, keep: Tensor) -> Tensor:
    """Decisions on single weights in the weight's memory format, so that both are read in the same order."""
    weight = pool.targets[0].parameter
    return like(weight, keep) if isinstance(pool, TargetPool) and keep.shape == weight.shape else keep


def _crossed(masks: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One mask for each weight: channels may run along two dimensions of it."""
    crossed: dict[str, Tensor] = {}
    for name, mask in masks:
        crossed[name] = crossed[name] & mask if name in crossed else mask
    return crossed


def _why_pinned(target: Target, graph: ChannelGraph) -> str:
    """Why the outputs of a target may not go."""
    outputs = 1 if target.layout.axes[0] == {"in"} else 0
    return graph.pinned.get((target.name, outputs), "its channels may not go")


def _zeros(target: Target) -> int:
    weight = target.parameter.detach()
    return weight.numel() - int(torch.count_nonzero(weight))
