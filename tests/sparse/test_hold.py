"""Keeping masks in later training: after every step, and where a run breaks off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.core.granularities import weight
from fasterai.core.loop import Fit
from fasterai.model.cuts import noted_optimizers
from fasterai.model.targets import Selection, all_targets
from fasterai.sparse.hold import Hold
from fasterai.sparse.record import MaskRecord

KEEP = torch.tensor([[True, False], [False, True]])


def held() -> tuple[nn.Linear, Hold]:
    """A layer of ones, and a hold on the masks of its diagonal."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    record = MaskRecord(model, weight, Selection(tuple(all_targets(model)), {}))
    record.replace({"weight": KEEP})
    return model, Hold(record)


def test_masks_are_applied_after_a_step_and_not_before():
    model, hold = held()
    hold.on_fit_start(Fit(total_steps=2, model=model))
    hold.before_step(0.5)
    assert model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    hold.after_step(0.5)
    assert model.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("completed", [True, False])
def test_a_run_that_breaks_off_within_a_step_ends_masked(completed: bool):
    """The optimizer has written, and what comes after its step is not reached."""
    model, hold = held()
    hold.on_fit_start(Fit(total_steps=2, model=model))
    hold.before_step(0.5)
    nn.init.constant_(model.weight, 3.0)
    hold.on_fit_end(completed)
    assert model.weight.tolist() == [[3.0, 0.0], [0.0, 3.0]]


def test_the_runs_optimizer_is_noted_for_later_removals():
    model, hold = held()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold.on_fit_start(Fit(total_steps=1, model=model, optimizer=optimizer))
    assert noted_optimizers(model) == [optimizer]


def test_a_run_of_another_model_is_refused():
    model, hold = held()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must train the sparsifier's model"):
        hold.on_fit_start(Fit(total_steps=1, model=model, optimizer=optimizer))
    assert noted_optimizers(model) == []
