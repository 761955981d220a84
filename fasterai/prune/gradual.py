"""Removal of channels during a training, in a few steps that follow a schedule; the optimizer goes on with the rest.

Over 300 lines, since one class answers to every event of a run, and keeps what it takes to undo and to resume.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import from_catalogue, warn
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.loop import Batch, Fit, Participant
from fasterai.core.saved import warn_of_settings
from fasterai.core.schedules import Schedule, lin
from fasterai.core.updates import Updates, plan_updates
from fasterai.model.cuts import note_optimizer
from fasterai.model.inputs import batch_inputs
from fasterai.model.names import unwrap
from fasterai.model.optimizers import check_optimizer, check_trained
from fasterai.prune.choice.budget import Budget
from fasterai.prune.gradual_settings import check_bare, check_settings, read_settings
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal
from fasterai.prune.shown_channels import ShownChannels
from fasterai.prune.surgery.model_copies import Copies, matching_copies
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan
from fasterai.prune.surgery.replay import GRADUAL_FORMAT, Shapes, read_state, replay, shapes_of
from fasterai.units.evidence import GATHERERS, NotYetError

__all__ = ["GradualPruner"]


class GradualPruner(ShownChannels, Participant):
    """Removal of channels from a model while it trains.

    The schedule is followed at `max_updates` steps of a run at most, the last of which reaches its end exactly. At each of them
    the channels that matter least are masked and removed, the removal is checked, and the optimizer's state is cut alike. The
    ratio counts from the model before the first run. Layers whose weights are frozen are left alone until they train.

    Args:
        model: The model, or a part of the one that is trained; changed in place.
        pruning_ratio: The share of the channels to remove, in [0, 1), or a dict of names of layers to shares (context `local`).
        context: `local` ranks inside each group of coupled channels, `global` all together; or its name.
        criteria: The criterion that says how much a weight matters, its name, or a function of the weight.
        schedule: A map from the position of the training to the share of the ratio that is removed by then; it must not fall.
        ignored_layers: Modules, or their names, whose outputs are kept, besides all that have to be kept anyway.
        example_inputs: A tensor or tuple that the model runs on; a few samples of the loop's batch if left out.
        max_updates: The most removals in a run; each costs some forward passes.
        copies: Modules of the same structure, such as moving averages of the weights, or a function that gives them, asked
            at each removal; they are cut alike.
        **options: Of the `Pruner`: `round_to`, `over_places` and others.

    Attributes:
        removal: The result of the last removal; None before the first.
        plans: The channels removed since the first run, one plan for each removal, in order.
        channels: Group's name -> (channels at first, channels now).

    Raises:
        TypeError: An argument is of the wrong type, or there is no such option.
        ValueError: An argument is out of range or unknown, or the schedule falls.
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_ratio: Any,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str = lin,
        ignored_layers: Iterable[nn.Module | str] | None = None,
        example_inputs: Any = None,
        *,
        max_updates: int = 10,
        copies: Copies = None,
        **options: Any,
    ) -> None:
        settings = (pruning_ratio, context, criteria, schedule, ignored_layers, max_updates, copies, options)
        self.schedule = check_settings(*settings)
        self.model = model
        self.max_updates = max_updates
        self.copies = copies
        self.removal: Removal | None = None
        self.plans: list[Plan] = []
        self.channels: dict[str, tuple[int, int]] = {}
        self._ratio, self._axes, self._options = pruning_ratio, (context, criteria), options
        self._ignored = list(ignored_layers or ())
        self._inputs = example_inputs
        self._pruner: Pruner | None = None
        self._key: tuple[Any, ...] = ()
        self._frozen: list[str] = []
        self._examples: Any = None  # the inputs that the model was last looked at with
        self._updates = Updates()
        self._done = 0.0  # the share of the ratio that is reached
        self._dense: nn.Module | None = None
        self._optimizer: Any = None
        self._loss: Callable[..., Tensor] | None = None
        self._path = ""
        self._replayed: list[list[Surgery]] = []

    def _settings(self) -> tuple[Any, ...]:
        return (self._ratio, *self._axes, self.schedule)

    @property
    def sparsity(self) -> float:
        """The share of the removable channels that are removed so far, in [0, 1]."""
        return sum(a - b for a, b in self.channels.values()) / max(1, sum(a for a, _ in self.channels.values()))

    # --- a run -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run: look at the model before anything is changed.

        Raises:
            TypeError: The optimizer keeps no state by parameter.
            ValueError: The model is wrapped, cannot be followed, or is not what the optimizer trains, a copy is of another
                structure, or there are no example inputs.
        """
        check_bare(self.model if fit.model is None else fit.model)
        check_optimizer(fit.optimizer)
        check_trained(self.model, fit.optimizer)
        self._path = _path(self.model, fit.model)
        self._matching()
        self._look(fit)
        note_optimizer(self.model, fit.optimizer)  # it may go on after this run, and after a removal outside of it
        self._optimizer, self._loss = fit.optimizer, fit.loss
        self._updates = plan_updates(self.schedule, self._highest_ratio(), fit.total_steps, self.max_updates)

    def _highest_ratio(self) -> float:
        """Return the highest share of channels, or of the cost that a `Budget` counts, that is to be removed."""
        if isinstance(self._ratio, Budget):
            return 1 - self._ratio.share
        return max(self._ratio.values(), default=0.0) if isinstance(self._ratio, Mapping) else float(self._ratio)

    def hears(self, event: str) -> bool:
        """Tell if it takes part in an event; in batches only if its criterion reads them."""
        return super().hears(event) and (event != "after_forward" or self._reads_batches)

    @property
    def _reads_batches(self) -> bool:
        needs = as_criterion(from_catalogue("criteria", self._axes[1], criterion_catalogue)).needs
        return self._options.get("data") is None and bool(needs & (set(GATHERERS) - {"gradient", "synaptic_flow"}))

    def after_forward(self, batch: Batch) -> None:
        """Note the batch, for criteria that need data."""
        if self._pruner is not None:
            self._pruner.see(batch, self._loss)

    def metrics(self) -> dict[str, float]:
        """Return the share of the removable channels that are removed so far, in [0, 1]."""
        return {"removed": self.sparsity}

    def after_step(self, position: float) -> None:
        """Remove the channels that the schedule asks for, if it asks for more than are removed already."""
        self._replayed = []
        share = self.schedule(1.0) if position >= 1 else self._updates.share(position)
        if share > self._done:
            with suppress(NotYetError):  # the next step is asked again
                self._remove(share)
        if self._frozen:
            self._look_for_thawed()

    def on_fit_end(self, completed: bool) -> None:
        """End a run; if it was completed before its last step, the schedule's end is reached now."""
        try:
            if completed and self.schedule(1.0) > self._done:
                self._remove(self.schedule(1.0))
            if completed:
                self._warn_of_refusals()
        except ValueError as error:
            warn(f"the run ended before its last step, with {self.sparsity:.4f} of the channels removed ({error})")
        finally:
            self._optimizer, self._loss, self._replayed = None, None, []
            if self._pruner is not None:
                self._pruner.end()

    def shortfall(self) -> str:
        """Return the share of the channels removed, if the schedule has not come to its end; empty if it has."""
        is_short = self._pruner is not None and self._done + 1e-9 < self.schedule(1.0)
        return f"{self.sparsity:.4f} of the channels removed, of {self._ratio!r}" if is_short else ""

    def _look(self, fit: Fit) -> None:
        """Count the removable channels, if something has changed since the last run."""
        frozen = _frozen_layers(self.model)
        if self._key_with(frozen) != self._key:
            self._examples = self._inputs if self._inputs is not None else batch_inputs(self.model, fit)
            self._count(frozen)

    def _look_for_thawed(self) -> None:
        """Count again if layers have begun to train.

        Layers that stop are no reason to: those that train in turns do so at each step.
        """
        frozen = set(_frozen_layers(self.model))
        if not frozen.issuperset(self._frozen):
            self._count([name for name in self._frozen if name in frozen])

    def _key_with(self, frozen: list[str]) -> tuple[Any, ...]:
        return (frozen, *next(((p.device, p.dtype) for p in self.model.parameters()), ()))

    def _count(self, frozen: list[str]) -> None:
        """Count the removable channels; those of frozen layers are counted later, when they train."""
        pruner: Pruner | None = self._pruner_without(())
        if frozen:
            try:
                pruner = self._pruner_without(frozen)
            except ValueError:  # the frozen layers make all removable channels
                pruner = None
        if frozen and pruner is not None and not pruner.is_within_reach():
            asked = f"{self._ratio.kind}={self._ratio.share:g}"
            layers = ", ".join(frozen[:5])
            warn(f"{asked} is out of reach while layers are frozen ({layers}): no channels are removed until they train")
            pruner = None
        if pruner is not None and self._pruner is not None:
            pruner.look_as(self._pruner)
        self._pruner, self._key, self._frozen, self._done = pruner, self._key_with(frozen), frozen, 0.0

    def _pruner_without(self, frozen: Iterable[str]) -> Pruner:
        """Make a pruner that leaves some layers alone, and whose ratio counts from the channels of the first model."""
        ignored = [*self._ignored, *frozen]
        first = {name: count for name, (count, _) in self.channels.items()}
        axes = (self._ratio, *self._axes, self.schedule, ignored, self._examples)
        pruner = Pruner(self.model, *axes, original=first, **self._options)
        if pruner.dense is not None:
            pruner.dense = self._dense = self._dense or pruner.dense
        self.channels |= pruner.channels
        return pruner

    def _remove(self, share: float) -> None:
        if self._pruner is None:
            return
        removal = self._pruner.prune_to(share, self._optimizer, copies=self._matching(), measure=False)
        self._done, self.removal = share, removal
        self.channels |= self._pruner.channels  # others may have taken some out as well
        if removal.plan:
            self.plans.append(removal.plan)

    def _warn_of_refusals(self) -> None:
        refused = {} if self.removal is None else self.removal.refused
        if refused:
            name, why = next(iter(refused.items()))
            groups = f"{len(refused)} of {len(self.channels)} groups"
            warn(f"pruning_ratio was not reached: {groups} keep more channels than asked for; {name}: {why}")

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the removals so far, the share that the schedule has reached, and the weights that the criterion remembers."""
        return {
            "format": GRADUAL_FORMAT,
            "plans": [plan.to_dict() for plan in self.plans],
            "shapes": {name: list(shape) for name, shape in shapes_of(self.model).items()},
            "channels": {name: list(counts) for name, counts in self.channels.items()},
            "done": self._done,
            "pruner": {} if self._pruner is None else self._pruner.state_dict(),
            "settings": read_settings(self._ratio, *self._axes, self.schedule, self.max_updates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: channels that were removed then are removed from a model that still has them.

        Call it before the small weights and the optimizer's state are loaded. The caller's dict is not changed.

        Raises:
            ValueError: It is no state of a `GradualPruner`, or of another model. Nothing is changed then.
        """
        plans, shapes = read_state(state)
        if self._pruner is not None and state["pruner"]:
            self._pruner.check_state(state["pruner"])
        if self._optimizer is not None:  # in a run, which goes on with what it has
            warn_of_settings(
                "GradualPruner",
                state.get("settings", {}),
                read_settings(self._ratio, *self._axes, self.schedule, self.max_updates),
            )
        self._take_back(shapes)
        if isinstance(self._ratio, Budget) and self._dense is None:
            self._dense = copy.deepcopy(self.model)
        done = replay(self.model, plans, shapes, self._optimizer, self._matching)
        # In a run another participant may refuse its own state.
        self._replayed += done if self._optimizer is not None else []
        self.plans, self._done = plans, float(state["done"])
        self.channels |= {name: (first, now) for name, (first, now) in state["channels"].items()}
        if self._pruner is not None and state["pruner"]:
            self._pruner.load_state_dict(state["pruner"])

    def _take_back(self, shapes: Shapes) -> None:
        """Undo removals of an earlier load, the last first, until the shapes are those that are wanted."""
        if not self._replayed or shapes_of(self.model) == shapes:
            return
        while self._replayed and shapes_of(self.model) != shapes:
            for surgery in reversed(self._replayed.pop()):
                surgery.undo()
        if self._pruner is not None:  # it has followed the cuts, and knows no way back
            self._pruner = self._pruner_without(self._frozen)

    def _matching(self) -> list[nn.Module]:
        return matching_copies(self.copies, self.model, self._path)


def _path(part: nn.Module, whole: nn.Module | None) -> str:
    """Find the name of a part in the whole model; empty if it is the whole, or there is none."""
    return next((name for name, module in whole.named_modules() if module is part), "") if whole is not None else ""


def _frozen_layers(model: nn.Module) -> list[str]:
    """List the names of modules with a weight of their own that does not train."""
    return [
        name
        for name, module in unwrap(model).named_modules()
        if name and any(p.dim() > 1 and not p.requires_grad for p in module.parameters(recurse=False))
    ]
