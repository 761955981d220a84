"""Figures of the dense and the small model: right, side by side, and without a trace."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune import measure
from fasterai.prune.measure import measured
from fasterai.prune.removal import remove
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import make_plan

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).train()
    with torch.no_grad():
        model[3].weight[:, 2] = 0
    return model


def operated(model: nn.Module) -> Surgery:
    return Surgery(model, make_plan(model, channel_graph(model, (X,)), [np.arange(8) != 2]))


def test_both_are_counted_and_timed() -> None:
    model = net()
    found = measured(model, operated(model), (X,), "4x5")
    assert found.why_not == ""
    assert found.comparison is not None
    dense, small = found.comparison.costs["dense"], found.comparison.costs["small"]
    assert (dense.parameters, small.parameters) == (5 * 8 + 8 + 8 * 3 + 3, 5 * 7 + 7 + 7 * 3 + 3)
    assert (dense.nonzero, small.nonzero) == (75 - 3, 66)
    assert (dense.macs, small.macs) == (4 * (5 * 8 + 8 * 3), 4 * (5 * 7 + 7 * 3))
    latency = found.comparison.latency
    assert latency is not None
    assert 5 <= latency.models["dense"].timings[0].blocks == latency.models["small"].timings[0].blocks
    assert latency.models["small"].threads == torch.get_num_threads()
    assert latency.models["small"].device == "cpu"


def test_the_model_ends_small_and_nothing_else_has_changed() -> None:
    model = net()
    model[0].eval()
    model(X).sum().backward()
    surgery = operated(model)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    identities, hooks = [id(p) for p in model.parameters()], [dict(m._forward_hooks) for m in model.modules()]
    generator = torch.get_rng_state()
    measured(model, surgery, (X,), "")
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [id(p) for p in model.parameters()] == identities
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert [m.training for m in model] == [False, True, True, True]


class Slow(nn.Module):
    """Takes time by its width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004 * len(self.a.weight))
        return self.b(self.a(x).relu())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves on."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    return now


@pytest.mark.usefixtures("clock")
def test_the_times_are_those_of_the_two_models() -> None:
    model = Slow()
    surgery = Surgery(model, make_plan(model, channel_graph(model, (X,)), [np.arange(8) < 2]))
    found = measured(model, surgery, (X,), "")
    assert found.comparison is not None
    latency = found.comparison.latency
    assert latency is not None
    assert latency.speed("small", None) == pytest.approx((4.0, 4.0, 4.0))
    assert latency.models["dense"].timings[0].median == pytest.approx(0.032)
    assert latency.models["dense"].timings[0].blocks == 5
    for name, seconds in (("dense", 0.032), ("small", 0.008)):
        own = latency.models[name].timings[0].layers[""]
        assert own.median == pytest.approx(seconds)
        assert own.passes == 3
    layers = found.comparison.layers()
    assert [row.name for row in layers.rows] == ["a", "b"]
    assert all(t is not None and t.median == 0.0 for row in layers.rows for ts in row.timings.values() for t in ts)


def test_a_disturbed_machine_is_measured_for_longer(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take now the one, now ten times the time, without an order: the fastest of each hand name the speed."""
    model, factors = Slow(), random.Random(3)
    surgery = Surgery(model, make_plan(model, channel_graph(model, (X,)), [np.arange(8) < 2]))

    def sleep(seconds: float) -> None:
        clock[0] += 0.1 * seconds * factors.choice((1, 1, 10))

    monkeypatch.setattr(time, "sleep", sleep)
    found = measured(model, surgery, (X,), "")
    assert found.comparison is not None and found.comparison.latency is not None
    assert found.comparison.latency.speed("small", None) == pytest.approx((4.0, 4.0, 4.0))
    assert found.comparison.latency.models["small"].timings[0].blocks > 5


def test_the_ratio_is_that_of_the_times_beside_it_on_a_busy_machine(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass takes another time, up to ten times as long: hand by hand the ratio is another one than that of the medians."""
    model, factors = Slow(), random.Random(1)
    surgery = Surgery(model, make_plan(model, channel_graph(model, (X,)), [np.arange(8) < 2]))

    def sleep(seconds: float) -> None:
        clock[0] += 5 * seconds * factors.uniform(1, 10)

    monkeypatch.setattr(time, "sleep", sleep)
    found = measured(model, surgery, (X,), "")
    assert found.comparison is not None and found.comparison.latency is not None
    latency = found.comparison.latency
    dense, small = (latency.models[name].timings[0].median for name in ("dense", "small"))
    speed = latency.speed("small", None)
    assert speed.ratio == pytest.approx(dense / small)
    assert speed.low <= speed.ratio <= speed.high


@pytest.mark.parametrize(
    ("dense", "seconds", "is_enough"),
    [
        ([1.0] * 4, 9.0, False),  # five turns at least
        ([1.0] * 5, 0.0, True),  # settled
        ([1.0, 1.0, 1.02, 1.02, 1.03], 0.0, True),  # the middle half by 2 %
        ([1.0, 1.0, 1.05, 1.05, 1.1], 0.19, False),
        ([1.0, 1.0, 1.05, 1.05, 1.1], 0.2, True),  # 5 % will do by then
        ([1.0, 2.0, 1.0, 2.0, 1.0], 1.4, False),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 1.5, True),  # the time is up
        ([1.0, 2.0] * 5, 0.1, True),  # of each hand of two turns the faster: 1 and 1, 2 and 1, ...
        ([1.0, 2.0, 1.0, 2.0, 1.0] * 3, 0.1, False),  # two hands have slow turns only
    ],
)
def test_when_there_are_enough_turns(dense: list[float], seconds: float, is_enough: bool) -> None:
    assert measure._is_enough({"dense": dense, "small": [1.0] * len(dense)}, seconds) == is_enough


def test_a_small_net_takes_little_time() -> None:
    model = net()
    surgery = operated(model)
    measured(model, surgery, (X,), "")
    start = time.process_time()
    measured(model, surgery, (X,), "")
    assert time.process_time() - start < 1.0  # 0.1 s on an idle machine


def test_a_removal_that_went_well_does_not_fail_for_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no counter")

    monkeypatch.setattr(measure, "cost", fail)
    model = net()
    removal = remove(model, X)
    assert removal.removed == {"0.weight": (8, 7)}
    assert model[0].out_features == 7
    assert removal.comparison is None
    assert "not measured: RuntimeError: no counter" in str(removal)


def test_nothing_is_measured_where_it_was_not_asked_for_or_nothing_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasterai.prune.removal.measured", lambda *_: pytest.fail("measured"))
    assert "not measured: measure=False was given" in str(remove(net(), X, measure=False))
    whole = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    assert "measured" not in str(remove(whole, X))
