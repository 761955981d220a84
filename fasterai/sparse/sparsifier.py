"""L3. The sparsifier: granularity x context x criteria x schedule, and the one keeper of the masks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import contexts, criteria as criterion_catalogue, granularities, schedules
from fasterai.core.checks import check_count, check_fraction, from_catalogue
from fasterai.core.contexts import NM, Context, PerTarget
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Block, Granularity
from fasterai.core.loop import Batch, Fit, Participant
from fasterai.core.masks import apply_masks_, like
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.core.selection import EvidenceScores, Scores, TensorScores, count_true
from fasterai.core.targets import LayerTypes, Selection, TargetsLike, find_targets, resolve, unwrap
from fasterai.core.types import Evidence, Limits, Target
from fasterai.sparse.dataflow import Flow, watch
from fasterai.sparse.evidence import GATHERERS, Source
from fasterai.sparse.partners import Partner, find_partners, kept_outputs, revive_, without_outputs
from fasterai.sparse.report import Reached, Row, SparsityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Hold", "Sparsifier"]

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
            target makes the output. Callbacks of fastai and Lightning have a batch for it.
        min_keep: Units that stay in each target, whatever is asked. At granularity `layer` whole targets go.
        round_to: Kept units of each target are rounded up to a multiple of it.
        max_updates: How often at most the masks move in one training. Up to so many steps they follow the schedule at every
            step; in a longer training they move when it has gone on by that share of the whole. The last move is exact.

    Raises:
        ValueError: An argument is out of range or unknown, no target is found, a target has not got such units, or a
            weight is parametrised.
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
        self.model = model
        self.granularity = _granularity(granularity)
        if isinstance(context, Mapping):
            if sparsity is not None:
                raise ValueError("sparsity must be given once, got a dict as context and a sparsity")
            sparsity, context = context, "local"
        self.context = _context(context, nm)
        self.criteria = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        self.schedule = as_schedule(from_catalogue("schedule", schedule, schedules))
        self.min_keep = check_count("min_keep", min_keep, 0)
        self.round_to = None if round_to is None else check_count("round_to", round_to)
        if self.round_to is not None and isinstance(self.context, NM):
            raise ValueError("round_to must be None for N:M, which fixes what each group keeps")
        self.max_updates = check_count("max_updates", max_updates)
        self._source = Source(data=data, loss=loss, inputs=_as_inputs(example_inputs))
        self._selection = find_targets(model, fits=self._misfit, coarse=self._is_coarse, targets=targets, layer_type=layer_type)
        self._flow: Flow | None = None
        self._partners: tuple[Partner, ...] = ()
        self._warned = False
        self._set_flow(None if self._source.inputs is None else watch(model, self._source.inputs))
        self._plan = None if sparsity is None else self._read_sparsity(sparsity)
        self._keep: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._asked: tuple[Any, ...] = ()
        self._tick = 0
        self._share = 0.0
        self._steps = 1
        self._holds: list[Any] = []
        #: How often the masks have moved so far.
        self.moves = 0
        self._initial = self._copy_weights("initial")
        self._previous = self._copy_weights("previous")

    # --- what it acts on -------------------------------------------------------------------------------------------

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self._selection.targets

    @property
    def _is_coarse(self) -> bool:
        return not (self.granularity.is_weight or isinstance(self.granularity, Block))

    def _misfit(self, target: Target) -> str | None:
        if not self.granularity.fits(target.layout):
            allowed = ", ".join(granularities.allowed(target.layout))
            repair = "; pass Keep('out') for the outputs of any layer" if repr(self.granularity) == "filter" else ""
            return f"granularity must be one of {allowed}, got {self.granularity!r}{repair}"
        return self.context.fits(self.granularity.unit_shape(target.layout), target.layout)

    def _set_flow(self, flow: Flow | None) -> None:
        self._flow = flow
        if flow is not None:
            self._selection = without_outputs(self._selection, self.granularity, flow)
        self._partners = find_partners(self.model, self._selection, self.granularity, flow)

    def _warn_without_flow(self) -> None:
        """Say once what cannot be known without example inputs."""
        if self._warned or self._flow is not None or not any(self.granularity.drops_outputs(t.layout) for t in self.targets):
            return
        self._warned = True
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        unnamed = [t.name for t in self.targets if t.name not in self._selection.named]
        if norms or len(unnamed) > 1:
            warnings.warn(
                f"without example_inputs it cannot be seen which target makes the model's output ({unnamed[-1] if unnamed else 'none'}"
                f" is pruned like the others) nor which batch norm reads which {self.granularity!r} (none is silenced): pass "
                "example_inputs=, or name the targets with targets=",
                stacklevel=4,
            )

    def _active(self, names: frozenset[str] | None = None) -> list[Target]:
        """The targets that train now or were named, or those of the given names."""
        if names is not None:
            return [t for t in self.targets if t.name in names]
        return [t for t in self.targets if t.parameter.requires_grad or t.name in self._selection.named]

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
        if not self._active():
            raise ValueError("targets must train, and all are frozen: name them with targets= to prune them all the same")
        self._warn_without_flow()
        self._forget_stale()
        self._move(plan, 1.0, self._active(), may_fall=True, round_to=round_to)
        self.apply_masks()

    def sparsify_layer(self, m: nn.Module, sparsity: float, round_to: int | None = None) -> None:
        """Prune the targets of one module now; the others stay as they are.

        Raises:
            ValueError: `m` holds no target, or the sparsity is out of range.
        """
        targets = [t for t in self.targets if any(t.module is inner for inner in m.modules())]
        if not targets:
            raise ValueError(
                f"m must hold a target, got {type(m).__name__}; the targets are {', '.join(t.name for t in self.targets)}"
            )
        share = check_fraction("sparsity", sparsity)
        self.context.check(share)
        self._warn_without_flow()
        self._forget_stale()
        self._move((self.context, share), 1.0, targets, may_fall=True, round_to=round_to)
        self.apply_masks()

    def apply_masks(self) -> None:
        """Set all masked weights to zero, and the biases and norms of silent outputs."""
        apply_masks_(self._pairs())

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for target in self.targets:
            keep = self._keep.get(target.name)
            if keep is not None:
                yield target.parameter.detach().view(target.layout.shape), self.granularity.expand(keep, target.layout)
        for partner, _, keep in self._partner_keeps(self._keep, self._keep):
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
        return PerTarget(resolve(readable, self.targets, "sparsity's keys")), 1.0

    def _move(
        self, plan: tuple[Context, float], share: float, targets: list[Target], may_fall: bool, round_to: int | None = None
    ) -> None:
        """Choose anew what is pruned; the masks and noted scales change together, or not at all."""
        context, sparsity = plan
        self.apply_masks()
        evidence = self._gather(targets)
        scores = [self._score(t, evidence[t.name]) for t in targets]
        whole = any(self.granularity.is_whole(t.layout) for t in targets)
        limits = Limits(
            min_keep=0 if whole else self.min_keep,
            may_fall=may_fall,
            round_to=self.round_to if round_to is None else check_count("round_to", round_to),
        )
        keeps = self._agree(context(scores, [t.layout for t in targets], sparsity * share, limits))
        # Units of single weights are held in the weight's memory format, so that both are read in the same order.
        chosen = {
            t.name: like(t.parameter, k) if k.shape == t.parameter.shape else k for t, k in zip(targets, keeps, strict=True)
        }
        after = {**self._keep, **chosen}
        scales = (item for item in self._partner_keeps(self._keep, after) if item[0].is_scale)
        revive_(scales, self._scales)
        self._keep = after
        self.moves += 1
        for t in targets if self._previous else ():
            self._previous[t.name].copy_(t.parameter.detach())

    def _score(self, target: Target, evidence: Evidence) -> Scores:
        keep = self._keep.get(target.name)
        weight = evidence.weight
        piecewise = self.granularity.is_weight and self.criteria.elementwise and self.criteria.normalizer is None
        if piecewise and weight.device.type == "cpu" and _contiguous(evidence):
            return EvidenceScores(target.name, evidence.map(lambda x: x.view(target.layout.shape)), self.criteria, keep)
        scores = self.granularity.reduce(self.criteria(evidence), target.layout, self.criteria.reducer)
        return TensorScores(target.name, self.criteria.normalize(scores), keep)

    def _gather(self, targets: list[Target]) -> dict[str, Evidence]:
        known: dict[str, Mapping[str, Tensor]] = {"initial": self._initial, "previous": self._previous}
        for need in self.criteria.needs - set(known):
            known[need] = GATHERERS[need](self.model, targets, self._source)
        return {
            t.name: Evidence(t.name, t.parameter.detach(), **{need: known[need][t.name] for need in self.criteria.needs})
            for t in targets
        }

    def _copy_weights(self, need: str) -> dict[str, Tensor]:
        return {t.name: t.parameter.detach().clone() for t in self.targets} if need in self.criteria.needs else {}

    def _agree(self, keeps: list[Tensor]) -> list[Tensor]:
        """The same masks on every rank of a DDP run: those of the first."""
        if isinstance(self.model, DistributedDataParallel):
            for keep in keeps:
                torch.distributed.broadcast(keep.view(torch.uint8), group_src=0, group=self.model.process_group)
        return keeps

    @torch.no_grad()
    def _forget_stale(self) -> None:
        """Drop masks that the weights no longer obey: others were loaded, or they trained without being held."""
        for target in self.targets:
            keep = self._keep.get(target.name)
            if keep is not None:
                view = target.parameter.detach().view(target.layout.shape)
                if bool((view.ne(0) & ~self.granularity.expand(keep, target.layout)).any()):
                    del self._keep[target.name]
                    self._asked = ()

    # --- pruning over a training: the participant -------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run: what is pruned already stays so until the schedule has passed it.

        Raises:
            ValueError: No sparsity was given, or the criterion's evidence will not be there.
        """
        if self._plan is None:
            raise ValueError("sparsity must be given to the Sparsifier to train with it")
        if self._flow is None and fit.batch is not None and any(self.granularity.drops_outputs(t.layout) for t in self.targets):
            self._watch_batch(fit.batch)
        self._source = Source(self._source.data, self._source.batch, self._source.loss or fit.loss, self._source.inputs)
        self._warn_without_flow()
        self._forget_stale()
        self._asked, self._tick, self._share, self._steps = (), 0, 0.0, fit.total_steps

    def _watch_batch(self, batch: Batch) -> None:
        try:
            flow = watch(self.model, batch.inputs)
        except ValueError as error:
            warnings.warn(f"the loop's batch does not show the data flow ({error}); pass example_inputs=", stacklevel=2)
            return
        plan = self._plan
        self._set_flow(flow)
        if plan is not None and isinstance(plan[0], PerTarget):
            self._plan = plan

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Note the batch if the criterion needs data; the loss is not changed."""
        if self._source.data is None and self.criteria.needs & (set(GATHERERS) - {"gradient"}):
            self._source = Source(None, batch, self._source.loss, self._source.inputs)
        return loss

    def after_step(self, position: float) -> None:
        """Move the masks if it is time to, and apply them."""
        if self._is_due(position):
            self._follow(position)
        self.apply_masks()

    def _is_due(self, position: float) -> bool:
        """Whether the masks may move: at every step of a run of up to `max_updates` steps; in a longer one where that share
        of the run has passed and the schedule has gone as far; always at the end."""
        tick = int(position * self.max_updates + 1e-9)
        passed, self._tick = tick > self._tick, max(tick, self._tick)
        if position >= 1 or not passed or self._steps <= self.max_updates:
            return position >= 1 or passed
        return abs(self._share_at(position) - self._share) >= 1 / self.max_updates

    def _share_at(self, position: float) -> float:
        return check_fraction("what the schedule returns", self.schedule(position))

    def _follow(self, position: float) -> None:
        assert self._plan is not None
        context, sparsity = self._plan
        share = self._share_at(position)
        targets = self._active()
        counts = {t.name: _product(self.granularity.unit_shape(t.layout)) for t in targets}
        asked = (*context.asked(counts, sparsity * share), *counts)
        if asked != self._asked and targets:
            # A run that starts below what is pruned already waits until its schedule has passed it, or begins to fall.
            self._move(self._plan, share, targets, may_fall=share < self._share or position >= 1)
        self._asked, self._share = asked, share

    def on_fit_end(self, completed: bool) -> None:
        """End a run: masks applied, and, if it was completed, the schedule's end reached exactly."""
        if completed and self._tick < self.max_updates:
            try:
                self._follow(1.0)
            except ValueError as error:
                warnings.warn(f"the run ended before its last step, at sparsity {self.sparsity:.4f} ({error})", stacklevel=2)
        self._tick = self.max_updates
        self._source = Source(self._source.data, None, self._source.loss, self._source.inputs)
        self.apply_masks()

    def hold(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Keep the masks in later training.

        Args:
            optimizer: A torch optimizer; after each of its steps the masks are applied.

        Returns:
            A handle whose `remove()` ends it; without an optimizer a participant for any loop's callback.
        """
        if optimizer is None:
            return Hold(self)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; in fastai and Lightning pass "
                "HoldCallback(sparsifier) as a callback"
            )
        handle = optimizer.register_step_post_hook(lambda *_: self.apply_masks())
        self._holds.append(handle)
        return handle

    def finalize(self) -> None:
        """Bake the masks in for good: zeros stay in the weights, holds end, copies of weights are let go."""
        self.apply_masks()
        for handle in self._holds:
            handle.remove()
        self._holds, self._initial, self._previous, self._scales = [], {}, {}, {}

    def reset(self) -> None:
        """Forget the masks; the weights stay as they are."""
        self._keep, self._scales, self._asked = {}, {}, ()

    # --- what was reached --------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Target name -> bool tensor of the parameter's shape, True = keep; all True where nothing was chosen yet."""
        result = {}
        for t in self.targets:
            keep = self._keep.get(t.name)
            if keep is None:
                result[t.name] = torch.ones_like(t.parameter, dtype=torch.bool)
            else:
                expanded = self.granularity.expand(keep, t.layout).expand(t.layout.shape)
                result[t.name] = expanded.reshape(t.parameter.shape).clone()
        return result

    @property
    def sparsity(self) -> Reached:
        """What the masks hold, per target and overall; counted from the masks."""
        rows = [self._count(t) for t in self.targets]
        units, pruned = sum(n for n, _ in rows), sum(p for _, p in rows)
        sizes = [t.parameter.numel() for t in self.targets]
        masked = sum(self._masked(t) for t in self.targets)
        per_target = {t.name: p / n if n else 0.0 for t, (n, p) in zip(self.targets, rows, strict=True)}
        return Reached(pruned / units if units else 0.0, masked / max(1, sum(sizes)), per_target)

    def _count(self, target: Target) -> tuple[int, int]:
        units = _product(self.granularity.unit_shape(target.layout))
        keep = self._keep.get(target.name)
        return units, 0 if keep is None else units - count_true(keep)

    def _masked(self, target: Target) -> int:
        keep = self._keep.get(target.name)
        if keep is None:
            return 0
        expanded = self.granularity.expand(keep, target.layout)
        return int((~expanded).sum()) * (target.parameter.numel() // max(1, expanded.numel()))

    def report(self) -> SparsityReport:
        """What was reached, target by target, and what was left out and why."""
        rows = []
        for t in self.targets:
            units, pruned = self._count(t)
            zeros = int((t.parameter.detach() == 0).sum())
            rows.append(Row(t.name, tuple(t.parameter.shape), units, pruned, t.parameter.numel(), zeros))
        frozen = {t.name: "frozen" for t in self.targets if t not in self._active()}
        parameters = list(unwrap(self.model).parameters())
        zeros = sum(int((p.detach() == 0).sum()) for p in parameters)
        total = sum(p.numel() for p in parameters)
        return SparsityReport(repr(self.granularity), tuple(rows), {**self._selection.left_out, **frozen}, total, zeros)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the sparsity of each target."""
        return self.report().plot(ax)

    def print_sparsity(self) -> None:
        """Print the report."""
        print(self.report())

    def save_model(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Save the weights, masked, as a plain state dict for `torch.load(path, weights_only=True)`."""
        self.apply_masks()
        torch.save(unwrap(model or self.model).state_dict(), path)

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks and what is needed to go on bit for bit: copies, by parameter name."""
        return {
            "format": FORMAT,
            "granularity": repr(self.granularity),
            "shapes": {t.name: list(t.parameter.shape) for t in self.targets},
            "keep": _cloned(self._keep),
            "scales": _cloned(self._scales),
            "initial": _cloned(self._initial),
            "previous": _cloned(self._previous),
            "asked": list(self._asked),
            "tick": self._tick,
            "share": self._share,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; the weights are not touched, and the caller's dict is not changed.

        Raises:
            ValueError: It is no sparsifier's state, or of another model or granularity; what differs is named.
        """
        _check_state(state, self)
        devices = {t.name: t.parameter.device for t in self.targets}
        self._keep = {n: k.to(devices[n], copy=True) for n, k in state["keep"].items()}
        self._initial = {n: w.to(devices[n], copy=True) for n, w in state["initial"].items()}
        self._previous = {n: w.to(devices[n], copy=True) for n, w in state["previous"].items()}
        scales = {p.name: p.parameter.device for p in self._partners}
        self._scales = {n: s.to(scales.get(n, s.device), copy=True) for n, s in state["scales"].items()}
        self._asked, self._tick, self._share = tuple(state["asked"]), state["tick"], state["share"]


class Hold(Participant):
    """A participant that keeps a sparsifier's masks and does nothing else."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier

    def after_step(self, position: float) -> None:
        """Apply the masks."""
        self.sparsifier.apply_masks()

    def on_fit_end(self, completed: bool) -> None:
        """Apply the masks once more, in case a step was interrupted."""
        self.sparsifier.apply_masks()


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


def _contiguous(evidence: Evidence) -> bool:
    tensors = [x for x in vars(evidence).values() if isinstance(x, Tensor)]
    return all(x.is_contiguous() and x.shape == evidence.weight.shape for x in tensors)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check_state(state: Mapping[str, Any], sparsifier: Sparsifier) -> None:
    own = {"format", "granularity", "shapes", "keep", "scales", "initial", "previous", "asked", "tick", "share"}
    if not isinstance(state, Mapping) or not own <= set(state):
        missing = sorted(own - set(state)) if isinstance(state, Mapping) else sorted(own)
        raise ValueError(f"state must be what Sparsifier.state_dict() returned, got one without {', '.join(missing)}")
    if state["granularity"] != repr(sparsifier.granularity):
        raise ValueError(f"state must be of granularity {sparsifier.granularity!r}, got {state['granularity']!r}")
    shapes = {t.name: list(t.parameter.shape) for t in sparsifier.targets}
    differences = [f"{n} is missing" for n in shapes if n not in state["shapes"]]
    differences += [f"{n} is not a target here" for n in state["shapes"] if n not in shapes]
    differences += [
        f"{n} is {tuple(state['shapes'][n])}, here {tuple(shape)}"
        for n, shape in shapes.items()
        if n in state["shapes"] and list(state["shapes"][n]) != shape
    ]
    if differences:
        raise ValueError(f"state must be of the same model and targets, got one where {'; '.join(differences[:5])}")
