"""Regularisation for the callbacks of every framework: its signature, with the order of arguments of the public fasterai."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fasterai.callbacks.participants import ParticipantMethod
from fasterai.core.participant import Participant
from fasterai.core.schedules import Schedule
from fasterai.display import brief
from fasterai.model.targets import LayerTypes
from fasterai.regularize.regularizer import Regularizer

__all__ = ["RegularizeMethod"]


class RegularizeMethod(ParticipantMethod):
    """Adds a penalty on units of weights while the model trains.

    What is validated is the task's loss alone. The table or logger has the mean of the penalty over an epoch, without its
    weight, as `regularization`, and the weight at that time as `strength`.

    Args:
        criteria: How large a weight is: a criterion, its name, or a function of the weight; or a list of some.
        granularity: What a unit is, or its name; or a list of some. The penalties of all pairs are added up.
        weight: The strength of the penalty where the schedule is 1, at least 0.
        layer_types: Module classes whose weights are penalised; None for the weights that a `Sparsifier` would prune.
        schedule: The share of `weight` at each position of the run, its name, or a function; None for all of it throughout.
        verbose: Nothing more is printed by True: the figures are in the table anyway.
        penalty: What a unit costs: `l1`, `group_lasso`, `growing`, `slimming`, or a `Penalty`.
        how: The place of the penalty: `loss`, `gradient` or `proximal`.
        targets: Names of parameters, modules or containers, globs, or a predicate, in the place of `layer_types`.
        example_inputs: A tensor or tuple that the model runs on; the first batch if left out.
        model: The part of the model whose weights are penalised; all of it if left out.

    Attributes:
        participant: The `Regularizer` of the last run, None before the first.

    Raises:
        ValueError: An argument is out of range or unknown, or two do not go together.
        TypeError: An argument is of the wrong type.
    """

    makes: ClassVar[type[Participant]] = Regularizer
    figures: ClassVar[tuple[str, ...]] = ("regularization", "strength")

    def __init__(
        self,
        criteria: Any,
        granularity: Any,
        weight: float = 0.01,
        layer_types: LayerTypes | None = nn.Conv2d,
        schedule: Schedule | Callable[[float], float] | str | None = None,
        verbose: bool = False,
        *,
        penalty: Any = "l1",
        how: str = "loss",
        targets: Any = None,
        example_inputs: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        options = {"penalty": penalty, "how": how, "example_inputs": example_inputs}
        options |= {"layer_type": layer_types} if targets is None else {"targets": targets}
        super().__init__(criteria, granularity, weight, schedule, model=model, **options)

    def _settings(self) -> str:
        shown = (self.arguments[name] for name in ("criteria", "granularity", "weight"))
        return ", ".join(map(brief, shown))

    @property
    def regularizer(self) -> Regularizer | None:
        """The regulariser of the last run, None before the first."""
        found: Regularizer | None = self.participant
        return found

    def get_norm(self) -> Tensor:
        """Return the penalty now, without its weight: a scalar with its gradient.

        Raises:
            ValueError: No run has begun yet.
        """
        if self.regularizer is None:
            raise ValueError(
                "get_norm must come after the first batch of a run, got a callback that was in none; a Regularizer(model, "
                "criteria, granularity) has one at once"
            )
        return self.regularizer.get_norm()
