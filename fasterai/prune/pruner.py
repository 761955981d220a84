"""Removal of channels in one call: score coupled channels, mask the lowest, remove them, check the outputs.

Over 300 lines, since one class chooses, masks, removes and resumes; a third of them are the words of its arguments.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import criteria as criterion_catalogue
from fasterai.core import schedules
from fasterai.core.checks import (
    NamesReplacements,
    check_choice,
    check_count,
    check_fraction,
    from_catalogue,
    names_arguments,
    warn,
)
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Coupled
from fasterai.core.loop import Batch
from fasterai.core.schedules import Schedule, as_schedule, lin
from fasterai.core.selection import Scores, TensorScores
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.features import FeaturesLike, check_may_go
from fasterai.graph.inputs import InputCut, cut_inputs, less_of
from fasterai.graph.labels import Flags
from fasterai.graph.reasons import AS_PART
from fasterai.model.cuts import Cut, follow, input_place
from fasterai.model.inputs import batch_of, positional
from fasterai.model.names import unwrap
from fasterai.model.optimizers import check_optimizer, check_trained
from fasterai.model.supported import check_whole
from fasterai.model.targets import all_targets
from fasterai.prune.check import Sound, largest_sound
from fasterai.prune.choice.budget import Budget, fit_budget, least_left
from fasterai.prune.goal import OVER_PLACES, Ratio, check_context, free_pools, read_layers, read_ratio
from fasterai.prune.removal import Removal, mask_channels_, shapes_of_parameters, silent_channels, take_out
from fasterai.prune.removal_report import ENOUGH, IGNORED
from fasterai.prune.shown_channels import ShownChannels
from fasterai.prune.surgery.dense_shapes import count_at_first
from fasterai.prune.surgery.model_copies import Copies, matching_copies
from fasterai.prune.surgery.plan import cut_normed
from fasterai.units.channel_pools import channel_pools, warn_of_rounding
from fasterai.units.choice import Goal, choose, limits_of
from fasterai.units.evidence import Source
from fasterai.units.scoring import Scorer

__all__ = ["Pruner"]

Weights = Mapping[nn.Parameter, Tensor]


class Pruner(NamesReplacements, ShownChannels):
    """Removal of the channels of a model that matter least.

    Args:
        model: The model; `prune_model` changes it in place.
        pruning_ratio: The share of the channels to remove, in [0, 1), where at least one of each group is kept; a dict of
            layers, their names or globs to shares (context `local`; other layers are unchanged); or a `Budget`.
        context: `local` ranks inside each group of coupled channels, `global` all together; or another of the contexts.
        criteria: The criterion that says how much a weight matters, its name, or a function of the weight.
        schedule: A map from the share of the `iterative_steps` that is done to the share of the ratio reached by then.
        ignored_layers: Modules, or their names, whose outputs are kept, besides all that have to be kept anyway.
        example_inputs: A tensor or tuple that the model runs on.
        iterative_steps: The number of calls of `prune_model` in which the ratio is reached.
        over_places: The operation that makes one score of those of a channel's slices, one slice for each weight that it runs
            through: `sum`, `mean` or `max`.
        round_to: A multiple that the kept channels of a group are rounded up to; by default 8, in groups of at least 32. Pass 1
            for exact counts. With a `Budget` the counts are exact unless it is given.
        data: Batches `(x, y)` for criteria that need data.
        loss: The loss function for criteria that need gradients of `data`.
        exact: True to keep channels that are averaged over where they are not zero. If False they may be removed, which changes
            the outputs. Streams under norms are zero where they are silent, and go exactly.
        features: The dimensions of inputs that may lose indices as channels do, by argument, as `{"x": 1}`, or `Features` with
            indices that stay all the same. Each is a group of its own, `x.1`. The small model takes the inputs cut alike: the
            result's `inputs` says how.
        rewrite: True if a module whose code has sizes written into it may run a traced copy of it, in which they are right.
        original: For a model that has lost channels before: group's name -> number of its channels at first, from which the
            ratio counts. Once one of them has a single channel left, further groups are left alone: its fall has made them,
            as an attention's last head makes one of its values.

    Attributes:
        original: Group's name -> number of its channels at first.
        dense: For a `Budget`, the model as it was at first; else None.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range or unknown, there are no example inputs, or the model cannot be followed.
    """

    _dense_inputs: tuple[Any, ...] | None = None  # before any of them were cut
    _cuts: Mapping[str, InputCut] = MappingProxyType({})

    @names_arguments
    def __init__(
        self,
        model: nn.Module,
        pruning_ratio: Ratio,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str = lin,
        ignored_layers: Iterable[nn.Module | str] | None = None,
        example_inputs: Any = None,
        *,
        iterative_steps: int = 1,
        over_places: str = "sum",
        round_to: int | None = None,
        data: Iterable[Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        exact: bool = True,
        features: FeaturesLike = None,
        rewrite: bool = True,
        original: Mapping[str, int] | None = None,
    ) -> None:
        self.context = check_context(context, pruning_ratio)
        self.model = check_whole(model)
        self.pruning_ratio = pruning_ratio
        self.criteria = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        self.schedule = as_schedule(from_catalogue("schedule", schedule, schedules))
        self.iterative_steps = check_count("iterative_steps", iterative_steps)
        self.over_places = check_choice("over_places", over_places, OVER_PLACES)
        self.round_to = None if round_to is None else check_count("round_to", round_to)
        self.exact, self.rewrite = exact, rewrite
        self.inputs = positional(example_inputs)
        self.ignored_layers = read_layers(model, ignored_layers or ())
        self._graph = channel_graph(model, self.inputs, exact, features=features, rewrite=rewrite)
        check_may_go(features, model, self.inputs, self._graph.inputs)
        pools = channel_pools(model, self._graph, Coupled(over_places))
        first = {} if original is None else dict(original)
        alone = {name: count for name, count in first.items() if name not in {p.name for p in pools}}
        self._pools = free_pools(
            pools, self._graph, self.ignored_layers, first.keys() if alone else None, shapes_of_parameters(model)
        )
        self.original = {p.name: first.get(p.name, p.count) for p in self._pools} | alone
        self._goal = read_ratio(pruning_ratio, self.context, model, self._pools, is_whole=not alone)
        self.dense = copy.deepcopy(unwrap(model)) if isinstance(pruning_ratio, Budget) else None
        source = Source(data=data, loss=loss, inputs=self.inputs)
        weights = [t for t in all_targets(unwrap(model)) if t.parameter.dim() > 1]
        self._scorer = Scorer(self.criteria, Coupled(over_places), source, weights)
        self._step = 0
        self._dense_count = count_at_first(unwrap(model)) if first else sum(p.numel() for p in unwrap(model).parameters())
        self._follow()

    def _settings(self) -> tuple[Any, ...]:
        return (self.pruning_ratio, self.context, self.criteria, *([] if self.schedule == lin else [self.schedule]))

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Group's name -> (channels at first, channels now)."""
        now = {p.name: p.count for p in self._pools}
        return {name: (first, now.get(name, 1)) for name, first in self.original.items()}  # one channel alone is no group

    def prune_model(self, optimizer: Any = None, *, copies: Copies = None, measure: bool = True) -> Removal:
        """Remove channels: take the next of the `iterative_steps`.

        Args:
            optimizer: An optimizer whose state is cut alike; torch's or fastai's.
            copies: Models of the same structure that lose the same channels.
            measure: True to count and time the model before and after.

        Returns:
            The removed channels, those that could not be removed with the reasons, and the change of the outputs.

        Raises:
            ValueError: All steps were taken, or the criterion's evidence is not there. Nothing is changed then.
        """
        if self._step >= self.iterative_steps:
            raise ValueError(
                f"iterative_steps must be at least the number of calls, got {self.iterative_steps} and a further call"
            )
        share = self.schedule((self._step + 1) / self.iterative_steps)
        removal = self.prune_to(share, optimizer, copies=copies, measure=measure)
        self._step += 1
        return removal

    def prune_to(self, share: float, optimizer: Any = None, *, copies: Copies = None, measure: bool = True) -> Removal:
        """Remove channels until a share of the `pruning_ratio` is reached, counted from the channels there were at first.

        Args:
            share: The share of the ratio, in [0, 1].
            optimizer: As for `prune_model`.
            copies: As for `prune_model`.
            measure: As for `prune_model`.

        Raises:
            ValueError: The share is out of range, or the criterion's evidence is not there. Nothing is changed then.
        """
        check_fraction("share", share)
        check_optimizer(optimizer)
        check_trained(self.model, optimizer)
        matching_copies(copies, unwrap(self.model))
        graph = self._graph_now()
        kept = self._choose(graph, share)
        before = {p: p.detach().clone() for p in unwrap(self.model).parameters()}
        try:
            sound, refused = self._mask_sound(graph, kept, before)
            batch = self.pruning_ratio.batch if isinstance(self.pruning_ratio, Budget) else None
            shown = batch_of(self.inputs, batch)  # what the budget is of is what is timed
            options: dict[str, Any] = {
                "copies": copies,
                "exact": self.exact,
                "measure": measure,
                "otherwise": self._otherwise(),
            }
            removal = take_out(self.model, graph, sound, shown, optimizer=optimizer, **options)
        except BaseException:
            _restore(before)
            raise
        self._scorer.note_move(self.model, self._pools)
        refused |= removal.refused
        asked = self.pruning_ratio * share if isinstance(self.pruning_ratio, int | float) else None
        removal = replace(removal, refused=refused, asked=asked, dense=self._dense_count)
        if share == 1:
            self._warn_of_a_miss(kept, removal)
        return removal

    def _otherwise(self) -> str:
        return IGNORED if self.ignored_layers else AS_PART

    def _warn_of_a_miss(self, kept: Sequence[Flags], removal: Removal) -> None:
        """Warn if more is kept than asked for: by rounding, as the check has put channels back, or as much is pinned."""
        refused = removal.refused
        if self._goal is not None and self.round_to != 1:  # else one of each group stays, which the choice has said
            first, alone = sum(self.original.values()), len(self.original) - len(kept)
            gone = first - alone - sum(int(k.sum()) for k in kept)
            warn_of_rounding(self._goal.total(self.original), gone, first, self.round_to)
        elif refused:
            names = ", ".join([*refused][:5])
            warn(f"{self.pruning_ratio} was not reached: channels of {names} cannot be removed; the result's refused says why")
        chosen = sum(self.original.values()) - sum(int(k.sum()) for k in kept)
        if removal.shortfall and chosen >= ENOUGH * (removal.asked or 0.0) * sum(self.original.values()):
            warn(f"{removal.shortfall}; the result's kept_because has all reasons")

    def is_within_reach(self) -> bool:
        """Tell if the `Budget` is met once all removable channels are removed; a ratio is always within reach."""
        if not isinstance(self.pruning_ratio, Budget):
            return True
        equal: list[Scores] = [TensorScores(p.name, torch.zeros(p.shape)) for p in self._pools]
        budget, least = self.pruning_ratio, self._try(equal, 1.0)
        graph, whole = self._graph_now(), self._dense_inputs
        return least_left(self.model, graph, self.inputs, least, budget, self.dense, whole) <= budget.share

    def see(self, batch: Batch, loss: Callable[..., Tensor] | None = None) -> None:
        """Note the batch and loss of a training, for a criterion that needs data where the user gave none."""
        self._scorer.begin(loss)
        self._scorer.see(batch)

    def end(self) -> None:
        """Forget the batch and loss of the training."""
        self._scorer.end()

    def look_as(self, other: Pruner) -> None:
        """Take over what another pruner of the model remembers of its first looks at groups."""
        self._scorer.looks = other._scorer.looks

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next choice depends on besides the weights: plain numbers, and copies of earlier weights."""
        alone = [name for name, (_, now) in self.channels.items() if now == 1]
        return {"original": dict(self.original), "alone": alone, **self._scorer.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a saved state that lacks weights which the criterion remembers.

        Raises:
            ValueError: It does.
        """
        self._scorer.check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, with a model as small as it was then; the caller's dict is not changed."""
        alone = set(state.get("alone", ()))  # one channel alone makes no group of the small model
        known = self.original.keys() | alone
        if alone:  # and may make another, such as the values of an attention's last head
            self._pools = tuple(p for p in self._pools if p.name in state["original"])
            known &= state["original"].keys()
            self.original = {name: count for name, count in self.original.items() if name in known}
        self.original |= {name: count for name, count in state["original"].items() if name in known}
        self._scorer.load_state_dict(state, all_targets(unwrap(self.model)))

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        fresh = {t.name: t for t in all_targets(unwrap(self.model))}
        self._scorer.cut_choice([p for p in self._pools if p.is_left(fresh)], cut)
        self._pools = tuple(p.cut(cut, fresh) for p in self._pools if p.is_left(fresh))
        self._graph = replace(self._graph, normed=cut_normed(self._graph.normed, cut))
        self._cut_inputs(cut)

    def _cut_inputs(self, cut: Cut) -> None:
        """Take less of the example inputs, and of data, where the model does."""
        sizes = self._graph.input_sizes
        lost = {p: (cut[input_place(*p)], size) for p, size in sizes.items() if input_place(*p) in cut}
        now = {name: InputCut(name, d, tuple(kept.tolist()), size) for (name, d), (kept, size) in lost.items()}
        if not now:
            return
        self._dense_inputs = self._dense_inputs or self.inputs
        self.inputs = cut_inputs(self.model, self.inputs, now.values())
        self._cuts = {**self._cuts} | {
            name: self._cuts[name].then(one) if name in self._cuts else one for name, one in now.items()
        }
        self._graph = replace(self._graph, input_sizes={**sizes, **{p: len(kept) for p, (kept, _) in lost.items()}})
        self._scorer.take_less(self.inputs, partial(less_of, self.model, tuple(self._cuts.values())))

    def _follow(self) -> None:
        follow(self.model, self)
        follow(self.model, self._scorer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        self.__dict__.update(state)
        self._follow()

    def print_sparsity(self) -> None:
        """Print the number of channels of each group, now and at first."""
        for name, (before, now) in self.channels.items():
            print(f"{name}: {now} of {before} channels")  # noqa: T201 - what it is for

    # --- the choice --------------------------------------------------------------------------------------------------

    def _graph_now(self) -> ChannelGraph:
        return replace(self._graph, groups=tuple(p.group for p in self._pools))

    def _choose(self, graph: ChannelGraph, share: float) -> list[Flags]:
        if not self._pools:  # one channel of each group is left
            return []
        scores = _silent_first(self._scorer(self.model, self._pools, {}), silent_channels(self.model, graph))
        if isinstance(self.pruning_ratio, Budget):
            left = self.pruning_ratio.share + (1 - share) * (1 - self.pruning_ratio.share)
            shares: dict[str, Any] = {self.pruning_ratio.kind: left, "batch": self.pruning_ratio.batch}
            budget = Budget(**shares)
            attempt, whole = partial(self._try, scores), self._dense_inputs
            return fit_budget(self.model, graph, self.inputs, attempt, budget, self.dense, whole)
        assert self._goal is not None
        return self._keep(scores, self._goal.at(share).left(self.original, {p.name: p.count for p in self._pools}))

    def _try(self, scores: Sequence[Scores], sparsity: float) -> list[Flags]:
        """Return a choice for a search; it gives no warnings, since most such choices are discarded."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._keep(scores, Goal(self.context, sparsity))

    def _keep(self, scores: Sequence[Scores], goal: Goal) -> list[Flags]:
        round_to = 1 if self.round_to is None and self._goal is None else self.round_to
        limits = limits_of(self._pools, round_to=round_to, first=self.original)
        return [keep.cpu().numpy() for keep in choose(self._pools, scores, goal, limits, by=self.criteria)]

    def _mask_sound(self, graph: ChannelGraph, kept: list[Flags], before: Weights) -> tuple[Sound, dict[str, str]]:
        """Mask the channels that can be removed; groups whose channels cannot be get their weights back.

        Returns:
            The channels to remove, and group's name -> the reason for which its channels cannot be removed.
        """
        mask_channels_(self.model, graph, kept)
        find = partial(largest_sound, self.model, graph, inputs=self.inputs, exact=self.exact, rewrite=self.rewrite)
        sound = find(kept)
        if not sound.refused:
            return sound, {}
        _restore(before)
        mask_channels_(self.model, graph, sound.kept)
        # With their weights back, what stays may carry what was tried without them.
        return find(sound.kept), sound.refused


@torch.no_grad()
def _restore(weights: Weights) -> None:
    """Copy the weights back, except to parameters that have lost channels: those have lost the masked ones."""
    for parameter, before in weights.items():
        if parameter.shape == before.shape:
            parameter.copy_(before)


def _silent_first(scores: Sequence[Scores], silent: Sequence[Flags]) -> list[Scores]:
    """Rank channels that are always zero below all others: removing them does not change the outputs.

    Scores 5, 2, 7, where the first channel is always zero, become 1, 2, 7: one less than the lowest.
    """
    values = [s.tensor() for s in scores]
    below = min(float(v.min()) for v in values) - 1
    flags = [torch.as_tensor(f, device=v.device) for f, v in zip(silent, values, strict=True)]
    return [TensorScores(s.name, v.masked_fill(f, below)) for s, v, f in zip(scores, values, flags, strict=True)]
