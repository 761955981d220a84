from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
from torch import nn

from fasterai.analyze import latency as module
from fasterai.analyze.latency import compare_latency, latency


class Sleeper(nn.Module):
    """Takes so many seconds per sample, and notes how it was called, where whoever restores its attributes does not look."""

    def __init__(self, seconds):
        super().__init__()
        calls = []
        self.seconds, self.calls_of = seconds, lambda: calls
        self.conv = nn.Conv2d(2, 2, 1)
        self.register_buffer("count", torch.zeros(()))

    @property
    def calls(self):
        return self.calls_of()

    def forward(self, x, *others):
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        state = (self.training, torch.is_grad_enabled(), torch.get_num_threads(), last)
        self.calls.append((len(x) if x.dim() else 0, *state, *others))
        self.count += 1
        time.sleep(self.seconds * len(x))
        return x


@pytest.fixture
def few_turns(monkeypatch):
    monkeypatch.setattr(module, "TURNS", 3)
    monkeypatch.setattr(module, "SETTLED", float("inf"))


X = torch.zeros(2, 2, 3, 3)


@pytest.mark.usefixtures("few_turns")
def test_the_time_is_that_of_the_batch():
    found = latency(Sleeper(0.004), X, batch_sizes=(1, 3), min_run_time=0.03)
    assert [t.batch_size for t in found.timings] == [1, 3]
    assert found[1].median >= 0.004  # a busy machine only takes longer
    assert found[3].median >= 0.012
    assert found[3].median / found[1].median == pytest.approx(3, rel=0.5)
    assert all(t.iqr >= 0 and t.blocks >= 3 for t in found.timings)
    assert (found.device, found.threads, found.channels_last) == ("cpu", 1, False)


@pytest.mark.usefixtures("few_turns")
def test_it_runs_in_eval_mode_without_gradients_on_the_threads_asked_for():
    before = torch.get_num_threads()
    model = Sleeper(0.001).train()
    torch.set_num_threads(2)
    try:
        latency(model, X, min_run_time=0.01, threads=1)
        assert {call[1:4] for call in model.calls} == {(False, False, 1)}
        model.calls.clear()
        latency(model, X, min_run_time=0.01, threads=3)
        assert {call[3] for call in model.calls} == {3}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert model.training
    assert model.count == 0  # its buffers are put back
    assert not model._forward_hooks


@pytest.mark.usefixtures("few_turns")
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_is_a_copys_business(channels_last, monkeypatch):
    seen = []
    monkeypatch.setattr(Sleeper, "forward", lambda self, x: seen.append((_last(self.conv.weight), _last(x))))
    model = Sleeper(0)
    model.conv = nn.Conv2d(2, 4, 3)
    found = latency(model, X, batch_sizes=(3,), channels_last=channels_last, min_run_time=1e-4)
    assert set(seen) == {(channels_last, channels_last)}
    assert not _last(model.conv.weight) and not _last(X)
    assert found.channels_last is channels_last


@pytest.mark.usefixtures("few_turns")
@pytest.mark.parametrize("size", [1, 3, None])
def test_batches_keep_the_inputs_memory_format(size, monkeypatch):
    seen = []
    monkeypatch.setattr(Sleeper, "forward", lambda self, x: seen.append(_last(x)))
    sizes = None if size is None else (size,)
    latency(Sleeper(0), X.to(memory_format=torch.channels_last), batch_sizes=sizes, min_run_time=1e-4)
    assert set(seen) == {True}


def _last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("few_turns")
def test_batches_repeat_the_samples_of_every_batched_input(monkeypatch):
    seen = []
    monkeypatch.setattr(Sleeper, "forward", lambda self, *inputs: seen.append(inputs))
    inputs = (torch.tensor([1, 2]), {"mask": torch.tensor([[3], [4]])}, torch.tensor([5, 6, 7]), torch.tensor(8), "text")
    latency(Sleeper(0), inputs, batch_sizes=(3,), min_run_time=1e-4)
    ids, mask, other, scalar, text = seen[0]
    assert ids.tolist() == [1, 2, 1]
    assert mask["mask"].tolist() == [[3], [4], [3]]
    assert (other.tolist(), scalar.item(), text) == ([5, 6, 7], 8, "text")
    seen.clear()
    found = latency(Sleeper(0), inputs, batch_sizes=None, min_run_time=1e-4)
    assert seen[0][0].tolist() == [1, 2]
    assert found.timings[0].batch_size is None
    assert "as given" in str(found)


@pytest.mark.usefixtures("few_turns")
def test_models_take_turns_and_ratios_follow(monkeypatch):
    """On a clock that only sleeping moves on."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    slow, fast = Sleeper(0.004), Sleeper(0.002)
    order = []
    slow.register_forward_pre_hook(lambda *_: order.append("slow"))
    fast.register_forward_pre_hook(lambda *_: order.append("fast"))
    found = compare_latency({"slow": slow, "fast": fast}, X, batch_sizes=(1, 2), min_run_time=0.03)
    assert found.ratios["slow"] == (1.0, 1.0)
    assert found.ratio("fast", 2) == pytest.approx(2.0)
    low, high = found.quartiles["fast"][0]
    assert low <= found.ratio("fast", 1) <= high
    changes = [a for a, b in itertools.pairwise(order) if a != b]
    # for each size: warm up slow, fast; then slow fast, fast slow, slow fast
    assert changes == (["slow", "fast"] * 6)[:-1]
    assert not found.is_same("fast") and found.is_same("slow")


def test_a_quick_model_is_measured_for_as_long_as_asked_and_no_longer():
    model = nn.Conv2d(2, 2, 1)
    latency(model, X, min_run_time=1e-4)  # loads what is loaded late
    start, busy = time.perf_counter(), time.process_time()
    found = latency(model, X, min_run_time=0.3)
    assert time.perf_counter() - start >= 0.3
    # A block of a millisecond in each of the turns, and the finding of its size; what others take meanwhile does not count.
    assert time.process_time() - busy < 2.0
    assert found[1].blocks >= module.TURNS


def test_blocks_fill_the_time_of_every_turn(monkeypatch):
    """On a clock that the model alone moves on: one second a pass, and three in each of fifteen turns."""
    now, calls = [0.0], []

    class Takes(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            now[0] += 1.0
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = latency(Takes(), X, batch_sizes=(1,), min_run_time=45.0)
    assert (found[1].blocks, found[1].median, found[1].iqr) == (45, 1.0, 0.0)
    assert found[1].layers[""].passes == module.LAYER_TURNS
    # six to warm up, and in each turn one that does not count
    assert len(calls) == 6 + 15 * (1 + 3) + module.LAYER_TURNS


def test_a_slow_start_makes_no_small_blocks(monkeypatch):
    """All but one of the first passes take a second, as on a busy machine; a block is five of 0.2 ms all the same."""
    now, calls = [0.0], []

    class Takes(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            now[0] += 1.0 if len(calls) < 6 else 0.0002
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    latency(Takes(), X, batch_sizes=(1,), min_run_time=1e-6)
    assert len(calls) == 6 + 15 * (1 + 5) + module.LAYER_TURNS * module.LAYER_PASSES


def test_there_are_enough_turns():
    assert module.TURNS >= 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_sizes": (0,)}, ValueError, "batch_sizes must be at least 1, got 0"),
        ({"batch_sizes": (1.5,)}, TypeError, "batch_sizes must be a whole number of at least 1, got 1.5"),
        ({"batch_sizes": ()}, ValueError, "batch_sizes must be at least one size, or None"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"min_run_time": 0}, ValueError, "min_run_time must be a number of seconds above 0, got 0"),
        ({"min_run_time": float("nan")}, ValueError, "min_run_time must be a number of seconds above 0, got nan"),
        ({"example_inputs": torch.zeros(2, 5)}, ValueError, "example_inputs must be arguments that the models run on"),
        ({"example_inputs": "text"}, ValueError, "example_inputs must hold a tensor with at least one sample"),
        ({"model": None}, TypeError, r"models\['model'\] must be a torch.nn.Module, got None"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {"model": nn.Linear(4, 3), "example_inputs": torch.zeros(2, 4), **arguments}
    with pytest.raises(error, match=message):
        latency(**given)


@pytest.mark.parametrize("models", [{}, [nn.Linear(1, 1)], None])
def test_models_are_named(models):
    with pytest.raises(ValueError, match="models must be a dict of at least one name and model, got"):
        compare_latency(models, torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("spread", "seconds", "turns"),
    [
        (1.05, 1.0, 15),  # settled
        # Never settles: until three times 45 seconds have passed for each of two models. A turn is 8 s and at first 10: 33.
        (1.06, 1.0, 33),
        (1.06, 2.0, 21),  # 12 s, and at first 16
    ],
)
def test_noisy_models_are_measured_for_longer_but_not_for_ever(monkeypatch, spread, seconds, turns):
    """On a clock that the models alone move on: a pass that does not count and three that do, or two of 2 seconds."""
    now = [0.0]

    class Takes(nn.Module):
        def forward(self, x):
            now[0] += seconds
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "spread_of", lambda *_: spread)
    found = compare_latency({"a": Takes(), "b": Takes()}, X, batch_sizes=(1,), min_run_time=45.0)
    per_turn = {1.0: 3, 2.0: 2}[seconds]
    assert found.models["a"][1].blocks == found.models["b"][1].blocks == turns * per_turn
    assert found.ratio("b", 1) == 1.0


def test_ratios_are_those_of_the_times_beside_them_whatever_the_machine_does(monkeypatch):
    """Turns of another number of blocks each."""
    now, factors = [0.0], random.Random(0)

    class Takes(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            now[0] += self.seconds * factors.uniform(1, 10)
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = compare_latency({"dense": Takes(2.0), "small": Takes(1.0)}, X, batch_sizes=(1,), min_run_time=300.0)
    ratio = found.models["dense"][1].median / found.models["small"][1].median
    assert found.ratio("small", 1) == pytest.approx(ratio)
    speed = found.speed("small", 1)
    assert speed.low <= speed.ratio <= speed.high


def test_a_machine_that_is_disturbed_now_and_then_gives_the_undisturbed_ratio(monkeypatch):
    """Every third pass takes ten times as long: medians of turns would name anything from 0.2 to 20."""
    now = [0.0]

    class Takes(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.calls = seconds, 0

        def forward(self, x):
            self.calls += 1
            now[0] += self.seconds * (10 if self.calls % 3 == 0 else 1)
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = compare_latency({"dense": Takes(2.0), "small": Takes(1.0)}, X, batch_sizes=(1,), min_run_time=1.0)
    assert found.speed("small", 1) == (2.0, 2.0, 2.0)
    assert found.models["dense"][1].median == 2.0 and found.models["small"][1].median == 1.0
