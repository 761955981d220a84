"""The record of a model's masks: the one place that knows the pruned units, and that sets their weights to zero.

Over 300 lines, since it is the one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.granularities import Granularity
from fasterai.core.loop import Fit
from fasterai.core.selection import count_true
from fasterai.core.types import Move, Target
from fasterai.model.cuts import Cut, follow, sliced
from fasterai.model.masks import apply_masks_
from fasterai.model.names import unwrap
from fasterai.model.sharded import check_plain
from fasterai.model.targets import Selection, all_targets
from fasterai.sparse.states import check_masks, check_noted
from fasterai.sparse.watch import Watch
from fasterai.units.making import maker_of
from fasterai.units.partners import revive_
from fasterai.units.pool import Pool, WeightScores

__all__ = ["MaskRecord"]

PIECE = 1 << 16  # decisions compared at once


class MaskRecord:
    """The decisions for each unit of a model's targets, and the masks that follow from them.

    Attributes:
        model: The model, wrapped or not.
        granularity: The granularity that makes units of the weights.
        selection: The targets, and the parameters left out with the reasons.
        maker: The maker of its pools, which also looks at example inputs.
        pools: The pools of units; empty while example inputs are needed and have not been seen.
        keep: Pool's name -> decisions so far, bool of the units' shape; a pool without an entry is dense.
        noted: Name of a bias, or a norm's scale or shift -> its values for pruned outputs, to restore if they return.
        moves: The number of times that the masks have changed.
        trained: Names of pools that have trained in the present run, or in the last one if it was not completed.
        watch: The looks at training that would fill the zeros.
        missed: The targets that are said to be in the model no more.
    """

    def __init__(self, model: nn.Module, granularity: Granularity, selection: Selection) -> None:
        self.model = model
        self.granularity = granularity
        self.maker = maker_of(granularity)
        self.keep: dict[str, Tensor] = {}
        self.noted: dict[str, Tensor] = {}
        self.moves = 0
        self.trained: set[str] = set()
        self._merged: dict[str, tuple[Pool, Tensor]] = {}
        self._merged_of: Mapping[str, Tensor] | None = None  # the decisions that the merged masks are of
        self._counted: dict[str, tuple[Tensor, int]] = {}  # decisions -> how many prune, which metrics ask for again and again
        self.watch, self.missed = Watch(), frozenset[str]()
        self.selection, self.pools = self.maker.make(model, selection)
        follow(model, self)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self.selection.targets

    @property
    def active(self) -> list[Pool]:
        """The pools to prune: those that train, have trained in the present run, or were named by the user.

        Networks that take turns in a batch, as in a GAN, are frozen for moments, and are pruned all the same.
        """
        return [p for p in self.pools if p.trains or p.name in self.trained or p.makers & self.selection.named]

    def note_trained(self) -> None:
        """Note the pools that train at this moment of a run."""
        self.trained |= {p.name for p in self.pools if p.name not in self.trained and p.trains}

    def name(self, names: Iterable[str]) -> None:
        """Note targets as named by the user, so that they are not left out."""
        self.selection = replace(self.selection, named=self.selection.named | frozenset(names))

    def look(self, inputs: tuple[Any, ...]) -> None:
        """Look at the model with example inputs, and make the pools anew.

        Raises:
            ValueError: The model does not run on them, or there is no unit that may be removed.
        """
        self.maker.look(self.model, inputs)
        self._make_pools()

    def look_at_batch(self, fit: Fit) -> None:
        """Look at the model with the first batch of a training, and make the pools anew."""
        self.maker.look_at_batch(self.model, fit)
        self._make_pools()

    def _make_pools(self) -> None:
        self.selection, self.pools = self.maker.make(self.model, self.selection)
        self._merged_of = None

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
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        made = {"trained": set(), "maker": maker_of(state["granularity"]), "watch": Watch()}
        made["missed"] = frozenset()  # pickles of earlier versions have none
        self.__dict__.update({**made, **state})
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
            is_frozen = not any(t.parameter.requires_grad for t in self.targets)
            repair = "all of them are frozen; let them train, or prune them at once with sparsify_model"
            raise ValueError(
                f"optimizer must train the sparsifier's model, got one that holds none of its targets ({self.targets[0].name}, "
                f"...): {repair if is_frozen else 'make the optimizer anew after the model'}"
            )

    def replace(self, chosen: Mapping[str, Tensor]) -> Move:
        """Replace the decisions of some pools.

        Weights are unchanged. Outputs that return get back the bias, scale and shift that they had when they were pruned.

        Returns:
            The decisions of the pools that have changed, before and after; empty if none has.
        """
        by_name = {p.name: p for p in self.pools}
        held = {n: by_name[n].laid_out(k) for n, k in chosen.items()}
        after = {**self.keep, **held}
        revive_(self._vectors(self.keep, after), self.noted)
        before, self.keep = self.keep, after
        moved = [n for n, keep in held.items() if _differ(before.get(n), keep)]
        self.moves += bool(moved)
        return Move({n: _or_dense(before.get(n), held[n]) for n in moved}, {n: held[n] for n in moved})

    def take_zeros(self) -> None:
        """Take units whose weights are all zero for pruned: other weights were loaded, or those of another process."""
        nonzero = WeightScores(lambda target: target.parameter.detach().ne(0).float(), "sum")
        found = {}
        for pool in self.pools:
            stays = pool.score(nonzero) > 0
            found[pool.name] = stays & self.keep[pool.name] if pool.name in self.keep else stays
        self.replace(found)

    def apply_(self) -> None:
        """Set all masked weights to zero, and with removed outputs their biases and their norms' scales and shifts.

        Raises:
            ValueError: A weight that is masked is no plain tensor any more. Nothing is changed then.
        """
        check_plain(place for pool in self.pools if pool.name in self.keep for place in pool.places)
        apply_masks_(self._pairs())

    def masked(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield (name, parameter, mask of as many dimensions as the view that it is for) of all that is masked."""
        places = {place.name: place for pool in self.pools for place in pool.places}
        for name, (pool, mask) in self._merge().items():
            parameter = places[name].module._parameters.get(places[name].attribute)
            if parameter is not None:
                yield name, parameter, mask.expand(pool.tensor(name).shape)

    def look_on(self) -> None:
        """Look at the next backward passes, which would fill the zeros where nothing holds them."""
        self.watch.begin(self.keep, self.masked)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, (pool, mask) in self._merge().items():
            yield pool.tensor(name), mask

    def _merge(self) -> dict[str, tuple[Pool, Tensor]]:
        """Combine the masks of all pools into one for each weight and vector; the result is held until decisions change.

        Channels of two pools cross in the weight between them. There a weight is kept only if both pools keep it: for a weight
        `(2, 3)` whose first output and last input are pruned,

            [[0, 0, 0],     [[1, 1, 0],     [[0, 0, 0],
             [1, 1, 1]]  &   [1, 1, 0]]  =   [1, 1, 0]]
        """
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
        """Drop the masks of pools where a masked weight is not zero any more, and tell if there were any.

        Other weights may have been loaded, or the model has trained without its masks.
        """
        stale = [p.name for p in self.pools if self.disobeying(p)]
        self.keep = {n: k for n, k in self.keep.items() if n not in stale}
        return bool(stale)

    def disobeying(self, pool: Pool) -> int:
        """Count the masked weights of a pool that are not zero."""
        return sum(count_true(weight.ne(0) & ~mask) for weight, mask in self.masks_of(pool))

    def mask_of(self, name: str) -> Tensor | None:
        """Return the mask of a target, bool of the parameter's shape and contiguous; None before the first choice."""
        if name not in self._merge():
            return None
        pool, mask = self._merge()[name]
        shape = next(t.parameter.shape for t in self.targets if t.name == name)
        return mask.expand(pool.tensor(name).shape).reshape(shape).contiguous()

    # --- what is held ------------------------------------------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each target: its name -> a new bool tensor of the parameter's shape, True = keep."""
        shapes = {t.name: t.parameter.shape for t in self.targets}
        result = {t.name: torch.ones_like(t.parameter, dtype=torch.bool) for t in self.targets}
        for name, (pool, mask) in self._merge().items():
            if name in shapes:
                result[name] = mask.expand(pool.tensor(name).shape).reshape(shapes[name]).clone()
        return result

    def masks_of(self, pool: Pool) -> list[tuple[Tensor, Tensor]]:
        """Return the weights of a pool with the masks of this pool alone; empty before the first choice."""
        keep = self.keep.get(pool.name)
        crossed: dict[str, Tensor] = {}
        for name, mask in () if keep is None else pool.masks(keep):  # channels may run along two dimensions of a weight
            crossed[name] = crossed[name] & mask if name in crossed else mask
        return [(pool.tensor(name), mask) for name, mask in crossed.items()]

    def masks_of_targets(self) -> list[tuple[Tensor, Tensor]]:
        """Return the targets' weights with their masks, of all pools together; empty before the first choice."""
        names = {t.name for t in self.targets}
        return [(pool.tensor(name), mask) for name, (pool, mask) in self._merge().items() if name in names]

    def pruned(self, pool: Pool) -> int:
        """Return the number of pruned units of a pool."""
        keep = self.keep.get(pool.name)
        if keep is None:
            return 0
        counted = self._counted.get(pool.name)
        if counted is None or counted[0] is not keep:
            counted = self._counted[pool.name] = (keep, pool.count - count_true(keep))
        return counted[1]

    # --- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the decisions and noted values, with the granularity and shapes that they belong to."""
        return {
            "granularity": repr(self.granularity),
            "shapes": {t.name: list(t.parameter.shape) for t in self.targets},
            "keep": {n: k.clone() for n, k in self.keep.items()},
            "noted": {n: s.clone() for n, s in self.noted.items()},
            "trained": sorted(self.trained),
            "moves": self.moves,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state, as copies on the parameters' devices.

        Raises:
            ValueError: The state is of another model or granularity; the message names the difference.
        """
        check_masks(state, self.granularity, self.targets, self.pools)
        vectors = {
            name: p.tensor(name)
            for p in self.pools
            for name, _ in p.vectors(torch.ones(p.shape, dtype=torch.bool, device=p.device))
        }
        check_noted(state["noted"], vectors)
        self.watch.end()
        devices = {p.name: p.device for p in self.pools}
        self.keep = {n: k.to(devices[n], copy=True) for n, k in state["keep"].items()}
        self.noted = {n: s.to(vectors[n].device if n in vectors else s.device, copy=True) for n, s in state["noted"].items()}
        self.trained |= set(state.get("trained", ()))  # states of earlier versions have none
        self.moves = state.get("moves", self.moves)


def _differ(before: Tensor | None, after: Tensor) -> bool:
    """Tell if two decisions differ; None is a dense pool, all True. On a CPU they are read up to the first difference."""
    if before is None:
        return not bool(after.all())
    if after.device.type != "cpu" or before.stride() != after.stride():
        return not torch.equal(before, after)
    old, new = before.numpy().ravel("K"), after.numpy().ravel("K")
    return any(not np.array_equal(old[i : i + PIECE], new[i : i + PIECE]) for i in range(0, new.size, PIECE))


def _or_dense(before: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=like.device).expand(like.shape) if before is None else before
