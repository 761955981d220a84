"""The arguments of callbacks, checked as far as they can be without a model, and the participants made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasterai.core import contexts, granularities, schedules
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_fraction, from_catalogue
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Participant
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.model.names import unwrap
from fasterai.sparse.sparsifier import Sparsifier, Sparsity
from fasterai.sparse.tickets.lottery import LotteryTicket

if TYPE_CHECKING:
    from fasterai.prune.gradual import GradualPruner
    from fasterai.prune.surgery.model_copies import Copies

__all__ = ["PruneSettings", "SparsifySettings"]


class SparsifySettings:
    """The arguments of a sparsify callback; what can be checked without a model is checked at once.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: A granularity or its name.
        context: A context or its name.
        criteria: A criterion, its name, or a function of the weight.
        schedule: A schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move.
        rewind_epoch: The epoch whose beginning is gone back to.
        reset_end: Go back at the end of the run.
        save_tickets: Whether each ticket is saved.
        options: Further arguments of the `Sparsifier`.

    Attributes:
        sparsifier: The sparsifier of the last run, None before the first.

    Raises:
        ValueError: A sparsity is out of range, a name is unknown, or tickets are to be saved where there are none.
        TypeError: An argument is of the wrong type, or an option is no argument of the `Sparsifier`.
    """

    def __init__(
        self,
        sparsity: Sparsity | None,
        granularity: Granularity | str,
        context: Context | Mapping[str, float] | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str,
        *,
        lth: bool,
        rewind_epoch: int,
        reset_end: bool,
        save_tickets: bool,
        options: Mapping[str, Any],
    ) -> None:
        if isinstance(context, Mapping):
            if sparsity is not None:
                raise ValueError(f"sparsity must be None where a dict as context gives each target its own, got {sparsity!r}")
            sparsity, context = context, "local"
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            check_fraction("sparsity", value)
        from_catalogue("granularity", granularity, granularities)
        from_catalogue("context", context, contexts)
        as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        as_schedule(from_catalogue("schedule", schedule, schedules))
        if save_tickets and not lth:
            raise ValueError(f"save_tickets must be left out without lth=True, got {save_tickets!r}")
        self.axes = (granularity, context, criteria)
        self.options: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, **options}
        inspect.signature(Sparsifier).bind(nn.Identity(), *self.axes, **self.options)
        ticket: dict[str, Any] = {"rewind": lth, "rewind_epoch": rewind_epoch, "reset_end": reset_end}
        self.ticket = ticket if lth or reset_end else None
        self.sparsifier: Sparsifier | None = None

    def participants(self, model: nn.Module, tickets: str | Path | None = None) -> list[Participant]:
        """Return the sparsifier, the one of the last run if it is the same model, and the lottery ticket if there is one.

        Args:
            model: What is sparsified.
            tickets: The folder to save tickets in, None for not at all.
        """
        if self.sparsifier is not None and unwrap(self.sparsifier.model) is unwrap(model):
            self.sparsifier.model = model  # a wrapper may have come or gone
        else:
            self.sparsifier = Sparsifier(model, *self.axes, **self.options)
        if self.ticket is None:
            return [self.sparsifier]
        return [self.sparsifier, LotteryTicket(self.sparsifier, **self.ticket, save_tickets=tickets)]


class PruneSettings:
    """The arguments of a prune callback; what can be checked without a model is checked at once.

    Args:
        pruning_ratio: The share of the channels that go, in [0, 1), or a dict of names of layers to shares.
        schedule: A schedule that never falls, its name, or a function of the position.
        context: `local`, `global`, or their names.
        criteria: A criterion, its name, or a function of the weight.
        ignored_layers: Modules, or their names, whose outputs stay.
        example_inputs: What the model runs on; a few samples of the loop's batch if left out.
        max_updates: How often channels go in a run, at most.
        copies: Modules that are cut alike, or a function that gives them.
        options: Further arguments of the `Pruner`.

    Attributes:
        pruner: The `GradualPruner` of the last run, None before the first.

    Raises:
        ValueError: An argument is out of range or unknown, or the schedule falls.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    def __init__(
        self,
        pruning_ratio: Any,
        schedule: Schedule | Callable[[float], float] | str,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        *,
        ignored_layers: Iterable[nn.Module | str] | None,
        example_inputs: Any,
        max_updates: int,
        copies: Copies,
        options: Mapping[str, Any],
    ) -> None:
        from fasterai.prune.gradual_settings import check_settings  # not needed by those who only mask, and slow to load

        check_settings(pruning_ratio, context, criteria, schedule, ignored_layers, max_updates, copies, options)
        self.axes = (pruning_ratio, context, criteria, schedule)
        self.ignored_layers = None if ignored_layers is None else list(ignored_layers)
        self.example_inputs = example_inputs
        self.max_updates = max_updates
        self.copies = copies
        self.options = dict(options)
        self.pruner: GradualPruner | None = None

    def participant(self, model: nn.Module, copies: Copies = None) -> GradualPruner:
        """Return the `GradualPruner`, the one of the last run if it is the same model.

        Args:
            model: What channels go from.
            copies: A function that gives the modules that are cut alike, instead of the argument.
        """
        from fasterai.prune.gradual import GradualPruner

        if self.pruner is not None and unwrap(self.pruner.model) is unwrap(model):
            self.pruner.model = model  # a wrapper may have come or gone
        else:
            self.pruner = GradualPruner(
                model,
                *self.axes,
                self.ignored_layers,
                self.example_inputs,
                max_updates=self.max_updates,
                copies=self.copies if copies is None else copies,
                **self.options,
            )
        return self.pruner
