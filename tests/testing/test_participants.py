"""The contract of participants, over every one of the library, and over ones that break it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.core.loop import Participant
from fasterai.testing import check_participant
from tests.participants import PARTICIPANTS

#: Whose runs are slow, for the model is exported at each start.
STEPS = {"GradualPruner": 3}


@pytest.mark.parametrize("name", PARTICIPANTS)
def test_every_participant_keeps_the_promises(name: str):
    check_participant(PARTICIPANTS[name], steps=STEPS.get(name, 5))


class Drift(Participant):
    """Adds its count of steps to a weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count, self.total = model, 0, torch.zeros(())

    def after_step(self, position: float) -> None:
        self.count += 1
        self.total = self.total + self.count
        with torch.no_grad():
            self.model[0].weight[0, 0] += 0.1 * self.count

    def metrics(self) -> dict[str, float]:
        return {"count": float(self.count)}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.total = state["count"], state["total"].clone()


class Forgets(Drift):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({**state, "count": 0})


class ForgetsInSilence(Drift):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Shares(Drift):
    def after_step(self, position: float) -> None:
        super().after_step(position)
        self.shared = getattr(self, "shared", torch.zeros(1)).add_(1)

    def state_dict(self) -> dict[str, Any]:
        self.shared = getattr(self, "shared", torch.zeros(1))
        return {**super().state_dict(), "shared": self.shared}


class KeepsObjects(Drift):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "model": nn.Identity()}


class KeepsOutputs(Drift):
    def after_loss(self, loss: Tensor, batch: Any) -> Tensor:
        self.outputs = batch.outputs
        return loss


class KeepsGraph(Drift):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weight": self.model[0].weight * 1}


class Marks(Drift):
    def on_fit_end(self, completed: bool) -> None:
        self.model[0].seen = True


class Hooks(Drift):
    def on_fit_start(self, fit: Any) -> None:
        self.model[0].register_forward_hook(print_nothing)


class Early(Drift):
    def on_fit_start(self, fit: Any) -> None:
        with torch.no_grad():
            self.model[0].weight[0, 0] = 0.0


class Infinite(Drift):
    def metrics(self) -> dict[str, float]:
        return {"count": float("nan")}


class OtherFigures(Drift):
    def metrics(self) -> dict[str, float]:
        return {"count": 1.0} if self.count else {}


class Clings(Drift):
    """Is its own copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Clings:
        return self


class Takes(Drift):
    def on_fit_start(self, fit: Any) -> None:
        fit.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def print_nothing(*_: Any) -> None:
    """Do nothing."""


def test_one_that_keeps_them_passes():
    check_participant(Drift, steps=3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgets, "a state of step 1 must be the same when it was loaded .* got other run.participants.Forgets.count"),
        (ForgetsInSilence, r"goes on after step 1 must end as one that was not broken off, got other model\.0\.weight"),
        (Shares, "a state must be a copy"),
        (KeepsObjects, "a state must hold tensors, numbers and text only"),
        (KeepsOutputs, "outputs of a step must not be kept"),
        (KeepsGraph, "a state must be detached, got participants.KeepsGraph.weight"),
        (Marks, "0 must have its own attributes alone after a run, got seen"),
        (Hooks, "0 must have no hooks after a run, got _forward_hooks"),
        (Early, "a run without a step must leave the weights as they were"),
        (Infinite, "figures must be finite numbers, got count: nan"),
        (OtherFigures, r"figures must have the same names before and after a run, got \[\] at first"),
        (Clings, "a copy must share no weight or state"),
        (Takes, "the optimizer must have the model's parameters"),
    ],
)
def test_a_broken_promise_is_named(kind: Callable[[nn.Module], Participant], message: str):
    with pytest.raises(AssertionError, match=message):
        check_participant(kind, steps=2)
