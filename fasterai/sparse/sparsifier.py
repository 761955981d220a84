"""The sparsifier: granularity x context x criteria x schedule, and the one record of the masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import contexts, granularities, schedules
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_count, check_fraction, from_catalogue, warn
from fasterai.core.contexts import NM, Context, PerTarget
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Block, Coupled, Granularity
from fasterai.core.loop import Batch, Fit, Participant
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.core.selection import count_true
from fasterai.core.types import Limits, Target
from fasterai.graph.channels import channel_graph
from fasterai.model.cuts import follow, note_optimizer
from fasterai.model.inputs import arguments, batch_inputs
from fasterai.model.names import unwrap
from fasterai.model.norms import watch
from fasterai.model.sharded import check_unflattened
from fasterai.model.targets import LayerTypes, TargetsLike, find_targets
from fasterai.sparse.hold import Hold
from fasterai.sparse.pace import Pace
from fasterai.sparse.ranks import agree, find_parallel
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.report import Reached, SparsityReport
from fasterai.units.channels import warn_of_rounding
from fasterai.units.evidence import NotYetError, Source
from fasterai.units.pool import Pool, by_pool
from fasterai.units.scoring import Scorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sparsifier"]

FORMAT = 1
Sparsity = float | Mapping[str, float]


class Sparsifier(Participant):
    """Makes the weights of a model sparse, at once or over a training, and keeps them so.

    Nothing is added to the model: no buffer, no hook, no renamed parameter. All state is here and in `state_dict()`.

    Args:
        model: The model, wrapped by DDP or compiled or not; changed only where masks are multiplied into weights.
        granularity: Which weights share one decision: a granularity or its name.
        context: Which units compete: a context, its name, or a dict of target names or globs to sparsities.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        sparsity: The share of units to prune by the end of a training, in [0, 1], or a dict of names or globs to shares
            (context `local`; targets that it does not name stay dense).
        schedule: How much of it is pruned at which position of the training.
        nm: Prune two of every four neighbouring inputs; short for context `two_four`.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        targets: Names of parameters, modules or containers, globs, or a predicate (name, parameter); instead of the default.
        data: Batches `(x, y)` for criteria that need data; a callback has the batch at hand for it.
        loss: The loss function for criteria that need gradients of `data`.
        example_inputs: A tensor or tuple that the model runs on: shows which batch norm reads which filter, and which
            target makes the output; for granularity `coupled`, which channels go together. Callbacks of fastai and Lightning
            have a batch for it.
        min_keep: Units that stay in each target, whatever is asked. At granularity `layer` whole targets go.
        round_to: Kept units of each target are rounded up to a multiple of it. Coupled channels are by default rounded up to
            8, in groups of at least 32; pass 1 for exact counts.
        max_updates: How often at most the masks move in one training. Up to so many steps they follow the schedule at every
            step; in a longer training they move when it has gone on by that share of the whole. The last move is exact.

    Raises:
        ValueError: An argument is out of range or unknown, no target is found, a target has not got such units, or a
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
        max_updates: int = 1000,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r} ({type(model).__name__})")
        if isinstance(data, tuple | Tensor):
            raise TypeError(f"data must be a list or loader of batches, got a {type(data).__name__}; pass data=[(x, y)]")
        if isinstance(loss, type):
            raise TypeError(f"loss must be a function (output, target), got the class {loss.__name__}; pass {loss.__name__}()")
        self.granularity = _granularity(granularity)
        if isinstance(context, Mapping):
            if sparsity is not None:
                raise ValueError("sparsity must be given once, got a dict as context and a sparsity")
            sparsity, context = context, "local"
        self.context = _context(context, nm)
        self.criteria = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        self.min_keep = check_count("min_keep", min_keep, 0)
        self.round_to = None if round_to is None else check_count("round_to", round_to)
        if self.round_to is not None and isinstance(self.context, NM):
            raise ValueError("round_to must be None for N:M, which fixes what each group keeps")
        self._pace = Pace(as_schedule(from_catalogue("schedule", schedule, schedules)), check_count("max_updates", max_updates))
        coarse = not (self.granularity.is_weight or isinstance(self.granularity, Block | Coupled))
        check_unflattened(model)
        selection = find_targets(model, fits=self._misfit, coarse=coarse, targets=targets, layer_type=layer_type)
        self._record = MaskRecord(model, self.granularity, selection)
        self._record.check_plain()
        source = Source(data=data, loss=loss, inputs=_as_inputs(example_inputs))
        if source.inputs is not None and isinstance(self.granularity, Coupled):
            self._record.couple(channel_graph(model, source.inputs))
        self._sparsity = sparsity
        self._plan = None if sparsity is None else self._read_sparsity(sparsity)
        if self._plan is not None and isinstance(self._plan[0], PerTarget):
            self._record.name(self._plan[0].sparsities)
        if source.inputs is not None and not isinstance(self.granularity, Coupled):
            self._record.see(watch(model, source.inputs))
        self._scorer = Scorer(self.criteria, self.granularity, source, self.targets)
        follow(model, self._scorer)
        self._warned = False
        self._stepping = False
        self._parallel: DistributedDataParallel | None = None  # of the run under way
        self._holds: list[Any] = []

    # --- what it acts on -------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model, wrapped or not."""
        return self._record.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._record.model = model

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self._record.targets

    @property
    def schedule(self) -> Schedule:
        """How much of the sparsity is pruned at which position of a training."""
        return self._pace.schedule

    @property
    def max_updates(self) -> int:
        """How often at most the masks move in one training."""
        return self._pace.max_updates

    @property
    def moves(self) -> int:
        """How often the masks have moved so far."""
        return self._record.moves

    def _misfit(self, target: Target) -> str | None:
        if not self.granularity.fits(target.layout):
            allowed = ", ".join(granularities.allowed(target.layout))
            repair = "; pass Keep('out') for the outputs of any layer" if repr(self.granularity) == "filter" else ""
            return f"granularity must be one of {allowed}, got {self.granularity!r}{repair}"
        return self.context.fits(self.granularity.unit_shape(target.layout), target.layout)

    @property
    def _drops_outputs(self) -> bool:
        return any(self.granularity.drops_outputs(t.layout) for t in self.targets)

    def _check_coupled(self) -> None:
        if isinstance(self.granularity, Coupled) and not self._record.is_seen:
            raise ValueError(
                "example_inputs must be given for granularity 'coupled', got None: the channels are found by following them "
                "through the model; a callback of fastai or Lightning has a batch for it"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows its own model."""
        self.__dict__.update({"_parallel": None, **state})  # pickles of earlier versions have none
        follow(self.model, self._scorer)

    def _warn_without_flow(self) -> None:
        """Say once what cannot be known without example inputs."""
        if self._warned or self._record.is_seen or not self._drops_outputs:
            return
        self._warned = True
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        unnamed = [t.name for t in self.targets if t.name not in self._record.selection.named]
        if norms or len(unnamed) > 1:
            last = f"{unnamed[-1]} is pruned like the others" if unnamed else "all were named"
            warn(
                f"without example_inputs it cannot be seen which target makes the model's output ({last}), nor which norm "
                f"reads which {self.granularity!r} (none is silenced): pass example_inputs=, or name the targets with targets=",
            )

    # --- pruning at once --------------------------------------------------------------------------------------------

    def sparsify_model(self, sparsity: Sparsity | None = None, round_to: int | None = None) -> None:
        """Prune now, to exactly the sparsity asked for; a lower one than before lets units return (as zeros).

        Args:
            sparsity: A share in [0, 1], or a dict of target names or globs to shares; the constructor's if left out.
            round_to: Kept units of each target are rounded up to a multiple of it; the constructor's if left out.

        Raises:
            ValueError: The sparsity is out of range or names no target, a weight is NaN or infinite, every target is
                frozen, or the criterion's evidence is not there. Nothing is changed then.
        """
        plan = self._plan if sparsity is None else self._read_sparsity(sparsity)
        if plan is None:
            raise ValueError("sparsity must be given, here or to the Sparsifier")
        self._record.check_plain()
        self._check_coupled()
        if not self._record.active:
            raise ValueError("targets must train, and all are frozen: name them with targets= to prune them all the same")
        self._warn_without_flow()
        self._forget_stale()
        self._move(plan, 1.0, self._record.active, may_fall=True, round_to=round_to)
        self.apply_masks()

    def sparsify_layer(self, m: nn.Module, sparsity: float, round_to: int | None = None) -> None:
        """Prune the targets of one module now; the others stay as they are.

        Raises:
            ValueError: `m` holds no target, or the sparsity is out of range.
        """
        if not isinstance(m, nn.Module):
            raise TypeError(f"m must be a module of the model, got {m!r}; for names pass sparsify_model a dict")
        self._record.check_plain()
        self._check_coupled()
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
        self._move((self.context, share), 1.0, pools, may_fall=True, round_to=round_to)
        self.apply_masks()

    def apply_masks(self) -> None:
        """Set all masked weights to zero, and the biases and norms of silent outputs."""
        self._record.apply_()

    # --- the choice --------------------------------------------------------------------------------------------------

    def _read_sparsity(self, sparsity: Sparsity) -> tuple[Context, float]:
        """The context and the sparsity that it gets, checked."""
        if not isinstance(sparsity, Mapping):
            share = check_fraction("sparsity", sparsity)
            self.context.check(share)
            return self.context, share
        if self.context != contexts.local:
            raise ValueError(f"sparsity must be one number for context {self.context!r}, got a dict; pass context='local'")
        names = {id(m): n for n, m in unwrap(self.model).named_modules()}
        readable = {}
        for key, value in sparsity.items():
            if isinstance(key, nn.Module) and id(key) in names:
                key = names[id(key)]
            elif not isinstance(key, str):
                raise TypeError(f"sparsity's keys must be names or modules of the model, got {key!r} ({type(key).__name__})")
            readable[key] = check_fraction(f"sparsity of {key!r}", value)
        return PerTarget(by_pool(self._record.pools, readable, self.targets, "sparsity's keys")), 1.0

    def _move(
        self, plan: tuple[Context, float], share: float, pools: list[Pool], may_fall: bool, round_to: int | None = None
    ) -> None:
        """Choose anew what is pruned; the masks and what is noted with them change together, or not at all."""
        context, sparsity = plan
        if may_fall or context.looks_at_pruned or self._scorer.looks_at_pruned:
            self.apply_masks()  # the optimizer has moved pruned weights, too
        round_to = self.round_to if round_to is None else check_count("round_to", round_to)
        steps = {p.name: p.step(round_to) for p in pools}
        limits = Limits(
            min_keep=0 if any(p.is_whole for p in pools) else self.min_keep,
            may_fall=may_fall,
            round_to=steps if max(steps.values()) > 1 else None,
            make_up=round_to is None,
        )

        def choose() -> list[Tensor]:
            scores = self._scorer(self.model, pools, self._record.keep)
            return context(scores, [p.layout for p in pools], sparsity * share, limits)

        keeps = agree(choose, pools, self._parallel or find_parallel(self.model), self.criteria)
        if self._record.replace({p.name: k for p, k in zip(pools, keeps, strict=True)}):
            self._scorer.note_move(pools)
        if limits.round_to and share == 1 and isinstance(self.granularity, Coupled):
            counts = {p.name: p.count for p in pools}
            gone = sum(k.numel() - count_true(k) for k in keeps)
            warn_of_rounding(context.total(counts, sparsity), gone, sum(counts.values()), round_to)

    def _forget_stale(self) -> None:
        if self._record.forget_stale():
            self._pace.asked = ()

    # --- pruning over a training: the participant -------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run: what is pruned already stays so until the schedule has passed it.

        Raises:
            ValueError: No sparsity was given, or the criterion's evidence will not be there.
        """
        if self._plan is None:
            raise ValueError("sparsity must be given to the Sparsifier to train with it")
        self._record.check_trained(fit)
        note_optimizer(self.model, fit.optimizer)
        if not self._record.is_seen and fit.batch is not None and self._drops_outputs:
            self._watch_batch(fit)
        self._check_coupled()
        self._scorer.begin(fit.loss)
        self._warn_without_flow()
        self._forget_stale()
        self._pace.start(fit.total_steps, self._highest_sparsity())
        self._record.trained = set()
        self._record.note_trained()
        self._parallel = find_parallel(fit.model)

    def _watch_batch(self, fit: Fit) -> None:
        if isinstance(self.granularity, Coupled):
            self._record.couple(channel_graph(self.model, batch_inputs(self.model, fit)))
            self._scorer.retarget(self.targets)
            self._plan = self._read_sparsity(self._sparsity or 0.0)
            return
        try:
            assert fit.batch is not None
            whole = fit.model or self.model
            self._record.see(watch(whole, arguments(whole, fit.batch), part=self.model))
        except ValueError as error:
            warn(f"the loop's batch does not show the data flow ({error}); pass example_inputs=")

    def _highest_sparsity(self) -> float:
        """Return the highest sparsity that any pool is asked for; half a unit at least is left."""
        assert self._plan is not None
        context, sparsity = self._plan
        highest = max(context.sparsities.values(), default=0.0) if isinstance(context, PerTarget) else 1.0
        return min(sparsity * highest, 1 - 0.5 / max(1, sum(p.count for p in self._record.pools)))

    def hears(self, event: str) -> bool:
        """Tell if it has an answer to an event; to batches only if its criterion reads them."""
        return super().hears(event) and (event != "after_forward" or self._scorer.reads_batches)

    def after_forward(self, batch: Batch) -> None:
        """Note the batch, if the criterion needs data."""
        self._scorer.see(batch)

    def before_step(self, position: float) -> None:
        """Note that the optimizer is about to write into the weights."""
        self._stepping = True

    def after_step(self, position: float) -> None:
        """Move the masks if it is time to, and apply them."""
        self._record.note_trained()
        if self._pace.is_due(position):
            with suppress(NotYetError):  # the next step is asked again
                self._follow(position)
        self.apply_masks()
        self._stepping = False

    def _follow(self, position: float) -> None:
        assert self._plan is not None
        context, sparsity = self._plan
        share = self._pace.at(position)
        pools = self._record.active
        counts = {p.name: p.count for p in pools}
        asked = (*context.asked(counts, sparsity * share), *counts, *counts.values())
        if pools and (asked != self._pace.asked or position >= 1):
            # A run that starts below what is pruned already waits until its schedule has passed it, or begins to fall.
            self._move(self._plan, share, pools, may_fall=share < self._pace.share or position >= 1)
        self._pace.asked, self._pace.share = asked, share
        if position >= 1:
            self._pace.finish()

    def on_fit_end(self, completed: bool) -> None:
        """End a run: if it was completed, the schedule's end is reached exactly; if it failed in a step, the masks are applied.

        Other weights than those of the last step are the user's, who has loaded them since: they stay.
        """
        if completed and not self._pace.finished:
            try:
                self._follow(1.0)
            except ValueError as error:
                warn(f"the run ended before its last step, at sparsity {self.sparsity:.4f} ({error})")
        if completed or self._stepping:
            self.apply_masks()
        if completed:  # the state of an unfinished run may be saved after this, to go on from
            self._pace.finish()
            self._record.trained = set()
        self._stepping, self._parallel = False, None
        self._scorer.end()

    def hold(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Keep the masks in later training.

        Args:
            optimizer: A torch optimizer; after each of its steps the masks are applied.

        Returns:
            A handle whose `remove()` ends it; without an optimizer a participant for any loop's callback.

        Raises:
            TypeError: `optimizer` is none of torch's.
            ValueError: A weight has been sharded, or is no plain tensor.
        """
        self._record.check_plain()
        if optimizer is None:
            return Hold(self._record)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; in fastai and Lightning pass "
                "HoldCallback(sparsifier) as a callback"
            )
        note_optimizer(self.model, optimizer)
        handle = optimizer.register_step_post_hook(torch.compiler.disable(self._hold_after_step))  # type: ignore[no-untyped-call]
        self._holds.append(handle)
        return handle

    def _hold_after_step(self, *_: Any) -> None:
        self.apply_masks()

    def finalize(self) -> None:
        """Bake the masks in for good: zeros stay in the weights, holds end, copies of weights are let go."""
        self.apply_masks()
        for handle in self._holds:
            handle.remove()
        self._holds, self._record.noted = [], {}
        self._scorer.forget()

    def reset(self) -> None:
        """Forget the masks; the weights stay as they are."""
        self._record.keep, self._record.noted, self._pace.asked = {}, {}, ()

    # --- what was reached --------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Target name -> bool tensor of the parameter's shape, True = keep; all True where nothing was chosen yet."""
        return self._record.masks()

    @property
    def sparsity(self) -> Reached:
        """What the masks hold, per target and overall; counted from the masks."""
        return self._record.reached()

    def report(self) -> SparsityReport:
        """What was reached, target by target, and what was left out and why."""
        return self._record.report()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the sparsity of each target."""
        return self.report().plot(ax)

    def print_sparsity(self) -> None:
        """Print the report."""
        print(self.report())  # noqa: T201 - what it is for

    def save_model(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Save the weights, masked, as a plain state dict for `torch.load(path, weights_only=True)`."""
        self.apply_masks()
        torch.save(unwrap(model or self.model).state_dict(), path)

    def metrics(self) -> dict[str, float]:
        """Return the share of units that the masks prune now, in [0, 1]."""
        return {"sparsity": self.sparsity.overall}

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks and what is needed to go on bit for bit: copies, by parameter name."""
        return {"format": FORMAT, **self._record.state_dict(), **self._scorer.state_dict(), **self._pace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; the weights are not touched, and the caller's dict is not changed.

        Raises:
            ValueError: It is no sparsifier's state, or of another model or granularity; what differs is named.
        """
        _check_state(state)
        self._record.load_state_dict(state)
        self._scorer.load_state_dict(state, self.targets)
        self._pace.load_state_dict(state)


def _granularity(granularity: Granularity | str) -> Granularity:
    found = from_catalogue("granularity", granularity, granularities)
    if not isinstance(found, Granularity):
        raise TypeError(f"granularity must be a granularity or its name, got {granularity!r} ({type(granularity).__name__})")
    return found


def _context(context: Context | str, nm: bool) -> Context:
    found = contexts.two_four if nm else from_catalogue("context", context, contexts)
    if not isinstance(found, Context):
        raise TypeError(f"context must be a context, its name or a dict, got {context!r} ({type(context).__name__})")
    return found


def _as_inputs(inputs: Any) -> tuple[Any, ...] | None:
    if inputs is None:
        return None
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _check_state(state: Mapping[str, Any]) -> None:
    own = ("format", "granularity", "shapes", "keep", "noted", "initial", "previous", "asked", "share")
    missing = [key for key in own if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"state must be what Sparsifier.state_dict() returned, got one without {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise ValueError(f"state's format must be {FORMAT}, got {state['format']!r}")
    for part in ("initial", "previous"):
        for name, weight in state[part].items():
            if list(weight.shape) != state["shapes"].get(name):
                raise ValueError(f"state's {part} weights must be of its targets' shapes, got {tuple(weight.shape)} for {name}")
