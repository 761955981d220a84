"""The moment of a training that tickets go back to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fasterai.core.loop import Fit, Participant
from fasterai.core.saved import check_parts, mapping_of, tensor
from fasterai.model.cuts import check_trains
from fasterai.model.snapshots import clear_states_, find_differences, take_snapshot

__all__ = ["RewindPoint"]


class RewindPoint(Participant):
    """A participant that notes all tensors of a model at a moment of the training, and that a training took place.

    Args:
        model: The model, wrapped or not.
        weights: The tensors of the moment, if they are known from a round before: then the optimizers' state is cleared as the
            run begins.
        company: The participants that have to be in the run as well.
        position: The moment as a position in [0, 1); 0 is before the first step.
        epoch: The moment as an epoch, whose beginning it is; instead of the position.

    Attributes:
        weights: The tensors of the moment; empty before it.
        is_completed: True if a run has gone to its end.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor] | None = None,
        company: Sequence[Participant] = (),
        position: float = 0.0,
        epoch: int | None = None,
    ) -> None:
        self.model = model
        self.weights = dict(weights or {})
        self.is_completed = False
        self._is_first = weights is None
        self._company = tuple(company)
        self._position, self._epoch = position, epoch
        self._fit: Fit | None = None
        self._steps = self._moment = 0

    def relies_on(self) -> Iterable[Participant]:
        """Return the participants that came with it."""
        return self._company

    def on_fit_start(self, fit: Fit) -> None:
        """Begin the round's one run.

        Raises:
            ValueError: It is a second one, it trains another model, or the moment is not before its end.
        """
        if self.is_completed:
            raise ValueError(
                "train must train once in a round, got a second run with the same participants; for fastai's fine_tune pass "
                "them to one fit"
            )
        check_trains(fit.optimizer, self.model.parameters(), "the model that train was given", "its parameters")
        self._moment = self._step_of(fit)
        self._fit = fit
        if not self._is_first:
            clear_states_(fit.optimizers)
        elif self._moment == 0:
            self.weights = take_snapshot(self.model)

    def _step_of(self, fit: Fit) -> int:
        total = fit.total_steps
        if self._epoch is None:
            step, name = math.ceil(self._position * total - 1e-9), f"rewind={self._position:g}"
        elif fit.steps_per_epoch:
            step, name = self._epoch * fit.steps_per_epoch, f"rewind_epoch={self._epoch}"
        elif self._epoch:
            raise ValueError("rewind_epoch must be left out for a loop that says no epochs; pass rewind, a position in [0, 1)")
        else:
            return 0
        if step >= total:
            raise ValueError(f"{name.partition('=')[0]} must be before the end of the training, of {total} steps, got {name}")
        return step

    def after_step(self, position: float) -> None:
        """Note the tensors, if this is the moment."""
        self._steps += 1
        assert self._fit is not None
        if self._is_first and not self.weights and round(position * self._fit.total_steps) >= self._moment:
            self.weights = take_snapshot(self.model)

    def on_fit_end(self, completed: bool) -> None:
        """End the run; one of a search is forgotten."""
        if self._fit is not None and self._fit.is_search():
            self._steps = 0
            self.weights = {} if self._is_first else self.weights
        else:
            self.is_completed = completed
        self._fit = None

    def check_used(self) -> None:
        """Refuse a training in which it did not take part.

        Raises:
            ValueError: No step was taken with it, or the training ended before the moment.
        """
        if not self._steps:
            raise ValueError(
                "train must let the participants take part in its training, got one that took no step with them; pass them on: "
                "attach(optimizer, *participants, ...), or ParticipantCallback(*participants)"
            )
        if not self.weights:
            raise ValueError(f"train must go on beyond the moment to go back to, step {self._moment}, got {self._steps} steps")

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the noted tensors, for a training that is itself interrupted and resumed."""
        return {"weights": {name: x.clone() for name, x in self.weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load noted tensors; the caller's dict is unchanged.

        Raises:
            ValueError: They are of another model.
            TypeError: A part is of the wrong type.
        """
        check_parts(state, "RewindPoint", {"weights": mapping_of(tensor)})
        if state["weights"] and (found := find_differences(self.model, state["weights"])):
            raise ValueError(f"state's weights must be of this model, got some where {'; '.join(found[:5])}")
        self.weights = {name: x.clone() for name, x in state["weights"].items()}
