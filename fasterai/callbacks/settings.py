"""L5. What the sparsify callbacks of all frameworks share: the arguments, and the sparsifier that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fasterai.core import contexts, criteria as criterion_catalogue, granularities, schedules
from fasterai.core.checks import check_fraction, from_catalogue
from fasterai.core.loop import Participant
from fasterai.core.schedules import as_schedule
from fasterai.core.targets import unwrap
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets import LotteryTicket

__all__ = ["SparsifySettings"]


class SparsifySettings:
    """The arguments of a sparsify callback, and the participants made of them, once for each model.

    What can be checked without a model is checked at once.
    """

    def __init__(self, sparsity: Any, granularity: Any, context: Any, criteria: Any, schedule: Any, ticket: Any, options: Any):
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            check_fraction("sparsity", value)
        from_catalogue("granularity", granularity, granularities)
        if not isinstance(context, Mapping):
            from_catalogue("context", context, contexts)
        from_catalogue("criteria", criteria, criterion_catalogue)
        as_schedule(from_catalogue("schedule", schedule, schedules))
        self.axes = (granularity, context, criteria)
        self.options: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, **options}
        self.ticket: dict[str, Any] | None = ticket
        self.sparsifier: Sparsifier | None = None

    def participants(self, model: nn.Module) -> list[Participant]:
        """The sparsifier, the one of the last run if it is the same model, and the lottery ticket if there is one."""
        if self.sparsifier is not None and unwrap(self.sparsifier.model) is unwrap(model):
            self.sparsifier.model = model  # a wrapper may have come or gone
        else:
            self.sparsifier = Sparsifier(model, *self.axes, **self.options)
        if self.ticket is None:
            return [self.sparsifier]
        return [self.sparsifier, LotteryTicket(self.sparsifier, **self.ticket)]
