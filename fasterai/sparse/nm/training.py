"""Training at N:M: the optimizer has all weights, the model shows the N largest of every M, chosen anew after every step.

Only what is not shown is held beside the model: shown and hidden weights are zero where the other is not, so that their sum is
the whole, bit for bit.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import granularities, schedules
from fasterai.core.checks import check_count, check_number, from_catalogue
from fasterai.core.contexts import NM
from fasterai.core.loop import Fit
from fasterai.core.saved import check_parts, mapping_of, settings_in_words, tensor, text, texts, warn_of_settings, whole
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.core.types import Target
from fasterai.display import counted
from fasterai.model.cuts import Cut, follow
from fasterai.model.names import unwrap
from fasterai.model.sharded import check_unflattened
from fasterai.model.targets import LayerTypes, TargetsLike, all_targets
from fasterai.sparse.doubts import tell_of_averages
from fasterai.sparse.goal import check_sources
from fasterai.sparse.latent import LatentWeights
from fasterai.sparse.masked import Masked
from fasterai.sparse.nm.choice import groups_dim, split_
from fasterai.sparse.nm.flips import PARTS, FlipNotes
from fasterai.sparse.nm.layers import Skip, choose_layers, misfits
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.states import check_masks, check_shapes

__all__ = ["NMTraining", "ScheduleLike"]

ScheduleLike = Schedule | Callable[[float], float] | str | None


class NMTraining(LatentWeights, Masked, ABC):  # type: ignore[misc]  # both say what model and targets are
    """The part that `SRSTE` and `STE` have in common; they differ in the decay."""

    def __init__(
        self,
        model: nn.Module,
        n: int,
        m: int,
        decay: float,
        *,
        targets: TargetsLike | None,
        skip: Skip,
        layer_type: LayerTypes | None,
        schedule: ScheduleLike,
        looks: int,
    ) -> None:
        super().__init__()
        check_sources(model, None, None)
        self.n, self.m, self.decay, self.schedule, looks = read_settings(n, m, decay, schedule, looks)
        check_unflattened(model)
        self._record = MaskRecord(model, granularities.weight, choose_layers(model, self.m, targets, layer_type, skip))
        self._record.check_plain()
        self._holds = []
        self._count = self._count_at(0.0)
        self._is_cut = False
        self._sums: dict[str, tuple[torch.dtype, int]] = {}  # of the weights shown when the last run ended
        self.notes = FlipNotes(looks)
        follow(model, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        self.__dict__.update(state)
        follow(self.model, self)

    @property
    def count(self) -> int:
        """The number of weights that are kept of every m at the moment; n, but where a schedule is on its way there."""
        return self._count

    def _count_at(self, position: float) -> int:
        share = 1.0 if self.schedule is None else self.schedule(position)
        return self.m - round(share * (self.m - self.n))

    def _line(self) -> str:
        dense = counted(sum(1 for why in self._record.selection.left_out.values() if why), "parameter")
        on_way = f", at {self._count}:{self.m} now" if self._count != self.n else ""
        return (
            f"<{type(self).__name__}: {self.n}:{self.m} in {counted(len(self.targets), 'target')}{on_way}, {dense} left dense; "
            f"decay {self.decay:g}>"
        )

    # --- shown and hidden weights --------------------------------------------------------------------------------------

    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        """Leave the largest of every group, and return the others."""
        hidden = torch.empty_like(weight) if kept is None else kept
        view = weight.view(target.layout.shape)
        count = self._count if self._takes_part(target) else self.m
        split_(view, hidden.view(view.shape), self._keep_of(target, view), groups_dim(target.layout), count, self.m)
        return hidden

    def restore_(self, target: Target, weight: Tensor, kept: Tensor) -> None:
        """Put the hidden weights back, where zeros are."""
        weight.add_(kept)

    def pull_(self, target: Target, gradient: Tensor, kept: Tensor) -> None:
        """Add the decay of the hidden weights."""
        if self.decay:
            gradient.add_(kept, alpha=self.decay)

    def _takes_part(self, target: Target) -> bool:
        """Tell if a target trains, has trained or was named; frozen layers stay dense otherwise."""
        record = self._record
        if target.parameter.requires_grad:
            record.trained.add(target.name)
        return target.name in record.trained or target.name in record.selection.named

    def _keep_of(self, target: Target, view: Tensor) -> Tensor:
        """Return the mask to write the next choice into, in the weight's order of memory."""
        keep = self._record.keep.get(target.name)
        if keep is None or keep.shape != view.shape or keep.stride() != view.stride() or keep.device != view.device:
            keep = torch.empty_like(view, dtype=torch.bool)
            self._record.keep = {**self._record.keep, target.name: keep}
        return keep

    # --- a run ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run: the model is N:M sparse from now on, at every moment but within the optimizer's step.

        Raises:
            ValueError: The run trains another model, all targets are frozen, or a weight is no plain tensor.
        """
        self._record.check_trained(fit)
        if self._is_cut:
            self._open_all()
            self._show_again()
            self._is_cut = False
        super().on_fit_start(fit)
        self._record.watch.take_up(fit)
        tell_of_averages(fit)
        self.notes.begin(self._record.keep)

    def _is_shown(self) -> bool:
        sums = ((self._sums.get(t.name), _sum(t)) for t in self.targets)
        same = all(before == now for before, now in sums if before is not None and before[0] is now[0])
        return same and super()._is_shown()

    def after_step(self, position: float) -> None:
        """Choose anew, with fewer of every group if the schedule says so."""
        self._fall_to(self._count_at(position))
        super().after_step(position)
        self._record.moves += 1
        self.notes.see(position, self._record.moves, self._record.keep)

    def _fall_to(self, count: int) -> None:
        """Keep fewer of every group from the next choice on; that number never rises."""
        if count < self._count:
            self._count = count
            self._open_all()
            self._record.keep = {name: keep.clone() for name, keep in self._record.keep.items()}  # they are counted anew

    @torch.no_grad()
    def _open_all(self) -> None:
        self._take_changes()
        for target in self.targets:
            if target.name in self._kept and target.name not in self._opened:
                self._opened[target.name] = target
                self.restore_(target, target.parameter.detach(), self._kept[target.name])

    def on_fit_end(self, completed: bool) -> None:
        """End the run; a step that was interrupted is shown as far as it came, and a run without one leaves no trace."""
        if completed:
            self._fall_to(self.n)
        undone = set() if completed else {t.name for t in self._begun or ()}
        super().on_fit_end(completed)
        self._sums = {t.name: _sum(t) for t in self.targets}
        # Another dict, since masks that were written over are looked at as others.
        self._record.keep = {name: keep for name, keep in self._record.keep.items() if name not in undone}
        self._record.watch.let_go()
        self._record.look_on()

    def _undo(self) -> None:
        undone = {target.name for target in self._begun or ()}
        super()._undo()
        self._record.keep = {name: keep for name, keep in self._record.keep.items() if name not in undone}

    def shortfall(self) -> str:
        """Return the pattern reached of the one asked for, if the schedule has not come to its end; empty if it has."""
        return "" if self._count == self.n else f"{self._count}:{self.m} of {self.n}:{self.m}"

    def after_cut(self, cut: Cut) -> None:
        """Follow weights that have got smaller; their groups are made anew at the next step.

        Raises:
            ValueError: A layer's inputs are no multiple of m any more.
        """
        names = {t.name for t in self.targets}
        uneven = misfits((t for t in all_targets(unwrap(self.model)) if t.name in names), self.m)
        if uneven:
            name, inputs = next(iter(uneven.items()))
            raise ValueError(
                f"channels under {self.name} must go in multiples of {self.m}, got {inputs} inputs left in {name}; prune with "
                f"round_to={self.m}, or call finalize() before"
            )
        super().after_cut(cut)
        self._is_cut, self._sums = True, {}
        self.notes.forget_masks()

    def finalize(self) -> None:
        """End sparse training: the zeros stay in the weights, hidden weights are dropped, and holds end."""
        self.forget_latent()
        self._end_holds()

    # --- saving and going on -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all weights, hidden ones included, with the masks and flips so far, as copies by parameter name."""
        own = {"count": self._count, "settings": self._in_words()}
        return {**self._record.state_dict(), **super().state_dict(), **self.notes.state_dict(), **own}

    def _in_words(self) -> dict[str, str]:
        return settings_in_words(n=self.n, m=self.m, decay=self.decay, schedule=self.schedule)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state: the model shows what follows from its weights. In a run, other arguments are warned of.

        Raises:
            ValueError: It is no such state, or of another model. Nothing is changed then.
            TypeError: A part is of the wrong type.
        """
        check_parts(state, self.name, {**PARTS, "latent": mapping_of(tensor), "keep": mapping_of(tensor), "count": whole})
        check_parts(state, self.name, {"granularity": text, "shapes": _mapping, "noted": _mapping, "trained": texts})
        check_masks(state, self._record.granularity, self.targets, self._record.pools)
        check_shapes("state's latent weights", state["latent"], state["shapes"])
        if self._record.watch.is_held:
            warn_of_settings(self.name, state.get("settings", {}), self._in_words())
        self._record.load_state_dict(state)
        self._count = min(max(state["count"], self.n), self.m)
        self._sums = {}
        super().load_state_dict(state)
        self.notes.load_state_dict(state, self._record.keep)


def read_settings(
    n: int, m: int, decay: float, schedule: ScheduleLike, looks: int
) -> tuple[int, int, float, Schedule | None, int]:
    """Return checked settings.

    Raises:
        ValueError: One is out of range or unknown.
        TypeError: One is of the wrong type.
    """
    pattern = NM(n, m)
    found = None if schedule is None else as_schedule(from_catalogue("schedule", schedule, schedules))
    return pattern.n, pattern.m, check_number("decay", decay, at_least=0.0), found, check_count("looks", looks, 0)


def _mapping(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {value!r} ({type(value).__name__})")


def _sum(target: Target) -> tuple[torch.dtype, int]:
    """Return the type of a weight and the sum of its bits, which is the same on every device and of NaN too."""
    weight = target.parameter.detach()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.dtype, int(weight.view(bits).sum())
