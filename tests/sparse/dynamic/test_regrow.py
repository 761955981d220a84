"""Masks that start at random: counts, moves, what is cleared with them, and runs that end, refuse or go on."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Fit, Loop, Participant
from fasterai.core.types import Move
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import Falling

KINDS = (RigL, SET, StaticSparse)
X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4


def net(a: int = 4, b: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3), nn.Flatten(), nn.Linear(b * 4, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X, y: Tensor = Y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def made(kind: Any, model: nn.Module, sparsity: Any = 0.8, **options: Any) -> Any:
    return kind(model, sparsity, **options) if kind is StaticSparse else kind(model, sparsity, **{"dt": 2, **options})


# --- counts ------------------------------------------------------------------------------------------------------------------


def erk(shapes: list[tuple[int, ...]], density: float) -> Any:
    """Return the real-valued densities of ERK: those above 1 are set to 1, and the scale is solved anew (RigL's loop)."""
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    raw = np.array([sum(shape) / math.prod(shape) for shape in shapes])
    dense = np.zeros(len(shapes), bool)
    while True:
        scale = (density * sizes.sum() - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
        found = np.where(dense, 1.0, scale * raw)
        if not (found > 1).any():
            return found
        dense |= found > 1


def test_erk_solves_again_where_a_layer_is_full():
    """Of 348 weights 187.92 stay, as 11 : 16 : 28. The first layer takes 37.6 of 36; without it the last takes 96.7 of 96."""
    found = erk([(4, 1, 3, 3), (6, 4, 3, 3), (4, 24)], 0.54)
    assert found.tolist() == [1.0, pytest.approx((187.92 - 36 - 96) / 216), 1.0]
    model = net()
    with attach(sgd(model), run := StaticSparse(model, 0.46), total_steps=4) as handle:
        assert [int(mask.sum()) for mask in run.masks.values()] == [36, 56, 96]
        handle.remove(completed=False)


@pytest.mark.filterwarnings("ignore:rule DropAndGrow.* brought no pruned unit back")  # a tenth of four weights is none
@settings(max_examples=8, deadline=None)
@given(
    a=st.integers(1, 9),
    b=st.integers(1, 9),
    sparsity=st.floats(0.3, 0.9),
    alpha=st.floats(0.05, 0.9),
    kind=st.sampled_from((RigL, SET)),
    seed=st.integers(0, 9),
)
def test_counts_are_exact_at_every_move(a, b, sparsity, alpha, kind, seed):
    model = net(a, b)
    run = kind(model, sparsity, alpha=alpha, dt=2, until=0.8, seed=seed)
    optimizer = sgd(model)
    shapes = [tuple(t.parameter.shape) for t in run.targets]
    sizes = [math.prod(shape) for shape in shapes]
    kept = sum(sizes) - round(sparsity * sum(sizes))
    with attach(optimizer, run, total_steps=10):
        first = [int(mask.sum()) for mask in run.masks.values()]
        assert sum(first) == kept
        assert np.abs(np.array(first) - erk(shapes, kept / sum(sizes)) * sizes).max() <= 1.5  # whole numbers, of one sum
        for i in range(1, 11):
            before = run.masks
            step(model, optimizer)
            masks = run.masks
            assert [int(mask.sum()) for mask in masks.values()] == first
            assert all(not bool(t.parameter[~masks[t.name]].any()) for t in run.targets)
            share = alpha / 2 * (1 + math.cos(math.pi * i / 8)) if i % 2 == 0 and i < 8 else 0.0
            grown = [int((masks[name] & ~before[name]).sum()) for name in masks]
            assert grown == [min(round(share * n), size - n) for n, size in zip(first, sizes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_gives_each_layer_its_share_and_a_dict_its_own(kind):
    for sparsity, wanted in ((0.75, [9, 54, 24]), ({"0": 0.25, "4": 0.5}, [27, 216, 48])):
        model = net()
        with attach(sgd(model), run := made(kind, model, sparsity, distribution="uniform"), total_steps=4) as handle:
            assert [int(mask.sum()) for mask in run.masks.values()] == wanted
            handle.remove(completed=False)


# --- the first masks ---------------------------------------------------------------------------------------------------------


def first_masks(kind: Any, **options: Any) -> dict[str, Tensor]:
    model = net()
    run = made(kind, model, **options)
    with attach(sgd(model), run, total_steps=4) as handle:
        masks: dict[str, Tensor] = run.masks
        assert all(not bool(t.parameter[~masks[t.name]].any()) for t in run.targets), "the first forward pass is sparse"
        handle.remove(completed=False)
    return masks


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_first_masks_follow_from_the_seed_alone():
    state = torch.random.get_rng_state()
    masks = first_masks(RigL)
    torch.manual_seed(5)
    assert same(masks, first_masks(SET)) and same(masks, first_masks(StaticSparse))
    assert not same(masks, first_masks(RigL, seed=1))
    torch.random.set_rng_state(state)
    model = net()
    state = torch.random.get_rng_state()
    attach(sgd(model), made(SET, model), total_steps=4).remove(completed=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_zeros_are_taken_for_the_first_masks_and_masks_for_those_of_a_further_run():
    model = net()
    Sparsifier(model, context="erk").sparsify_model(0.8)
    zeros = {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}
    run = made(StaticSparse, model)
    for _ in range(2):
        optimizer = sgd(model)
        with attach(optimizer, run, total_steps=2):
            assert same(run.masks, zeros)
            step(model, optimizer)
            step(model, optimizer)
    more = made(StaticSparse, model, 0.9)
    with attach(sgd(model), more, total_steps=2) as handle:
        assert not any(bool((mask & ~zeros[name]).any()) for name, mask in more.masks.items()), "none came back"
        assert more.sparsity.overall == round(0.9 * 348) / 348
        handle.remove(completed=False)


def test_static_masks_never_move():
    model = net()
    run = StaticSparse(model, 0.8)
    optimizer = sgd(model)
    with attach(optimizer, run, total_steps=12):
        first = run.masks
        for _ in range(12):
            step(model, optimizer)
            assert same(first, run.masks) and run.moves == 1
    assert same(first, {t.name: t.parameter.detach() != 0 for t in run.targets})


# --- one move by hand --------------------------------------------------------------------------------------------------------


def line(weights: list[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


def a_third(position: float) -> float:
    return 1 / 3


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (lambda p: torch.optim.SGD(p, 0.0, momentum=0.9), {"momentum_buffer": [9.0, 99, 9, 1, 0, 3]}),
        (
            lambda p: torch.optim.Adam(p, 0.0, amsgrad=True),
            {
                "exp_avg": [0.9, 9.9, 0.9, 0.1, 0, 0.3],
                "exp_avg_sq": [0.081, 9.801, 0.081, 0.001, 0, 0.009],
                "max_exp_avg_sq": [0.081, 9.801, 0.081, 0.001, 0, 0.009],
            },
        ),
    ],
)
def test_a_move_of_rigl_by_hand(optimizer, kept):
    """Of [5, -1, 2] the -1 goes; of the gradients [1, -7, 3] under the zeros the -7 comes, and not the 99 of what has gone."""
    model = line([5, -1, 2, 0, 0, 0])
    trains = optimizer(model.parameters())
    with attach(trains, RigL(model, 0.5, alpha=a_third, dt=1, until=0.5, distribution="uniform"), total_steps=2):
        model(torch.tensor([[9.0, 99, 9, 1, -7, 3]])).sum().backward()
        trains.step()
        assert model.weight.tolist() == [[5, 0, 2, 0, 0, 0]]
        state = trains.state[model.weight]
        for name, wanted in kept.items():
            assert state[name][0].tolist() == pytest.approx(wanted)
        for group in trains.param_groups:
            group["lr"] = 1.0
        trains.zero_grad()
        model(torch.ones(1, 6)).sum().backward()
        trains.step()
        assert (model.weight != 0).tolist() == [[True, False, True, False, True, False]], "what has grown trains"


def test_what_grows_has_the_largest_gradient_of_all_batches_of_the_step():
    model = line([5, -1, 2, 0, 0, 0])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = RigL(model, 0.5, alpha=a_third, dt=1, until=0.5, distribution="uniform")
    with attach(optimizer, run, total_steps=2) as handle:
        for x in ([0.0, 0, 0, 0, 9, 5], [0.0, 0, 0, 0, -8, 5]):  # 1 and 10 together; the first or the last alone says 9
            model(torch.tensor([x])).sum().backward()
        optimizer.step()
        assert run.masks["weight"].tolist() == [[True, False, True, False, False, True]]
        handle.remove(completed=False)


def test_a_layer_that_a_step_does_not_use_puts_the_move_off():
    model = nn.ModuleList([line([5, -1, 2, 0, 0, 0]), line([5, -1, 2, 0, 0, 0])])  # two experts
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = RigL(model, 0.5, alpha=a_third, dt=1, until=0.9, distribution="uniform")
    first, moved = [[True] * 3 + [False] * 3], [[True, False, True, False, True, False]]
    with attach(optimizer, run, total_steps=3, model=model) as handle:
        for used, expected in (((0,), first), ((0, 1), moved)):
            optimizer.zero_grad()
            sum(model[i](torch.tensor([[0.0, 0, 0, 0, 9, 5]])).sum() for i in used).backward()
            optimizer.step()
            assert all(mask.tolist() == expected for mask in run.masks.values())
        handle.remove(completed=False)


def test_set_draws_anew_at_each_move_and_asks_for_no_gradient():
    model = line([5, -1, 2, 0, 0, 0] * 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = SET(model, 0.5, alpha=lambda position: 0.2, dt=1, until=1.0, distribution="uniform", seed=3)
    grown = []
    with attach(optimizer, run, total_steps=6):
        for _ in range(6):
            before = run.masks["weight"]
            optimizer.step()
            grown.append(tuple((run.masks["weight"] & ~before).nonzero()[:, 1].tolist()))
    assert len(set(grown)) == 6 and {len(one) for one in grown} == {12}


def test_the_share_falls_along_half_a_cosine():
    falling = Falling(0.3, until=0.75)
    for position, share in ((0.0, 0.3), (0.25, 0.225), (0.375, 0.15), (0.5, 0.075), (0.75, 0.0), (1.0, 0.0)):
        assert falling(position) == pytest.approx(share)
    assert Falling(0.3, until=0.0)(0.5) == 0.0


# --- runs that end early, go on, and are copied -----------------------------------------------------------------------------


class Refusing(Participant):
    def on_fit_start(self, fit: Fit) -> None:
        raise ValueError("x must be something else, got this")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_another_participant_refuses_leaves_the_weights_dense(kind):
    model = net()
    before = copy.deepcopy(model.state_dict())
    run = made(kind, model)
    with pytest.raises(ValueError, match="something else"):
        Loop([run, Refusing()]).start(Fit(4, model, sgd(model)))
    assert same(before, model.state_dict()) and run.sparsity.overall == 0.0
    loop = Loop([run])
    loop.start(Fit(4, model, sgd(model)))
    model.load_state_dict(before)  # somebody has loaded others since: these are left alone
    model[0].weight.data += 1
    loop.end(completed=False)
    assert torch.equal(model[0].weight, before["0.weight"] + 1)


def session(kind: Any, options: dict[str, Any], until: int, state: Any = None) -> tuple[nn.Module, Any, Any]:
    """Train up to a step of 12, from a saved state or from the beginning; return the model, the run, and the state."""
    model = net()
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run = kind(model, 0.8, **options)
    handle = attach(optimizer, run, total_steps=12)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["run"])
    for i in range(handle.loop.step, until):
        step(model, optimizer, X[i % 3 :: 2], Y[i % 3 :: 2])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": handle.state_dict()}
    saved = copy.deepcopy(saved)
    handle.remove(completed=until == 12)
    return model, run, saved


@pytest.mark.parametrize(("kind", "options"), [(RigL, {"dt": 2}), (SET, {"dt": 2}), (StaticSparse, {})])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(kind, options):
    whole, run, last = session(kind, options, 12)
    for stops in ((4,), (1, 7)):  # the fourth step moves masks, so that grown weights are zero where it is saved
        state = None
        for until in (*stops, 12):
            model, resumed, state = session(kind, options, until, state)
        assert same(whole.state_dict(), model.state_dict()) and same(run.masks, resumed.masks)
        assert str(state["optimizer"]) == str(last["optimizer"]) and resumed.moves == run.moves


def test_a_copy_goes_on_with_its_own_model():
    model = net()
    run = made(RigL, model)
    optimizer = sgd(model)
    with attach(optimizer, run, total_steps=4):
        for _ in range(4):
            step(model, optimizer)
    other = copy.deepcopy(run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = sgd(other.model)
    with attach(optimizer, other, total_steps=4):
        for _ in range(4):
            step(other.model, optimizer)
    assert same(before, dict(model.named_parameters())) and other.moves > run.moves


# --- settings ----------------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sparsity": 90}, ValueError, r"sparsity must be in \[0, 1\], got 90; pass 0.9 for 90 %"),
    ({"sparsity": "0.9"}, TypeError, r"sparsity must be a number in \[0, 1\], got '0.9'"),
    ({"sparsity": {"0": 0.5}}, ValueError, "sparsity must be one number for distribution 'erk', got a dict; pass .*'uniform'"),
    ({"distribution": "erdos"}, ValueError, "distribution must be one of erk, uniform, got 'erdos'"),
    ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\], got -0.1"),
    ({"alpha": "cosine"}, TypeError, r"alpha must be a number in \[0, 1\], got 'cosine'"),
    ({"dt": 0}, ValueError, "dt must be at least 1, got 0"),
    ({"dt": 2.5}, TypeError, "dt must be a whole number of at least 1, got 2.5"),
    ({"until": 1.5}, ValueError, r"until must be in \[0, 1\], got 1.5"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"targets": "nowhere"}, ValueError, "nowhere"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_bad_settings_are_refused(wrong, kind, message):
    for method in (RigL, SET):
        with pytest.raises(kind, match=message):
            method(net(), **{"sparsity": 0.9, **wrong})


def test_static_masks_take_no_settings_of_moves():
    with pytest.raises(TypeError, match="dt"):
        StaticSparse(net(), 0.9, dt=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="distribution must be one of erk, uniform"):
        StaticSparse(net(), 0.9, distribution="even")


@pytest.mark.filterwarnings("ignore:rule DropAndGrow")  # too few weights for one to be exchanged
@pytest.mark.parametrize("kind", KINDS)
def test_a_further_run_that_is_refused_leaves_the_masks(kind):
    model = net()
    run = made(kind, model)
    with attach(optimizer := sgd(model), run, total_steps=3):
        for _ in range(3):
            step(model, optimizer)
    before, masks = copy.deepcopy(model.state_dict()), run.masks
    with pytest.raises(ValueError, match="something else"):
        Loop([run, Refusing()]).start(Fit(4, model, optimizer))
    assert same(before, model.state_dict()) and same(masks, run.masks) and run.sparsity.overall > 0


def test_masks_that_another_one_moves_leave_the_optimizer_s_state():
    model = net()
    run, optimizer = made(RigL, model), sgd(model)
    with attach(optimizer, run, total_steps=2) as handle:
        step(model, optimizer)
        name, weight = run.targets[0].name, run.targets[0].parameter
        momentum = optimizer.state[weight]["momentum_buffer"].clone()
        all_back = torch.ones_like(weight, dtype=torch.bool)
        run.after_move(Move({name: ~all_back}, {name: all_back}))
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum) and bool(momentum.any())
        handle.remove(completed=False)


@pytest.mark.parametrize(("steps", "is_short"), [(13, True), (30, False)])  # 0.75 of 13 is 9.75
def test_a_run_that_is_too_short_for_a_move_says_so_once(steps, is_short, recwarn):
    model = net()
    run, optimizer = RigL(model, 0.5, dt=10), sgd(model)
    with attach(optimizer, run, total_steps=steps, model=model):
        for _ in range(steps):
            step(model, optimizer)
    said = [str(w.message) for w in recwarn if "moves in this run" in str(w.message) or "brought no" in str(w.message)]
    assert len(said) == is_short
    assert not said or said[0].startswith(
        "no weight of RigL moves in this run: dt is 10 steps, and masks move up to step 9 of 13"
    )


def test_a_short_run_of_frozen_layers_says_that_nothing_was_pruned(recwarn):
    model = net()
    run, trained = RigL(model, 0.5, dt=100), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), trained], 0.1)
    model.requires_grad_(False)
    with attach(optimizer, run, total_steps=1, model=model):
        trained.sum().backward()
        optimizer.step()
    assert any("nothing was pruned in this run: every target was frozen" in str(w.message) for w in recwarn)
