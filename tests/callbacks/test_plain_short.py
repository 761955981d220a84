"""Runs that end short: what was reached of what was asked is said, once, and runs that reach it say nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.sparse.sparsifier import Sparsifier
from tests.beside import waits_for
from tests.messages import heard
from tests.networks import perceptron

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def make(schedule="lin", **options):
    model = perceptron(6, 10, 4)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.7, schedule=schedule, **options)
    return model, torch.optim.SGD(model.parameters(), 0.1), sparsifier


def step(model, optimizer, count=1):
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_accumulation_that_was_not_counted_is_said_with_both_figures_and_the_repair():
    model, optimizer, sparsifier = make()
    handle = attach(optimizer, sparsifier, total_steps=40)
    step(model, optimizer, 10)  # 40 batches, four of them to a step
    with heard("run ends") as said:
        handle.remove()
    (message,) = said
    # lin to 0.7 in 40 steps: 0.175 of 100 weights after 10
    assert message.startswith("the run ends at step 10 of 40, with sparsity 0.1800 of 0.7000: total_steps counts steps")
    assert "accumulate=k" in message and "GradScaler" in message and "remove(completed=True)" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle.remove()


@pytest.mark.parametrize("completed", [True, False])
def test_an_end_that_is_meant_is_not_said(completed):
    model, optimizer, sparsifier = make()
    handle = attach(optimizer, sparsifier, total_steps=40)
    step(model, optimizer, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle.remove(completed)


def test_a_run_that_has_reached_what_was_asked_for_may_be_shorter():
    model, optimizer, sparsifier = make("one_shot")
    handle = attach(optimizer, sparsifier, total_steps=10)
    step(model, optimizer, 9)
    assert sparsifier.sparsity.overall == 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle.remove()


def test_a_loop_that_broke_off_says_it_beside_its_own_error():
    model, optimizer, sparsifier = make()

    def fails():
        with attach(optimizer, sparsifier, total_steps=10):
            step(model, optimizer, 5)
            raise KeyError("own")

    said = pytest.warns(UserWarning, match=r"ends at step 5 of 10, with sparsity 0\.3500 of 0\.7000: the loop has failed")
    with said, pytest.raises(KeyError):
        fails()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as an error it does not take the place of the loop's own
        with pytest.raises(KeyError):
            fails()


def test_a_participant_of_a_run_that_goes_on_elsewhere_is_said():
    model, optimizer, sparsifier = make()
    first = attach(optimizer, sparsifier, total_steps=10)
    step(model, optimizer, 5)
    other = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"ends at step 5 of 10, with sparsity 0\.3500 of 0\.7000: another run begins"):
        second = attach(other, sparsifier, total_steps=1)
    assert not first.loop.running and not optimizer._optimizer_step_post_hooks
    step(model, other)
    second.remove()


def test_a_handle_that_is_gone_with_its_optimizer_is_said():
    def trains():
        model, optimizer, sparsifier = make()
        attach(optimizer, sparsifier, total_steps=10)
        step(model, optimizer, 5)

    with pytest.warns(UserWarning, match=r"ends at step 5 of 10, with sparsity 0\.3500 of 0\.7000: its handle is gone"):
        trains(), gc.collect()


def test_a_handle_that_is_collected_during_an_export_is_said_and_leaves_no_operation_in_it():
    model, optimizer, sparsifier = make()
    attach(optimizer, sparsifier, total_steps=10)
    step(model, optimizer, 5)
    dropped = [(model, optimizer, sparsifier)]

    class Collects(torch.nn.Module):
        def forward(self, x):
            dropped.clear()
            gc.collect()
            return x + 1

    del model, optimizer, sparsifier
    with pytest.warns(UserWarning, match=r"ends at step 5 of 10, with sparsity 0\.3500 of 0\.7000: its handle is gone"):
        program = torch.export.export(Collects(), (torch.ones(2),), strict=False)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]


def test_a_handle_that_is_gone_after_its_last_step_says_nothing():
    model, optimizer, sparsifier = make()
    attach(optimizer, sparsifier, total_steps=5)
    step(model, optimizer, 5)
    with heard("run ends") as messages:
        del optimizer
        gc.collect()
    assert messages == []


SCRIPT = """
import torch
from torch import nn
from fasterai import Sparsifier, attach
model = nn.Linear(6, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
handle = attach(optimizer, Sparsifier(model, sparsity=0.5, schedule="lin"), total_steps=4)
for _ in range({steps}):
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
"""


def ended_after(steps, folder, environment):
    command = [sys.executable, "-c", SCRIPT.format(steps=steps)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(2, "the run ends at step 2 of 4, with sparsity 0.2500 of 0.5000", marks=waits_for(ended_after, 2)),
        pytest.param(4, "", marks=waits_for(ended_after, 4)),
    ],
)
def test_the_end_of_the_program_says_it(beside, steps, expected):
    said = beside(ended_after, steps)
    assert expected in said and said.count("UserWarning: the run ends") == bool(expected)
    assert "Traceback" not in said


class Silent(Participant):
    """Asks for nothing that could be missed."""


def test_who_asks_for_nothing_misses_nothing():
    model, optimizer, _ = make()
    handle = attach(optimizer, Silent(), total_steps=10)
    step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle.remove()


# --- counting steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "total", "per_epoch"),
    [
        ({"epochs": 3, "steps_per_epoch": 10}, 30, 10),
        ({"epochs": 2, "steps_per_epoch": 10, "accumulate": 4}, 6, 3),  # 4 + 4 + 2 batches
        ({"epochs": 2, "steps_per_epoch": 3, "accumulate": 8}, 2, 1),
        ({"total_steps": 7}, 7, None),
    ],
)
def test_epochs_are_counted_in_steps_of_the_optimizer(given, total, per_epoch):
    class Notes(Participant):
        def on_fit_start(self, fit):
            self.seen = (fit.total_steps, fit.steps_per_epoch)

    _, optimizer, _ = make()
    handle = attach(optimizer, notes := Notes(), **given)
    assert notes.seen == (total, per_epoch) and handle.loop.total_steps == total


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, r"total_steps must be given, got None; pass total_steps=.* or epochs= and steps_per_epoch=len"),
        ({"epochs": 3}, ValueError, "steps_per_epoch must be given, got None"),
        ({"steps_per_epoch": 3}, ValueError, "epochs must be given, got None"),
        ({"total_steps": 9, "epochs": 3}, ValueError, "epochs must be left out beside total_steps.* got 3 and total_steps=9"),
        ({"total_steps": 9, "steps_per_epoch": 3}, ValueError, "steps_per_epoch must be left out beside total_steps"),
        ({"total_steps": 9, "accumulate": 3}, ValueError, "accumulate must be left out beside total_steps"),
        ({"epochs": 0, "steps_per_epoch": 3}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 2, "steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1, got 0"),
        ({"epochs": 2, "steps_per_epoch": 3, "accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"epochs": 2.0, "steps_per_epoch": 3}, TypeError, "epochs must be a whole number"),
    ],
)
def test_counts_that_do_not_make_a_run(given, error, message):
    _, optimizer, sparsifier = make()
    with pytest.raises(error, match=message):
        attach(optimizer, sparsifier, **given)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_handle_is_not_copied(copied):
    _, optimizer, sparsifier = make()
    handle = attach(optimizer, sparsifier, total_steps=1)
    with pytest.raises(TypeError, match=r"handle must not be pickled or copied.* save handle\.state_dict\(\)"):
        copied(handle)
    copy.deepcopy(optimizer), pickle.dumps(optimizer)  # a copy has no hooks of torch's either
