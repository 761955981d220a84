"""Keeping masks in later training: after every step, and where a run breaks off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.core.granularities import Keep, weight
from fasterai.core.loop import Fit
from fasterai.model.cuts import noted_optimizers
from fasterai.model.targets import Selection, all_targets
from fasterai.sparse.hold import Hold
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import perceptron

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


def loaded(granularity="weight", **options) -> tuple[nn.Module, Sparsifier]:
    """A model with the zeros of a pruned one, and a sparsifier that has not seen them made."""
    first = perceptron(6, 10, 4)
    Sparsifier(first, granularity, **options).sparsify_model(0.5)
    model = perceptron(6, 10, 4, seed=3)
    model.load_state_dict(first.state_dict())
    return model, Sparsifier(model, granularity, **options)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Train three steps, and return the number of zeros in the weights."""
    for _ in range(3):
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 4).backward()
        optimizer.step()
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


NO_MASKS = r"has no masks \(50 of the 100 weights of its targets are zero, and will train\): sparsifier.mask_zeros\(\) takes"


def test_a_hold_without_masks_names_the_zeros_that_would_be_lost():
    model, sparsifier = loaded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=NO_MASKS):
        sparsifier.hold(optimizer).remove()
    hold = sparsifier.hold()  # a participant is told with its run, before which masks may still come
    with pytest.warns(UserWarning, match=NO_MASKS):
        hold.on_fit_start(Fit(total_steps=1, model=model, optimizer=optimizer))


def test_a_hold_of_a_dense_model_says_that_nothing_is_pruned():
    model = perceptron(6, 10, 4)
    with pytest.warns(UserWarning, match=r"has no masks \(nothing is pruned\): sparsifier\.load_state_dict"):
        Sparsifier(model).hold(torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("granularity", ["weight", Keep("in")])
def test_zeros_that_were_loaded_are_held_once_they_are_masks(granularity):
    model, sparsifier = loaded(granularity)
    sparsifier.mask_zeros()
    assert sparsifier.sparsity.overall == 0.5
    sparsifier.hold(torch.optim.SGD(model.parameters(), 0.1))
    assert train_on(model, torch.optim.SGD(model.parameters(), 0.1)) < 50
    sparsifier.mask_zeros()  # the zeros that are left, not the masks of before
    assert sparsifier.sparsity.overall < 0.5
    again, sparsifier = loaded(granularity)
    sparsifier.mask_zeros()
    optimizer = torch.optim.SGD(again.parameters(), 0.1, momentum=0.9)
    sparsifier.hold(optimizer)
    assert train_on(again, optimizer) == 50


def test_masks_of_zeros_change_no_weight():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    sparsifier = Sparsifier(model)
    sparsifier.mask_zeros()
    assert model.weight.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    assert sparsifier.masks["weight"].tolist() == [[False, True], [True, False]]


def test_a_run_of_another_model_is_refused():
    model, hold = held()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must train the sparsifier's model"):
        hold.on_fit_start(Fit(total_steps=1, model=model, optimizer=optimizer))
    assert noted_optimizers(model) == []
