"""AC/DC: training in phases, compressed and decompressed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fasterai.core import schedules
from fasterai.core.checks import check_fraction, entry_or_repr, from_catalogue
from fasterai.core.contexts import Context
from fasterai.core.schedules import Alternating, Schedule, as_schedule
from fasterai.model.targets import LayerTypes, TargetsLike
from fasterai.sparse.dynamic.restart import Restarting
from fasterai.sparse.goal import Sparsity, read_context

__all__ = ["ACDC"]


class ACDC(Restarting):
    """Alternating compressed and decompressed training, by a schedule of phases that ends compressed.

    Peste et al. 2021 (arXiv 2106.12379). At the beginning of each compressed phase the largest weights of all layers together
    are kept, chosen anew. In a decompressed phase all weights train, those that come back from zero. What the optimizer keeps
    for these is cleared; the authors' code has an option that clears the momentum of all weights there.

    Args:
        model: The model.
        sparsity: The share of the weights that is pruned in a compressed phase, in [0, 1]; for context `local` also a dict of
            names or globs to shares.
        context: Which weights compete: `global`, or another context or its name.
        schedule: The phases: `alternating`, an `Alternating` with others, or any schedule.
        targets: Names of parameters, modules or containers, globs, or a predicate; instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.

    Raises:
        ValueError: An argument is out of range or unknown, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        context: Context | str = "global",
        schedule: Schedule | Callable[[float], float] | str = "alternating",
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
    ) -> None:
        self.check_settings(sparsity, context=context, schedule=schedule)
        phases = as_schedule(from_catalogue("schedule", schedule, schedules))
        super().__init__(
            model,
            "weight",
            context,
            sparsity=sparsity,
            schedule=phases,
            max_updates=max(50, phases.jumps) if isinstance(phases, Alternating) else 50,
            targets=targets,
            layer_type=layer_type,
        )

    @staticmethod
    def check_settings(
        sparsity: Sparsity,
        *,
        context: Context | str = "global",
        schedule: Schedule | Callable[[float], float] | str = "alternating",
        **others: Any,
    ) -> None:
        """Refuse settings that are wrong for every model.

        Raises:
            ValueError: One is out of range or unknown.
            TypeError: One is of the wrong type.
        """
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            check_fraction("sparsity", share)
        read_context(context, nm=False)
        as_schedule(from_catalogue("schedule", schedule, schedules))

    def _how(self) -> str:
        return entry_or_repr(self.schedule, schedules)
