"""The timer reads its clock around the passes and nothing else; turns change their order."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Timer

from fasterai.analyze import timing
from fasterai.analyze.timing import by_turns, dealt, on_threads, passes_in, quartiles, ratio_of, seconds_per_pass, spread_of

X = (torch.zeros(1),)


class Takes(nn.Module):
    """Takes seconds of a clock that stands still otherwise, and notes whether garbage was collected meanwhile."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.collects = clock, seconds, []

    def forward(self, x):
        self.clock[0] += self.seconds
        self.collects.append(gc.isenabled())
        if x.dim() > 1:
            raise RuntimeError("not today")
        return x


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_seconds_are_those_of_one_pass(clock):
    model = Takes(clock, 3.0)
    assert seconds_per_pass(model, X) == 3.0
    assert len(model.collects) == 1
    assert seconds_per_pass(model, X, 4) == 3.0
    assert len(model.collects) == 5


def test_the_device_is_waited_for_before_both_readings(clock, monkeypatch):
    """Waiting for earlier work takes 10 seconds, and for the passes 2."""
    waits = iter((10.0, 2.0))
    devices = []

    def wait_for(device):
        devices.append(device)
        clock[0] += next(waits)

    monkeypatch.setattr(timing, "wait_for", wait_for)
    assert seconds_per_pass(Takes(clock, 3.0), X, 4) == (4 * 3.0 + 2.0) / 4
    assert devices == [torch.device("cpu")] * 2


def test_garbage_waits_and_is_collected_afterwards_as_before(clock):
    model = Takes(clock, 1.0)
    assert gc.isenabled()
    seconds_per_pass(model, X)
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="not today"):
        seconds_per_pass(model, (torch.zeros(1, 1),))
    assert gc.isenabled()
    gc.disable()
    try:
        seconds_per_pass(model, X)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert model.collects == [False] * 3


class Sleeper(nn.Module):
    def forward(self, x):
        time.sleep(0.004)
        return x


def test_it_agrees_with_torchs_timer():
    model = Sleeper()
    torchs = Timer("model(*inputs)", globals={"model": model, "inputs": X}).timeit(10).median
    assert seconds_per_pass(model, X, 10) == pytest.approx(torchs, rel=0.5)  # 4 ms, and what a busy machine adds


@pytest.mark.parametrize(
    ("seconds", "passes"),
    [(0.001, 5), (0.0011, 5), (0.0009, 6), (0.005, 1), (0.02, 1), (5.0, 1), (1e-7, 10_000), (0.0, 10_000)],
)
def test_a_block_is_passes_for_five_milliseconds(seconds, passes):
    assert passes_in(0.005, seconds) == passes


def test_every_second_turn_goes_backwards(clock):
    order, asked = [], []

    def run(name):
        order.append(name)
        clock[0] += 1.0
        return len(order)

    def is_enough(found, seconds):
        asked.append((dict.fromkeys(found, 0) | {name: len(values) for name, values in found.items()}, seconds))
        return len(found["a"]) == 3

    found = by_turns({name: lambda name=name: run(name) for name in "abc"}, is_enough)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert asked == [({"a": n, "b": n, "c": n}, 3.0 * n) for n in range(4)]


def test_nothing_runs_where_it_is_enough_at_once():
    assert by_turns({"a": lambda: pytest.fail("ran")}, lambda *_: True) == {"a": []}


def test_threads_come_back():
    before = torch.get_num_threads()

    def fail_on_threads():
        with on_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        fail_on_threads()
    assert torch.get_num_threads() == before


def test_turns_are_dealt_to_five_hands_and_the_fastest_counts():
    assert dealt([3.0, 1.0]) == [3.0, 1.0]
    assert dealt([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]) == [4.0, 3.0, 7.0, 6.0, 5.0]
    # a machine that is disturbed in every second turn: after ten turns each hand has an undisturbed one
    assert dealt([1.0, 50.0] * 5) == [1.0] * 5


def test_the_spread_is_of_the_ratios_of_the_hands():
    assert spread_of([2.0] * 5, [1.0] * 5) == 1.0
    assert spread_of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == 2.0  # quartiles 2 and 4
    assert spread_of([2.0, 100.0] * 5, [1.0] * 10) == 1.0
    # Busy: medians 9 and 8, hand by hand 2, 2, 9 / 8, 3, 3. The spread reaches down from 2 to the ratio of what is shown.
    first, own = [2.0, 4.0, 9.0, 30.0, 36.0], [1.0, 2.0, 8.0, 10.0, 12.0]
    assert ratio_of(first, own) == (9 / 8, 9 / 8, 3.0)
    assert spread_of(first, own) == 3.0 / (9 / 8)


def test_quartiles_lie_among_the_values():
    assert quartiles([4.0, 0.0, 1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.75)
