"""Rules in a training: SR-STE-like and RigL-like runs go through the sparsifier."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.criteria import Criterion
from fasterai.core.loop import Fit, Loop, Participant
from fasterai.core.schedules import OneShot
from fasterai.model.cuts import follow
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow, Free, free
from tests.messages import heard

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 4
AT_ONCE = OneShot(0.0)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Dense(Participant):
    """SR-STE (Zhou et al. 2021): dense weights behind the masked ones; goes before the sparsifier."""

    def __init__(self, sparsifier, decay=2e-4):
        self.sparsifier, self.decay, self.dense = sparsifier, decay, {}

    def on_fit_start(self, fit):
        self.dense = {t.name: t.parameter.detach().clone() for t in self.sparsifier.targets}

    @torch.no_grad()
    def before_step(self, position):
        for target in self.sparsifier.targets:
            dense = self.dense[target.name]
            target.parameter.grad += self.decay * ~self.sparsifier.masks[target.name] * dense
            target.parameter.copy_(dense)

    def after_step(self, position):
        self.dense = {t.name: t.parameter.detach().clone() for t in self.sparsifier.targets}

    def state_dict(self):
        return dict(self.dense)

    def load_state_dict(self, state):
        self.dense = dict(state)


class Listener:
    """Notes the moves of a model."""

    def __init__(self, model):
        self.moves = []
        follow(model, self)

    def after_move(self, move):
        self.moves.append(move)


def train(model, loop, optimizer, first, last, total, after=lambda: None):
    """Steps `first` to `last`, counted from 0."""
    for _ in range(first, last):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
        after()
    if last == total:
        loop.end(completed=True)


def sr_ste(model):
    sparsifier = Sparsifier(model, "weight", "two_four", "large_final", sparsity=0.5, schedule=AT_ONCE, rule="free")
    return sparsifier, Loop([Dense(sparsifier), sparsifier])


def rig_l(model, **options):
    rule = DropAndGrow(every=3, until=0.8, fraction=0.3, **options)
    sparsifier = Sparsifier(model, "weight", "erk", "large_final", sparsity=0.5, schedule=AT_ONCE, rule=rule)
    return sparsifier, Loop([sparsifier])


def start(model, loop, total, rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    loop.start(Fit(total, model, optimizer))
    return optimizer


def is_two_four(mask):
    return bool((mask.view(mask.shape[0], -1, 4).sum(2) == 2).all())


def test_an_sr_ste_run_stays_two_four_while_its_masks_move():
    model = net()
    sparsifier, loop = sr_ste(model)
    heard = Listener(model)
    optimizer = start(model, loop, 20)
    seen = []

    def after():
        masks = sparsifier.masks
        assert all(is_two_four(m) for m in masks.values())
        for t in sparsifier.targets:
            assert torch.equal(t.parameter, t.parameter * masks[t.name])
        seen.append(torch.cat([m.flatten() for m in masks.values()]))

    train(model, loop, optimizer, 0, 20, 20, after)
    differences = [int((a != b).sum()) for a, b in itertools.pairwise(seen)]
    moved = sum(d > 0 for d in differences)
    assert moved > 5
    assert sparsifier.moves == len(heard.moves) == 1 + moved, "the first move is from dense to half"
    assert sparsifier.sparsity.overall == 0.5


def test_sr_ste_masks_are_those_of_the_dense_weights():
    model = net()
    sparsifier, loop = sr_ste(model)
    optimizer = start(model, loop, 8)

    def after():
        for name, dense in loop.participants[0].dense.items():
            quads = dense.abs().view(len(dense), -1, 4)
            wanted = torch.zeros_like(quads, dtype=torch.bool).scatter_(2, quads.topk(2, dim=2).indices, True)
            assert torch.equal(sparsifier.masks[name], wanted.view_as(dense))

    train(model, loop, optimizer, 0, 8, 8, after)


def test_a_rigl_run_exchanges_weights_at_constant_counts():
    model = net()
    sparsifier, loop = rig_l(model)
    heard = Listener(model)
    optimizer = start(model, loop, 20)
    counts, moves = set(), []

    def after():
        counts.add(tuple(r.pruned for r in sparsifier.report().rows))
        moves.append(sparsifier.moves)

    train(model, loop, optimizer, 0, 20, 20, after)
    assert len(counts) == 1
    assert sum(counts.pop()) == round(0.5 * (128 + 64))
    # Steps 1, then 3, 6, 9, 12 and 15 of 20; 18 lies behind 0.8.
    assert moves == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6]
    for move in heard.moves[1:]:
        for name, after_it in move.after.items():
            kept = int(after_it.sum())
            assert int((move.before[name] & ~after_it).sum()) == round(0.3 * kept)
            assert int((~move.before[name] & after_it).sum()) == round(0.3 * kept)


def test_what_grows_has_the_largest_gradients_and_starts_at_zero():
    model = net()
    sparsifier, loop = rig_l(model)
    heard = Listener(model)
    optimizer = start(model, loop, 20)
    gradients = {}

    def after():
        if len(heard.moves) == 2 and not gradients:
            gradients.update({t.name: t.parameter.grad.abs() for t in sparsifier.targets})
            for t in sparsifier.targets:
                grown = ~heard.moves[1].before[t.name] & heard.moves[1].after[t.name]
                assert grown.any()
                assert not t.parameter[grown].any()

    train(model, loop, optimizer, 0, 3, 20, after)
    for name, gradient in gradients.items():
        pruned = ~heard.moves[1].before[name]
        grown = pruned & heard.moves[1].after[name]
        assert gradient[grown].min() > gradient[pruned & ~grown].max()


def test_a_set_run_draws_anew_at_each_move():
    model = net()
    _, loop = rig_l(model, grow="random")
    heard = Listener(model)
    train(model, loop, start(model, loop, 20), 0, 20, 20)
    grown = [~m.before["0.weight"] & m.after["0.weight"] for m in heard.moves[1:]]
    assert len(grown) == 5
    assert not any(torch.equal(a, b) for i, a in enumerate(grown) for b in grown[:i])


@pytest.mark.parametrize("make", [sr_ste, rig_l, lambda model: rig_l(model, grow="random")], ids=["sr-ste", "rigl", "set"])
@pytest.mark.parametrize("stop", [1, 3, 10, 11])
def test_a_run_that_stops_and_goes_on_is_one_run_bit_for_bit(make, stop):
    whole = net()
    sparsifier, loop = make(whole)
    train(whole, loop, start(whole, loop, 20), 0, 20, 20)

    first = net()
    _, loop = make(first)
    optimizer = start(first, loop, 20)
    train(first, loop, optimizer, 0, stop, 20)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), loop.state_dict()))
    second = net()
    resumed, loop = make(second)
    optimizer = start(second, loop, 20)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    loop.load_state_dict(saved[2])
    train(second, loop, optimizer, stop, 20, 20)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(torch.equal(m, resumed.masks[n]) for n, m in sparsifier.masks.items())


def test_masks_stay_after_the_end_of_a_rule():
    def moves_of(rule):
        model = net()
        sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule=AT_ONCE, rule=rule)
        moves = []
        optimizer = torch.optim.SGD(model.parameters(), 5.0)
        with attach(optimizer, sparsifier, total_steps=10):
            for _ in range(10):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                optimizer.step()
                moves.append(sparsifier.moves)
        assert sparsifier.moves == moves[-1], "the end of the run moves nothing more"
        return moves

    moves = moves_of(Free(until=0.5))
    assert moves[4] > 1
    assert moves[4:] == [moves[4]] * 6
    assert moves_of(free)[9] > moves[4]


def test_free_returns_a_pruned_weight_with_the_optimizers_value():
    model = nn.Linear(2, 1, bias=False)
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule=AT_ONCE, targets="weight", rule=free)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
    with attach(optimizer, sparsifier, total_steps=2):
        model.weight.grad = torch.zeros(1, 2)
        optimizer.step()
        assert model.weight.tolist() == [[2.0, 0.0]]
        model.weight.grad = torch.tensor([[1.0, -3.0]])  # a step to 1 and to 3
        optimizer.step()
    assert model.weight.tolist() == [[0.0, 3.0]]
    assert sparsifier.moves == 2


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_filters_are_exchanged_and_their_norms_come_back(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    x = torch.randn(4, 1, 8, 8)
    rule = DropAndGrow(every=1, until=0.9, fraction=0.5, grow="random")
    sparsifier = Sparsifier(
        model, granularity, sparsity=0.5, schedule=AT_ONCE, example_inputs=x, rule=rule, round_to=1, targets="0"
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = None
    with attach(optimizer, sparsifier, total_steps=4):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            silent = ~sparsifier.masks["0.weight"].flatten(1).any(1)
            assert int(silent.sum()) == 4
            assert not model[1].weight[silent].any()
            assert model[1].weight[~silent].all(), "a scale of zero would never learn again"
            assert before is None or not torch.equal(silent, before)
            before = silent


def test_a_criterion_for_growth_is_gathered_with_the_sparsifiers_data():
    def flat(e):
        return e.initial.abs() + 0 * e.weight

    model = net()
    rule = DropAndGrow(every=1, fraction=0.5, grow=Criterion(flat, needs={"initial"}))
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule=AT_ONCE, rule=rule)
    assert set(sparsifier.state_dict()["initial"]) == {"0.weight", "2.weight"}
    heard = Listener(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    initial = model[0].weight.detach().abs().clone()
    with attach(optimizer, sparsifier, total_steps=10):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    before, after = heard.moves[1].before["0.weight"], heard.moves[1].after["0.weight"]
    grown = ~before & after
    assert initial[grown].min() > initial[~before & ~after].max()


def test_a_rule_is_checked():
    with pytest.raises(TypeError, match="rule must be a rule or its name, got 3"):
        Sparsifier(net(), rule=3)
    with pytest.raises(ValueError, match="rule must be one of free, nested, got 'fre'; did you mean 'free'"):
        Sparsifier(net(), rule="fre")
    with pytest.raises(ValueError, match="rule must be nested or free for N:M"):
        Sparsifier(net(), context="two_four", rule=DropAndGrow())


def test_a_cosine_may_anneal_the_exchanged_fraction():
    model = net()
    rule = DropAndGrow(every=1, until=0.8, fraction=lambda p: 0.3 / 2 * (1 + math.cos(math.pi * p / 0.8)))
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule=AT_ONCE, rule=rule)
    heard = Listener(model)
    loop = Loop([sparsifier])
    train(model, loop, start(model, loop, 10), 0, 10, 10)
    exchanged = [int((~m.before["0.weight"] & m.after["0.weight"]).sum()) for m in heard.moves[1:]]
    # 64 of 128 weights are kept; steps 2 to 7, and none at 8, where the cosine is zero.
    assert exchanged == [round(64 * 0.15 * (1 + math.cos(math.pi * s / 8))) for s in range(2, 8)]


@pytest.mark.parametrize(
    ("rule", "said"),
    [(DropAndGrow(every=2, until=0.9, grow="large_final"), 0), (DropAndGrow(every=100), 1), (DropAndGrow(fraction=0.0), 1)],
)
def test_a_rule_that_brings_nothing_back_is_said_at_the_end(rule, said):
    model = net()
    sparsifier = Sparsifier(model, "weight", "local", sparsity=0.5, schedule=AT_ONCE, rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with heard("brought no pruned unit back in this run") as found, attach(optimizer, sparsifier, total_steps=10):
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert len(found) == said and all(repr(rule) in text for text in found)
