"""AC/DC: the phases, what stays in each, and what comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.schedules import Alternating, alternating
from fasterai.sparse.dynamic.acdc import ACDC

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4
SHORT = Alternating(dense=0.2, compressed=0.2, decompressed=0.2, last=0.6, final=0.8)  # of 10 steps: 2-4 and 8-10 sparse


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])


def test_phases_follow_the_schedule_and_keep_the_largest_of_all_layers():
    model = net()
    run = ACDC(model, 0.75, schedule=SHORT)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    reached, chosen = [], []

    with attach(optimizer, run, total_steps=10) as handle:
        loop_step = handle.loop.after_step

        def looking() -> None:
            seen = weights(model).abs()
            loop_step()
            if run.moves > len(chosen):
                chosen.append((seen, torch.cat([m.flatten() for m in run.masks.values()])))

        handle.loop.after_step = looking  # type: ignore[method-assign]
        for _ in range(10):
            step(model, optimizer)
            reached.append(run.sparsity.overall)
    assert reached == [0.0, 0.75, 0.75, 0.0, 0.0, 0.0, 0.0, 0.75, 0.75, 0.75]  # after each step: at 0.2 a phase begins
    for seen, mask in (chosen[0], chosen[2]):
        wanted = torch.zeros_like(mask).scatter(0, seen.topk(48).indices, True)
        assert torch.equal(mask, wanted)
    assert bool(chosen[1][1].all()) and not torch.equal(chosen[0][1], chosen[2][1])


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.01)])
def test_what_comes_back_starts_at_zero_and_the_optimizer_has_forgotten_it(make):
    model = net()
    run = ACDC(model, 0.75, schedule=SHORT)
    optimizer = make(model.parameters())
    with attach(optimizer, run, total_steps=10) as handle:
        for _ in range(3):
            step(model, optimizer)
        masks = run.masks
        step(model, optimizer)  # position 0.4
        assert run.sparsity.overall == 0.0
        for target in run.targets:
            gone = ~masks[target.name]
            kept = [x for x in optimizer.state[target.parameter].values() if x.shape == gone.shape]
            assert kept and not any(bool(x[gone].any()) for x in [*kept, target.parameter.detach()])
            assert all(bool(x[~gone].any()) for x in [*kept, target.parameter.detach()])
        step(model, optimizer)
        assert all(bool(t.parameter[~masks[t.name]].any()) for t in run.targets), "it trains"
        handle.remove(completed=False)


def test_many_short_phases_are_all_followed():
    phases = Alternating(dense=0.1, compressed=0.005, decompressed=0.005, last=0.75, final=0.85)
    model = net()
    run = ACDC(model, 0.75, schedule=phases)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with attach(optimizer, run, total_steps=200):
        for i in range(1, 201):
            optimizer.step()
            assert run.sparsity.overall == 0.75 * phases(i / 200)
    assert run.moves == 131  # 65 % in pairs of half a percent each, and the last


def session(until: int, state: Any = None) -> tuple[nn.Module, Any]:
    model = net()
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    handle = attach(optimizer, ACDC(model, 0.75, schedule=SHORT), total_steps=10)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["run"])
    for _ in range(handle.loop.step, until):
        step(model, optimizer)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": handle.state_dict()}
    saved = copy.deepcopy(saved)
    handle.remove(completed=until == 10)
    return model, saved


def test_a_resumed_run_is_the_whole_one_bit_for_bit():
    whole, last = session(10)
    state = None
    for until in (2, 4, 7, 10):  # at the beginning of a sparse phase, of a dense one, and inside
        model, state = session(until, state)
    assert torch.equal(weights(whole), weights(model)) and str(last["optimizer"]) == str(state["optimizer"])


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sparsity": 1.2}, ValueError, r"sparsity must be in \[0, 1\], got 1.2"),
    ({"sparsity": None}, TypeError, r"sparsity must be a number in \[0, 1\], got None"),
    ({"context": "everywhere"}, ValueError, "context must be one of .*, got 'everywhere'"),
    ({"schedule": "phases"}, ValueError, "schedule must be one of .*alternating.*, got 'phases'"),
    ({"schedule": Alternating}, TypeError, r"schedule must be a schedule, got the class Alternating"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_bad_settings_are_refused(wrong, kind, message):
    with pytest.raises(kind, match=message):
        ACDC(net(), **{"sparsity": 0.9, **wrong})


def test_the_default_phases_are_those_of_the_published_100_epochs():
    sparse = [epoch for epoch in range(100) if alternating(epoch / 100) == 1]
    pairs = [*range(10, 75, 10)]
    assert sparse == [e for start in pairs for e in range(start, start + 5)] + [*range(85, 100)]
    assert ACDC(net(), 0.9).schedule is alternating
