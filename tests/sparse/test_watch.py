"""Training on without a hold is said once, after the first step; what holds, searches, or was loaded is not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Fit
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.watch import LOOKS, SAMPLES, Watch
from tests.networks import perceptron

COME_BACK = "its pruned weights come back"
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def pruned(**options):
    model = perceptron(6, 10, 4)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.5, schedule="lin", **options)
    sparsifier.sparsify_model()
    return model, sparsifier


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def step(model, optimizer, count=1, accumulate=1):
    for k in range(count * accumulate):
        F.cross_entropy(model(X), Y).backward()
        if (k + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def said(train) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(w.message) for w in caught if COME_BACK in str(w.message)]


def test_plain_training_on_is_said_once_and_names_the_repair():
    model, _sparsifier = pruned()
    optimizer = sgd(model)
    assert said(lambda: step(model, optimizer)) == []  # the first pass comes before the first step
    (message,) = said(lambda: step(model, optimizer))
    assert "of 0.weight" in message or "of 2.weight" in message
    assert "HoldCallback(sparsifier)" in message and "sparsifier.hold(optimizer)" in message and "finalize()" in message
    assert said(lambda: step(model, optimizer, 10)) == []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_it_is_said_after_a_run_with_another_optimizer_and_though_the_sparsifier_is_gone():
    model = perceptron(6, 10, 4)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.5, schedule="lin")
    optimizer = sgd(model)
    with attach(optimizer, sparsifier, total_steps=4):
        assert said(partial(step, model, optimizer, 4)) == []
    del sparsifier, optimizer
    gc.collect()
    assert len(said(lambda: step(model, torch.optim.Adam(model.parameters(), 0.01), 3))) == 1


def test_it_is_said_where_another_sparsifier_trains_the_model():
    model, first = pruned()
    second = Sparsifier(model, "weight", "global", sparsity=0.5, schedule="lin")
    optimizer = sgd(model)
    with attach(optimizer, second, total_steps=4):
        assert len(said(lambda: step(model, optimizer, 4))) == 1
    del first


def test_accumulated_steps_and_a_rate_that_starts_at_zero_are_waited_for():
    model, _sparsifier = pruned()
    optimizer = sgd(model, lr=0.0)
    assert said(lambda: step(model, optimizer, 3, accumulate=4)) == []
    optimizer.param_groups[0]["lr"] = 0.1
    assert len(said(lambda: step(model, optimizer, 3, accumulate=4))) == 1


def by_hold(model, sparsifier, optimizer):
    sparsifier.hold(optimizer)
    step(model, optimizer, 20)


def by_hold_in_a_loop(model, sparsifier, optimizer):
    with attach(optimizer, sparsifier.hold(), total_steps=20):
        step(model, optimizer, 20)


def by_a_further_run(model, sparsifier, optimizer):
    with attach(optimizer, sparsifier, total_steps=20):
        step(model, optimizer, 20)


def by_hand(model, sparsifier, optimizer):
    for _ in range(20):
        step(model, optimizer)
        sparsifier.apply_masks()


def not_at_all_as_was_said(model, sparsifier, optimizer):
    sparsifier.finalize()
    sparsifier.apply_masks()
    step(model, optimizer, 20)


def not_at_all_after_a_reset(model, sparsifier, optimizer):
    sparsifier.reset()
    step(model, optimizer, 20)


def with_other_weights(model, sparsifier, optimizer):
    model.load_state_dict(perceptron(6, 10, 4, seed=3).state_dict())
    step(model, optimizer, 20)


def with_another_state(model, sparsifier, optimizer):
    dense = Sparsifier(model, "weight", "global", sparsity=0.5, schedule="lin").state_dict()
    sparsifier.load_state_dict(dense)
    step(model, optimizer, 20)


HELD = [by_hold, by_hold_in_a_loop, by_a_further_run, by_hand, not_at_all_as_was_said, not_at_all_after_a_reset]
HELD += [with_other_weights, with_another_state]


@pytest.mark.parametrize("way", HELD)
def test_nothing_is_said_where_masks_are_held_or_gone(way):
    model, sparsifier = pruned()
    assert said(lambda: way(model, sparsifier, sgd(model))) == []


def test_it_is_said_again_after_a_hold_has_ended():
    model, sparsifier = pruned()
    optimizer = sgd(model)
    with attach(optimizer, sparsifier.hold(), total_steps=2):
        step(model, optimizer, 2)
    assert len(said(lambda: step(model, optimizer, 3))) == 1


def test_units_that_return_in_a_run_are_none_that_were_filled():
    model = perceptron(6, 10, 4)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.5, schedule=lambda p: 1 - p)
    optimizer = sgd(model)
    sparsifier.sparsify_model()
    with attach(optimizer, sparsifier, total_steps=10):
        for _ in range(10):
            assert said(lambda: step(model, optimizer)) == []
            sparsifier.apply_masks()  # as saving does
            assert not sparsifier._record.watch._look


def test_a_lower_sparsity_is_looked_at_anew():
    model, sparsifier = pruned()
    sparsifier.sparsify_model(0.1)
    optimizer = sgd(model)
    sparsifier.hold(optimizer)
    assert said(lambda: step(model, optimizer, 5)) == []


def test_a_filter_that_only_its_norm_fills_is_said():
    """A filter of zeros behind a scale of zero has no gradient; the shift has one, unless a ReLU cuts it off at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(72, 4))
    x = torch.randn(8, 3, 5, 5)
    Sparsifier(model, "filter", "local", targets="0", example_inputs=x).sparsify_model(0.5)

    def train():
        for _ in range(3):
            F.cross_entropy(model(x), Y).backward()
            optimizer.step()

    optimizer = sgd(model)
    (message,) = said(train)
    assert "of 1.bias" in message


def test_a_search_is_not_said_and_what_comes_after_it_is():
    model, sparsifier = pruned()
    searching = [True]
    sparsifier._record.watch.take_up(Fit(1, is_search=lambda: searching[0]))
    sparsifier._record.watch.let_go()
    sparsifier.apply_masks()
    before = copy.deepcopy(model.state_dict())
    assert said(lambda: step(model, sgd(model), 3)) == []
    model.load_state_dict(before)
    searching[0] = False
    assert len(said(lambda: step(model, sgd(model), 5))) == 1


def test_it_ends_by_itself():
    model, sparsifier = pruned()
    optimizer = sgd(model)
    for _ in range(LOOKS[-1]):
        assert any(p._post_accumulate_grad_hooks for p in model.parameters())
        step(model, optimizer)
        sparsifier._record.apply_()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_model_is_copied_saved_and_exported_as_ever():
    model, sparsifier = pruned()
    keys = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(getattr(m, a) for m in model.modules() for a in vars(m) if a.endswith("_hooks"))
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    copies += [copy.deepcopy(sparsifier).model, pickle.loads(pickle.dumps(sparsifier)).model]
    for other in copies:
        assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    exported = torch.export.export(model, (X,)).module()
    assert torch.equal(exported(X), model(X))


def test_nothing_keeps_the_model_alive():
    model, sparsifier = pruned()
    gone = weakref.ref(model[0])
    del model, sparsifier
    gc.collect()
    assert gone() is None


def test_a_compiled_model_is_looked_at_too():
    model, _sparsifier = pruned()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = sgd(model)
    assert len(said(lambda: step(compiled, optimizer, 3))) == 1


def test_large_tensors_are_sampled_evenly_and_masks_stand_for_the_weights_in_their_order():
    weight = nn.Parameter(torch.zeros(100, 100))
    masks = {"half": torch.arange(100)[:, None].expand(100, 100) < 50, "none": torch.ones(100, 100, dtype=torch.bool)}
    watch = Watch()
    watch.begin(object(), lambda: [(name, weight, mask) for name, mask in masks.items()])
    (spot,) = watch._look._spots  # what is masked nowhere is not looked at
    rows, columns = spot._at
    assert abs(len(rows) - SAMPLES / 2) <= 2 and rows.min() >= 50 and len(columns.unique()) == 100
    watch.begin(object(), lambda: [("in a view", weight, masks["half"].reshape(100, 10, 10))])
    (spot,) = watch._look._spots
    assert torch.equal(spot._at[0], rows) and torch.equal(spot._at[1], columns)


def test_a_parameter_that_got_smaller_is_left_alone():
    model, sparsifier = pruned()
    model[0].weight.data, model[0].weight.grad = torch.ones(9, 6), None
    model[0].bias.data, model[2].weight.data = torch.ones(9), torch.ones(4, 9)
    assert said(lambda: step(model, sgd(model), 3)) == []
    del sparsifier
