from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

from fasterai.analyze import layer_times as subject
from fasterai.analyze.layer_times import LayerTiming, layer_times, layer_timings
from tests.networks import Failing

NOW = [0.0]


class Takes(nn.Module):
    """Takes seconds of a clock that stands still otherwise, before and after its submodules."""

    def __init__(self, seconds, **inner):
        super().__init__()
        self.seconds = seconds
        for name, module in inner.items():
            setattr(self, name, module)

    def forward(self, x):
        NOW[0] += self.seconds
        for module in self.children():
            x = module(x)
        NOW[0] += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(subject, "_clock", lambda _: (lambda: NOW[0], lambda start, end: end - start))


@pytest.mark.usefixtures("clock")
def test_each_module_has_its_own_time():
    twice = Takes(8)
    model = Takes(1, a=Takes(2, inner=Takes(4)), b=nn.Sequential(twice, nn.Identity(), twice))
    model.unused = None
    found = layer_times(model, (torch.zeros(1),))
    assert found == {"": 2, "a": 4, "a.inner": 8, "b": 0, "b.0": 32, "b.1": 0}


@pytest.mark.usefixtures("clock")
def test_modules_that_are_not_registered_belong_to_their_caller():
    model = Takes(1)
    model.forward = Takes(3).__call__
    assert layer_times(model, (torch.zeros(1),)) == {"": 6}


def test_on_a_cpu_seconds_pass():
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU()), torch.zeros(64, 512)
    passes = [layer_times(model, (x,)) for _ in range(7)]  # others may stop any one of them
    assert all(set(found) == {"", "0", "1"} for found in passes)
    assert 0 < min(found["1"] for found in passes) < min(found["0"] for found in passes) < 1


def test_compiled_models_do_not_run_layer_by_layer():
    whole, part = torch.compile(nn.Linear(2, 2), backend="eager"), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part[0].compile(backend="eager")
    assert layer_times(whole, (torch.zeros(1, 2),)) == {}
    assert layer_times(part, (torch.zeros(1, 2),)) == {}


def test_wrapped_models_have_the_names_of_their_own():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
    assert set(layer_times(model, (torch.zeros(1, 2),))) == {"", "0"}


def test_no_hook_is_left():
    model = nn.Sequential(nn.Linear(2, 2), Failing())
    with pytest.raises(RuntimeError, match="not today"):
        layer_times(model, (torch.zeros(1, 2),))
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Event:
    """A mark on a stream, at the moment in which it was recorded, in ms."""

    log: ClassVar[list[str]] = []

    def __init__(self, device, enable_timing):
        assert (device.type, enable_timing) == ("cuda", True)

    def record(self, stream):
        assert stream == "the stream"
        self.log.append("mark")
        self.time = 1e3 * NOW[0]

    def elapsed_time(self, end):
        self.log.append("read")
        return end.time - self.time


def test_on_accelerators_nothing_waits_inside_the_pass(monkeypatch):
    Event.log.clear()
    monkeypatch.setattr(subject, "device_of", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(subject, "wait_for", lambda _: Event.log.append("wait"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: "the stream")
    monkeypatch.setattr(torch, "Event", Event)
    assert layer_times(Takes(1, inner=Takes(2)), (torch.zeros(1),)) == {"": 2, "inner": 4}
    assert Event.log == ["wait", *["mark"] * 4, "wait", *["read"] * 3]


def test_medians_and_spreads_over_the_passes():
    passes = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 9.0}]
    assert layer_timings(passes) == {"a": LayerTiming(2.0, 4.0, 3), "b": LayerTiming(1.0, 0.5, 3)}
