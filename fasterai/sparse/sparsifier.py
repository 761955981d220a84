"""The sparsifier: granularity x context x criteria x schedule, and the one record of the masks.

Over 300 lines, since a third of it states the arguments, which pruning at once and pruning over a training have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import contexts, granularities, schedules
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import NamesReplacements, check_count, check_fraction, entry_or_repr, from_catalogue, warn
from fasterai.core.contexts import NM, Context, PerTarget
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.loop import Batch, Fit
from fasterai.core.saved import settings_in_words, warn_of_settings
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.core.types import Target
from fasterai.display import counted, told_apart, units_word
from fasterai.graph.features import FeaturesLike
from fasterai.model.cuts import follow, note_optimizer
from fasterai.model.sharded import check_unflattened
from fasterai.model.targets import LayerTypes, TargetsLike, find_targets
from fasterai.sparse.doubts import tell_of_averages, warn_of_filled, warn_of_replaced
from fasterai.sparse.goal import (
    Sparsity,
    check_sources,
    find_misfit,
    read_context,
    read_goal,
    read_granularity,
    read_inputs,
    read_rule,
)
from fasterai.sparse.masked import Masked
from fasterai.sparse.moves import move_masks, tell_of_rounding, warn_without_flow
from fasterai.sparse.pace import Pace
from fasterai.sparse.ranks import agree, check_joining, find_parallel, is_joining
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.states import FORMAT, check_state
from fasterai.units.choice import Goal, limits_of
from fasterai.units.evidence import NotYetError, Source
from fasterai.units.pool import Pool
from fasterai.units.rules import Moment, Rule, nested
from fasterai.units.scoring import Scorer
from fasterai.units.watching import without_unwatched

__all__ = ["Sparsifier", "Sparsity"]


class Sparsifier(NamesReplacements, Masked):
    """A tool that makes the weights of a model sparse, at once or over a training, and keeps them sparse.

    Nothing is added to the model: no buffer, no hook, no renamed parameter. All state is here and in `state_dict()`.

    Args:
        model: The model, wrapped by DDP or compiled or not; changed only where masks are multiplied into weights.
        granularity: The granularity that groups weights into units, or its name.
        context: The context that chooses among units, its name, or a dict of target names or globs to sparsities.
        criteria: The criterion that says how much a weight matters, its name, or a function of the weight.
        sparsity: The share of units to prune by the end of a training, in [0, 1], or a dict of names or globs to shares
            (context `local`; targets that it does not name stay dense).
        schedule: A map from the position of the training to the share of the sparsity that is reached by then.
        nm: Prune two of every four neighbouring inputs; short for context `two_four`.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        targets: Names of parameters, modules or containers, globs, or a predicate (name, parameter); instead of the default.
        data: Batches `(x, y)` for criteria that need data; a callback passes the batches of the training instead.
        loss: The loss function for criteria that need gradients of `data`.
        example_inputs: A tensor or tuple that the model runs on. It shows the batch norm that reads each filter, and the
            target that makes the output; for granularity `coupled`, the groups of coupled channels. Callbacks of fastai and
            Lightning pass a batch instead.
        min_keep: The number of units of each target that are kept at least. At granularity `layer` whole targets are pruned.
        round_to: A multiple that the kept units of each target are rounded up to. Coupled channels are by default rounded up to
            8, in groups of at least 32; pass 1 for exact counts.
        rule: The way in which new masks of a training follow from the old: `nested` (pruned units stay pruned while the
            sparsity rises), `free` (all units are chosen anew), their names, or `DropAndGrow(...)`.
        max_updates: The most times that the masks follow the schedule in one training, each time with an even share of the
            units that are left. A schedule that moves at fewer steps is followed at each of them. The last time the count is
            exact. Changes by a rule come in addition.
        features: For granularity `coupled`, the dimensions of inputs whose indices are units too, by argument, as `{"x": 1}`,
            or `Features` with indices that stay all the same: all layers that read an index lose it together.

    Raises:
        ValueError: An argument is out of range or unknown, no target is found, a target does not have such units, or a
            weight is parametrised, sharded or no plain tensor.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: Granularity | str = "weight",
        context: Context | Mapping[str, float] | str = "local",
        criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
        *,
        sparsity: Sparsity | None = None,
        schedule: Schedule | Callable[[float], float] | str = "one_cycle",
        nm: bool = False,
        layer_type: LayerTypes | None = None,
        targets: TargetsLike | None = None,
        data: Iterable[Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        example_inputs: Any = None,
        min_keep: int = 1,
        round_to: int | None = None,
        max_updates: int = 50,
        rule: Rule | str = nested,
        features: FeaturesLike = None,
    ) -> None:
        check_sources(model, data, loss)
        self.granularity = read_granularity(granularity)
        if isinstance(context, Mapping):
            if sparsity is not None:
                raise ValueError("sparsity must be given once, got a dict as context and a sparsity")
            sparsity, context = context, "local"
        self.context = read_context(context, nm)
        self.criteria = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        self.min_keep = check_count("min_keep", min_keep, 0)
        self.round_to = None if round_to is None else check_count("round_to", round_to)
        if self.round_to is not None and isinstance(self.context, NM):
            raise ValueError("round_to must be None for N:M, which fixes what each group keeps")
        self.rule = read_rule(rule, self.context)
        self._pace = Pace(as_schedule(from_catalogue("schedule", schedule, schedules)), check_count("max_updates", max_updates))
        check_unflattened(model)
        coarse = self.granularity.is_coarse
        find = partial(find_targets, model, fits=self._misfit, raw=isinstance(self.granularity, Coupled))
        selection = find(coarse=coarse, targets=targets, layer_type=layer_type)
        if not self.granularity.shares_weights:
            for criterion in (self.criteria, *self.rule.criteria):
                selection = without_unwatched(selection, criterion)
        self._record = MaskRecord(model, self.granularity, selection)
        self._record.check_plain()
        if features is not None:
            self._record.maker.take_features(features)
        source = Source(data=data, loss=loss, inputs=read_inputs(example_inputs))
        self._sparsity = sparsity
        self._goal: Goal | None = None
        if source.inputs is not None and self._record.maker.needs_inputs:
            self._record.look(source.inputs)
        self._read_own_sparsity()
        if source.inputs is not None and not self._record.maker.needs_inputs:  # what was named is not left out for them
            self._record.look(source.inputs)
        self._scorer = Scorer(self.criteria, self.granularity, source, self.targets, self.rule.criteria)
        follow(model, self._scorer)
        self._warned = False
        self._stepping = self._regrown = False
        self._parallel: DistributedDataParallel | None = None  # of the run under way
        self._holds = []

    # --- what it acts on -------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The map from the position of a training to the share of the sparsity that is reached by then."""
        return self._pace.schedule

    @property
    def max_updates(self) -> int:
        """The most times that the masks follow the schedule in one training."""
        return self._pace.max_updates

    def _line(self) -> str:
        reached, units = self.sparsity, units_word(repr(self.granularity))
        done = f"{reached.overall:.1%} of the {units} pruned in {counted(len(reached), 'target')}"
        if self._record.maker.needs_inputs and not self._record.maker.is_seen:
            done = f"{units} not known yet, example_inputs= shows them"
        named = (
            (self.granularity, granularities),
            (self.context, contexts),
            (self.criteria, criterion_catalogue),
            (self.schedule, schedules),
        )
        return f"<Sparsifier: {done}; {', '.join(entry_or_repr(value, catalogue) for value, catalogue in named)}>"

    def _misfit(self, target: Target) -> str | None:
        return find_misfit(target, self.granularity, self.context)

    @property
    def _drops_outputs(self) -> bool:
        return any(self.granularity.drops_outputs(t.layout) for t in self.targets)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        plan = state.pop("_plan", None)  # of pickles of earlier versions, which have no rule either
        goal = None if plan is None else Goal(*plan)
        self.__dict__.update({"_parallel": None, "rule": nested, "_goal": goal, "_regrown": False, **state})
        follow(self.model, self._scorer)

    def _warn_without_flow(self) -> None:
        """Warn once that norms and outputs are not known without example inputs."""
        if not (self._warned or self._record.maker.is_seen) and self._drops_outputs:
            self._warned = True
            warn_without_flow(self._record)

    # --- pruning at once --------------------------------------------------------------------------------------------

    def sparsify_model(self, sparsity: Sparsity | None = None, round_to: int | None = None) -> None:
        """Prune now, to exactly the sparsity asked for; if it is lower than before, units return, with zero weights.

        Args:
            sparsity: A share in [0, 1], or a dict of target names or globs to shares; the constructor's if left out.
            round_to: A multiple that the kept units of each target are rounded up to; the constructor's if left out.

        Raises:
            ValueError: The sparsity is out of range or names no target, a weight is NaN or infinite, every target is
                frozen, or the criterion's evidence is not there. Nothing is changed then.
        """
        goal = self._goal if sparsity is None else self._read_sparsity(sparsity)
        if goal is None:
            raise ValueError("sparsity must be given, here or to the Sparsifier")
        self._record.check_plain()
        self._record.maker.check_seen()
        if not self._record.active:
            raise ValueError("targets must train, and all are frozen: name them with targets= to prune them all the same")
        self._warn_without_flow()
        self._forget_stale()
        self._move(goal, 1.0, self._record.active, may_fall=True, round_to=round_to)
        self.apply_masks()

    def sparsify_layer(self, m: nn.Module, sparsity: float, round_to: int | None = None) -> None:
        """Prune the targets of one module now; all others are unchanged.

        Raises:
            ValueError: `m` holds no target, or the sparsity is out of range.
        """
        if not isinstance(m, nn.Module):
            raise TypeError(f"m must be a module of the model, got {m!r}; for names pass sparsify_model a dict")
        self._record.check_plain()
        self._record.maker.check_seen()
        targets = {t.name for t in self.targets if any(t.module is inner for inner in m.modules())}
        pools = [p for p in self._record.pools if p.makers & targets]
        if not pools:
            raise ValueError(
                f"m must hold a target, got {type(m).__name__}; the targets are {', '.join(t.name for t in self.targets)}"
            )
        share = check_fraction("sparsity", sparsity)
        self.context.check(share)
        self._warn_without_flow()
        self._forget_stale()
        self._move(Goal(self.context, share), 1.0, pools, may_fall=True, round_to=round_to)
        self.apply_masks()

    # --- the choice --------------------------------------------------------------------------------------------------

    def _read_sparsity(self, sparsity: Sparsity) -> Goal:
        has_features = getattr(self._record.maker, "features", None) is not None
        return read_goal(sparsity, self.context, self.model, self._record.pools, self.targets, has_features=has_features)

    def _read_own_sparsity(self) -> None:
        """Read the constructor's sparsity; targets that it names are not left out."""
        self._goal = None if self._sparsity is None else self._read_sparsity(self._sparsity)
        if self._goal is not None and isinstance(self._goal.context, PerTarget):
            self._record.name(self._goal.context.sparsities)

    def _move(
        self,
        goal: Goal,
        share: float,
        pools: list[Pool],
        may_fall: bool,
        round_to: int | None = None,
        moment: Moment | None = None,
    ) -> None:
        """Choose the units to prune and replace the masks; if anything fails, nothing is changed."""
        round_to = self.round_to if round_to is None else check_count("round_to", round_to)
        warn_of_replaced(self._record)
        limits = limits_of(pools, min_keep=self.min_keep, may_fall=may_fall, round_to=round_to)
        together = partial(
            agree,
            pools=pools,
            parallel=self._parallel or find_parallel(self.model),
            criteria=(self.criteria, *self.rule.criteria),
        )
        move = move_masks(self._record, self._scorer, goal.at(share), pools, limits, self.rule, moment=moment, agree=together)
        if self.rule != nested and not self._regrown:
            self._regrown = any(bool((after & ~move.before[name]).any()) for name, after in move.after.items())
        if limits.round_to and share == 1:
            tell_of_rounding(self._record, goal, pools, round_to)

    def _forget_stale(self) -> None:
        if self._record.forget_stale():
            self._pace.asked = ()
            self._scorer.forget_looks(but=self._record.keep)

    # --- pruning over a training: the participant -------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run; units that are pruned already stay pruned until the schedule has reached their sparsity.

        Raises:
            ValueError: No sparsity was given, or the criterion's evidence will not be there.
        """
        if self._goal is None:
            raise ValueError("sparsity must be given to the Sparsifier to train with it")
        self._record.check_trained(fit)
        note_optimizer(self.model, fit.optimizer)
        if not self._record.maker.is_seen and fit.batch is not None and self._drops_outputs:
            self._look_at_batch(fit)
        self._record.maker.check_seen()
        self._scorer.begin(fit.loss)
        self._warn_without_flow()
        self._forget_stale()
        self._pace.start(fit.total_steps, self._highest_sparsity())
        self._record.trained = set()
        self._record.note_trained()
        self._parallel = find_parallel(fit.model)
        self._regrown = False
        tell_of_averages(fit)
        self._record.watch.take_up(fit)

    def _look_at_batch(self, fit: Fit) -> None:
        self._record.look_at_batch(fit)
        self._scorer.retarget(self.targets)  # outputs may have been left out
        if self._record.maker.needs_inputs:  # only now the targets are known
            self._goal = self._read_sparsity(self._sparsity or 0.0)

    def _highest_sparsity(self) -> float:
        """Return the highest sparsity asked for of any pool, at most that which leaves half a unit of all (so below 1)."""
        assert self._goal is not None
        return min(self._goal.highest, 1 - 0.5 / max(1, sum(p.count for p in self._record.pools)))

    def hears(self, event: str) -> bool:
        """Tell if it takes part in an event; in batches only if its criterion reads them."""
        return super().hears(event) and (event != "after_forward" or self._scorer.reads_batches)

    def after_forward(self, batch: Batch) -> None:
        """Note the batch, if the criterion needs data."""
        self._scorer.see(batch)

    def before_step(self, position: float) -> None:
        """Note that the optimizer is about to write into the weights.

        Raises:
            ValueError: Processes have to agree, and may end at different steps.
        """
        check_joining(self._parallel, (self.criteria, *self.rule.criteria))
        self._stepping = True

    def after_step(self, position: float) -> None:
        """Move the masks if the schedule or the rule asks for it at this position, and apply them."""
        self._record.note_trained()
        if self._pace.is_due(position) or self.rule.is_due(self._pace.moment(position)):
            with suppress(NotYetError):  # the next step is asked again
                self._follow(position)
        self._record.apply_()
        self._stepping = False

    def _follow(self, position: float) -> None:
        assert self._goal is not None
        share, moment = self._pace.at(position), self._pace.moment(position)
        pools = self._record.active
        counts = {p.name: p.count for p in pools}
        asked = (*self._goal.at(share).asked(counts), *counts, *counts.values())
        if pools and (asked != self._pace.asked or position >= 1 or self.rule.is_due(moment)):
            # A run that starts below what is pruned already waits until its schedule has passed it, or begins to fall.
            self._move(self._goal, share, pools, may_fall=share < self._pace.share or position >= 1, moment=moment)
        self._pace.asked, self._pace.share = asked, share
        if position >= 1:
            self._pace.finish()

    def on_fit_end(self, completed: bool) -> None:
        """End a run.

        If it was completed, the end of the schedule is reached exactly. If it failed in the middle of a step, the masks are
        applied. If it failed between two steps the weights are not touched: the user may have loaded others since.
        """
        if not self._stepping:
            fate = "sets them to zero" if completed else "leaves them so (sparsifier.apply_masks() sets them to zero)"
            warn_of_filled(self._record, f"at the end of the run, which {fate}")
        if is_joining(self._parallel) and not self._pace.finished:  # the weights are those of the process that came last
            self._record.take_zeros()
        if completed and not self._pace.finished:
            try:
                self._follow(1.0)
            except ValueError as error:
                warn(f"the run ended before its last step, at sparsity {self.sparsity:.4f} ({error})")
        warn_of_replaced(self._record)
        if completed or self._stepping:
            self._record.apply_()
        self._record.watch.let_go()
        self._record.look_on()
        if completed:
            self._warn_of_idleness()
        if completed:  # the state of an unfinished run may be saved after this, to go on from
            self._pace.finish()
            self._record.trained = set()
        self._stepping, self._parallel = False, None
        self._scorer.end()

    def _warn_of_idleness(self) -> None:
        """Warn of a run that had nothing to prune, and of a rule that brought nothing back."""
        if not self._record.active:
            warn(
                f"nothing was pruned in this run: every target was frozen ({self.targets[0].name}, ...); name them with "
                "targets= to prune them all the same"
            )
        elif not self._regrown and self.rule != nested and self.sparsity.overall > 0:
            warn(
                f"rule {self.rule!r} brought no pruned unit back in this run: was there a step at which it is due (every, "
                "until) while units were pruned, and what makes pruned units score higher than kept ones?"
            )

    def shortfall(self) -> str:
        """Return the sparsity reached of that asked for, if the schedule has not come to its end; empty if it has."""
        if self._goal is None or not self._record.pools:
            return ""
        counts = {p.name: p.count for p in self._record.active}
        end = self._goal.at(self._pace.at(1.0))
        if self._goal.at(self._pace.share).asked(counts) == end.asked(counts):
            return ""
        reached, asked = told_apart(self.sparsity.overall, end.total(counts) / max(1, sum(counts.values())))
        return f"sparsity {reached} of {asked}"

    def finalize(self) -> None:
        """End sparse training: the zeros stay in the weights, holds end, and copies of earlier weights are dropped."""
        self._end_holds()
        self._scorer.forget()

    def reset(self) -> None:
        """Forget the masks; the weights are unchanged."""
        self._record.keep, self._record.noted, self._pace.asked = {}, {}, ()
        self._record.watch.end()
        self._scorer.forget_looks()

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and all else that is needed to go on bit for bit, as copies by parameter name."""
        own = {"format": FORMAT, "regrown": self._regrown, "settings": self._in_words()}
        return {**own, **self._record.state_dict(), **self._scorer.state_dict(), **self._pace.state_dict()}

    def _in_words(self) -> dict[str, str]:
        goal = self._goal
        per_target = goal is not None and isinstance(goal.context, PerTarget)
        return settings_in_words(
            sparsity=goal and (goal.context if per_target else goal.sparsity),
            context=self.context,
            criteria=self.criteria,
            schedule=self.schedule,
            rule=self.rule,
            min_keep=self.min_keep,
            round_to=self.round_to,
            max_updates=self.max_updates,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; the weights and the caller's dict are unchanged. In a run, other arguments are warned of.

        Raises:
            ValueError: It is no sparsifier's state, or of another model or granularity; the message names the difference.
        """
        check_state(state)
        if self._record.watch.is_held:
            warn_of_settings("Sparsifier", state.get("settings", {}), self._in_words())
        self._record.load_state_dict(state)
        self._scorer.load_state_dict(state, self.targets)
        self._pace.load_state_dict(state)
        self._regrown = bool(state.get("regrown", True))  # states of earlier versions do not say
