"""STR: one step by autograd, the sparsity that comes of it, resuming and bad settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.sparse.dynamic.thresholds import STR
from fasterai.sparse.sparsifier import Sparsifier

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def shown(w: Tensor, s: Tensor) -> Tensor:
    return w.sign() * (w.abs() - s.sigmoid()).relu()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Any = None) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    if clip is not None:
        clip()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "clips"),
    [
        (lambda p: torch.optim.SGD(p, **SGD), False),
        (lambda p: torch.optim.SGD(p, **SGD), True),
        (lambda p: torch.optim.AdamW(p, 0.01), False),
    ],
)
def test_training_is_that_of_autograd_through_the_formula(make, clips):
    model, other = net(), net()
    run = STR(model, s_init=-2.5, decay=0.02)
    names = ["0.weight", "2.weight"]
    latent = dict(other.named_parameters())
    s = {n: nn.Parameter(torch.tensor(-2.5)) for n in names}
    optimizer = make(model.parameters())
    reference = make([*other.parameters(), *s.values()])
    with attach(optimizer, run, total_steps=5) as handle:
        for _ in range(5):
            values = {n: shown(w, s[n]) if n in s else w for n, w in latent.items()}
            now = dict(model.named_parameters())
            assert all(torch.equal(values[n], now[n]) for n in values), "a forward pass meets what is shown"
            reference.zero_grad()
            (F.cross_entropy(torch.func.functional_call(other, values, (X,)), Y)).backward()
            for one in s.values():
                one.grad += 0.02 * one.detach()

            def clip() -> None:
                handle.after_backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)

            if clips:
                nn.utils.clip_grad_norm_(other.parameters(), 0.05)
            reference.step()
            step(model, optimizer, clip if clips else None)
        for n in names:
            torch.testing.assert_close(run.latent[n], latent[n].detach())
            torch.testing.assert_close(run.thresholds[n], s[n].sigmoid().item())
    assert 0 < run.sparsity.overall < 1 and len(optimizer.param_groups[0]["params"]) == 4, "s has left the optimizer"
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_decay_drives_the_sparsity_which_is_counted_from_the_weights():
    reached = []
    for decay in (0.0, 0.05, 0.2):
        model = net()
        run = STR(model, s_init=-4.0, decay=decay, targets="0")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with attach(optimizer, run, total_steps=30) as handle:
            for _ in range(30):
                step(model, optimizer)
            zeros = int((model[0].weight == 0).sum()) / model[0].weight.numel()
            assert handle.metrics() == {"sparsity": zeros} == {"sparsity": run.sparsity["0.weight"]}
        reached.append(zeros)
    assert reached[0] < reached[1] < reached[2]
    assert not bool((model[2].weight == 0).any())
    held = Sparsifier(model, targets="0")
    held.mask_zeros()
    assert held.sparsity.overall == reached[2]


@pytest.mark.parametrize("decays", ["first", "last"])
def test_s_has_the_weight_decay_of_the_last_group(decays):
    """One step of a rate of 0.5 at a decay of 0.2: without gradients of its own s would go from -4 to -3.6."""
    model = net()
    groups = [{"params": [p for n, p in model.named_parameters() if n.endswith(end)]} for end in ("weight", "bias")]
    groups[("first", "last").index(decays)]["weight_decay"] = 0.2
    optimizer = torch.optim.SGD(groups, 0.5)
    run = STR(model, s_init=-4.0)
    with attach(optimizer, run, total_steps=1):
        step(model, optimizer)
    s = torch.tensor([run.thresholds[n] for n in ("0.weight", "2.weight")]).logit()
    assert bool(((s + (4.0 if decays == "first" else 3.6)).abs() < 0.02).all())


def test_frozen_layers_stay_as_they_are_until_they_train_and_named_ones_do_not():
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    run = STR(model, s_init=-2.5)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    with attach(optimizer, run, total_steps=3):
        step(model, optimizer)
        assert torch.equal(model[0].weight, before) and bool((model[2].weight == 0).any())
        model[0].weight.requires_grad_(True)
        step(model, optimizer)
        assert bool((model[0].weight == 0).any())
        model[0].weight.requires_grad_(False)
        sparse = model[0].weight.clone()
        step(model, optimizer)
        assert torch.equal(model[0].weight, sparse)
    other = net()
    other[0].weight.requires_grad_(False)
    later = STR(other, s_init=-2.5)
    later.load_state_dict(run.state_dict())
    assert torch.equal(other[0].weight, sparse)
    named = net()
    named[0].weight.requires_grad_(False)
    run = STR(named, s_init=-2.5, targets=["0", "2"])
    with attach(torch.optim.SGD(named.parameters(), 0.1), run, total_steps=1) as handle:
        assert bool((named[0].weight == 0).any())
        handle.remove(completed=False)


def session(until: int, state: Any = None) -> tuple[nn.Module, STR, Any]:
    model = net()
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    run = STR(model, s_init=-2.5, decay=0.02)
    handle = attach(optimizer, run, total_steps=8)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["run"])
    for _ in range(handle.loop.step, until):
        step(model, optimizer)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": handle.state_dict()}
    saved = copy.deepcopy(saved)
    handle.remove(completed=until == 8)
    return model, run, saved


def test_a_resumed_run_is_the_whole_one_bit_for_bit():
    whole, run, last = session(8)
    state = None
    for until in (3, 4, 8):
        model, resumed, state = session(until, state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(run.latent[n], resumed.latent[n]) for n in run.latent) and run.thresholds == resumed.thresholds
    assert str(last["run"]["joined"]) == str(state["run"]["joined"]), "with the momentum of s"


def test_a_state_of_another_network_is_refused_and_changes_nothing():
    _, run, state = session(3)
    own = copy.deepcopy(state["run"]["participants"]["STR"])
    before = run.state_dict()
    cases = (
        ({"latent": own["latent"]}, "without s"),
        ({**own, "s": {"0.weight": own["s"]["0.weight"]}}, "another set of targets: 2.weight"),
        (
            {**own, "s": {n: x + 1 for n, x in own["s"].items()}, "latent": {**own["latent"], "0.weight": torch.zeros(3)}},
            "of shape",
        ),
    )
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"state must .*{message}"):
            run.load_state_dict(wrong)
        assert str(run.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"s_init": 0.0}, ValueError, "s_init must be below 0, got 0.0"),
        ({"s_init": "low"}, TypeError, "s_init must be a number, got 'low'"),
        ({"s_init": float("-inf")}, ValueError, "s_init must be a number, got -inf"),
        ({"decay": -1e-3}, ValueError, "decay must be a number of at least 0, got -0.001"),
        ({"targets": "nowhere"}, ValueError, "nowhere"),
    ],
)
def test_bad_settings_are_refused(wrong, kind, message):
    with pytest.raises(kind, match=message):
        STR(net(), **wrong)
    with pytest.raises(TypeError, match="model must be"):
        STR("net")  # type: ignore[arg-type]
