"""N:M training: the network is sparse at every moment between steps, and nothing of the rest is lost."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.callbacks.fastai import HoldCallback
from fasterai.callbacks.plain import attach
from fasterai.core.criteria import large_final
from fasterai.core.loop import Fit
from fasterai.prune.pruner import Pruner
from fasterai.sparse.nm.srste import SRSTE, STE

STEPS = 6


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    x, y = batch(i)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=1e-3)


def counts(weight: Tensor, m: int = 4) -> set[int]:
    """The numbers of weights that are not zero in groups along dimension 1."""
    groups = weight.detach().movedim(1, -1).reshape(-1, m)
    return set((groups != 0).sum(1).tolist())


def sparse_everywhere(model: nn.Module, most: int = 2) -> bool:
    return all(max(counts(model[i].weight)) <= most for i in (3, 6, 8))


def train(model: nn.Module, training: Any, first: int = 0, last: int = STEPS, state: dict[str, Any] | None = None) -> dict:
    optimizer = sgd(model)
    handle = attach(optimizer, training, total_steps=STEPS, model=model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["handle"])
    for i in range(first, last):
        step(model, optimizer, i)
        assert sparse_everywhere(model, training.count)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    saved = copy.deepcopy(saved)
    handle.remove(completed=last == STEPS)
    return saved


def same(one: SRSTE, other: SRSTE) -> bool:
    latents = one.latent, other.latent
    masks = one.masks, other.masks
    models = one.model.state_dict(), other.model.state_dict()
    return all(all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys() for a, b in (latents, masks, models))


def test_masks_are_chosen_anew_and_all_that_is_seen_is_sparse(tmp_path):
    model = net()
    training = STE(model, 2, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer, seen, outputs = sgd(model), [], []
    with attach(optimizer, training, total_steps=STEPS, model=model):
        torch.testing.assert_close(training.latent["3.weight"], before["3.weight"], rtol=0, atol=0)
        for i in range(STEPS):
            step(model, optimizer, i)
            seen.append(training.masks)
            for name, mask in seen[-1].items():
                assert torch.equal(model.state_dict()[name] != 0, mask), name
            model.eval()
            outputs.append(model(batch(0)[0]))
            twin = net()
            twin.load_state_dict(model.state_dict())
            assert torch.equal(twin.eval()(batch(0)[0]), outputs[-1])
            model.train()
    assert any(not torch.equal(seen[0][n], seen[-1][n]) for n in seen[0])
    assert counts(model[0].weight, 3) == {3}  # three inputs: left dense
    assert float(training.sparsity) == 0.5 and training.metrics() == {"sparsity": 0.5}
    assert training.moves == STEPS
    assert "0.weight (its 3 inputs are fewer than a group of 4)" in str(training)
    training.save_model(tmp_path / "small.pt")
    saved = torch.load(tmp_path / "small.pt", weights_only=True)
    assert all(torch.equal(saved[n], w) for n, w in model.state_dict().items())


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_equals_one_that_was_not_stopped(stop):
    whole = SRSTE(net(), 1, 4, decay=0.1, schedule="agp", looks=4)
    train(whole.model, whole)
    first = SRSTE(net(), 1, 4, decay=0.1, schedule="agp", looks=4)
    saved = train(first.model, first, 0, stop)
    again = SRSTE(net(1), 1, 4, decay=0.1, schedule="agp", looks=4)
    train(again.model, again, stop, STEPS, saved)
    assert same(whole, again)
    assert whole.notes.read() == again.notes.read() and whole.notes.steps == again.notes.steps
    assert whole.count == again.count == 1


def test_the_number_of_kept_weights_falls_to_n_and_rises_no_more():
    model = net()
    training = SRSTE(model, 1, 4, schedule="lin")
    assert training.count == 4
    seen, optimizer = [], sgd(model)
    with attach(optimizer, training, total_steps=STEPS, model=model):
        for i in range(STEPS):
            step(model, optimizer, i)
            seen.append((training.count, *counts(model[6].weight)))
            assert "of 1:4" in training.shortfall() or training.count == 1
    assert seen == [(4, 4), (3, 3), (2, 2), (2, 2), (2, 2), (1, 1)]  # 4 - round(3 x position), and 0.5 of 3 to the even 2
    assert float(training.sparsity) == 0.75
    assert training.shortfall() == ""
    optimizer = sgd(model)
    with attach(optimizer, training, total_steps=STEPS, model=model):
        for i in range(STEPS):  # the schedule begins anew
            step(model, optimizer, i)
            assert training.count == 1 and counts(model[6].weight) == {1}
    stopped = SRSTE(net(), 1, 4, schedule=lambda position: 0.0)
    train(stopped.model, stopped)
    assert stopped.count == 1 and counts(stopped.model[6].weight) == {1}  # the run's end is the schedule's


def test_a_step_that_fails_leaves_the_network_sparse():
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.1)
            raise RuntimeError("out of memory")

    model = net()
    training = SRSTE(model, 2, 4)
    whole = model[6].weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        attach(optimizer := Failing(model.parameters(), 0.1), training, total_steps=2, model=model),
    ):
        step(model, optimizer, 0)
    assert sparse_everywhere(model)
    torch.testing.assert_close(training.latent["6.weight"], whole - 0.1)


def test_a_run_without_a_step_leaves_no_trace():
    model = net()
    training = SRSTE(model, 2, 4)
    before = copy.deepcopy(model.state_dict())
    handle = attach(sgd(model), training, total_steps=2, model=model)
    assert sparse_everywhere(model) and float(training.sparsity) == 0.5
    handle.remove(completed=False)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert float(training.sparsity) == 0 and training.latent == {}


def test_frozen_layers_stay_dense_until_they_train_and_named_ones_do_not():
    model = net()
    model[6].requires_grad_(False)
    training = SRSTE(model, 2, 4)
    optimizer = sgd(model)
    with attach(optimizer, training, total_steps=4, model=model):
        step(model, optimizer, 0)
        assert counts(model[6].weight) == {4} and counts(model[3].weight) == {2}
        assert training.report().left_out["6.weight"] == "frozen"
        model[6].requires_grad_(True)
        step(model, optimizer, 1)
        assert counts(model[6].weight) == {2}
        model[6].requires_grad_(False)
        shown = model[6].weight.detach().clone()
        for i in (2, 3):
            step(model, optimizer, i)
        assert torch.equal(model[6].weight, shown)
    named = net()
    named[6].requires_grad_(False)
    training = SRSTE(named, 2, 4, targets=["3", "6"])
    train_one = sgd(named)
    with attach(train_one, training, total_steps=1, model=named):
        assert counts(named[6].weight) == {2}
        step(named, train_one, 0)
    for p in named.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="all of them are frozen"):
        attach(torch.optim.SGD(net().parameters(), 0.1), training, total_steps=1, model=named)


def test_other_weights_that_were_loaded_are_taken_up_even_under_the_same_masks():
    model = net()
    training = SRSTE(model, 2, 4)
    train(model, training)
    hidden = training.latent["6.weight"]
    train(model, training)
    assert not torch.equal(training.latent["6.weight"], hidden)
    with torch.no_grad():
        model[6].weight.mul_(2)  # under the masks of before
    with pytest.warns(UserWarning, match="other weights than it showed last"):
        training.on_fit_start(Fit(total_steps=1, model=model))
    assert torch.equal(training.latent["6.weight"], model[6].weight)
    training.on_fit_end(completed=True)


def test_the_end_of_the_training_keeps_the_zeros():
    model = net()
    training = SRSTE(model, 2, 4)
    train(model, training)
    training.finalize()
    assert training.latent == {} and sparse_everywhere(model)
    assert HoldCallback(training).metrics() == {"sparsity": 0.5}
    held = training.hold(optimizer := sgd(model))
    masks = training.masks
    for i in range(2):
        step(model, optimizer, i)
    assert all(torch.equal(model.state_dict()[n] != 0, mask) for n, mask in masks.items())
    held.remove()


def test_copies_and_pickles_go_on_by_themselves():
    training = SRSTE(net(), 2, 4, looks=3)
    train(training.model, training, 0, 3)
    for other in (copy.deepcopy(training), pickle.loads(pickle.dumps(training))):
        assert same(training, other) and other.model is not training.model
        kept = {n: w.clone() for n, w in training.latent.items()}
        train(other.model, other)
        assert all(torch.equal(w, kept[n]) for n, w in training.latent.items())
    left = copy.deepcopy(training)
    train(training.model, training)
    train(left.model, left)
    assert same(training, left)


def test_automatic_precision_and_compiled_networks():
    torch._dynamo.reset()
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model = net()
        training = SRSTE(wrapped := wrap(model), 2, 4)
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with attach(optimizer, training, total_steps=3, model=wrapped):
            for i in range(3):
                x, y = batch(i)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(wrapped(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                assert sparse_everywhere(model)
        assert all(w.dtype is torch.float32 for w in training.latent.values())


def test_channels_may_go_in_whole_groups():
    """8 of 16 inputs of the second Linear are left; then no multiple of 4, which is refused with nothing changed."""
    inputs = batch(0)[0]
    model = net()
    training = SRSTE(model, 2, 4)
    train(model, training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Pruner(model, 0.5, "local", large_final, example_inputs=inputs, round_to=8).prune_model()
    assert model[8].weight.shape == (4, 8) and model[6].weight.shape == (8, 8)
    whole = copy.deepcopy(training).latent["8.weight"]
    assert whole.shape == (4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.on_fit_start(Fit(total_steps=1, model=model))  # new groups, and nothing is forgotten
    assert torch.equal(training.latent["8.weight"], whole) and counts(model[8].weight) == {2}
    training.on_fit_end(completed=False)
    train(model, training)
    assert sparse_everywhere(model) and counts(model[6].weight) == {2}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"must go in multiples of 4, got .* prune with round_to=4, or call finalize"):
        Pruner(model, 0.3, "local", large_final, example_inputs=inputs, round_to=1).prune_model()
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda s: s.pop("latent"), ValueError, "without latent"),
        (lambda s: s.update(count="two"), TypeError, "state's count must be a whole number"),
        (lambda s: s["latent"].update({"6.weight": torch.zeros(2, 2)}), ValueError, "must be of its targets' shapes"),
        (lambda s: s["shapes"].update({"6.weight": [2, 2]}), ValueError, "state must be of the same model"),
        (lambda s: s.update(steps=None), TypeError, "state's steps must be a list"),
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(change, kind, words):
    training = SRSTE(net(), 2, 4)
    train(training.model, training)
    state = training.state_dict()
    before = copy.deepcopy(training)
    change(state)
    with pytest.raises(kind, match=words):
        training.load_state_dict(state)
    assert same(training, before)


def test_a_run_with_other_settings_than_the_saved_ones_is_told():
    training = SRSTE(net(), 2, 4)
    saved = train(training.model, training, 0, 2)
    other = SRSTE(net(), 2, 4, decay=0.5)
    with pytest.warns(UserWarning, match=r"decay was 0.0002 and is 0.5"):
        train(other.model, other, 2, STEPS, saved)


def test_a_run_without_a_step_leaves_neither_masks_nor_zeros():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    training = SRSTE(model, skip=True)
    attach(sgd(model), training, total_steps=STEPS).remove(completed=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert training.sparsity.overall == 0 and training.masks["3.weight"].all()


def test_a_layer_that_is_unfrozen_between_two_runs_takes_part_and_the_others_keep_their_latent_weights():
    model = net()
    model[6].requires_grad_(False)
    training, optimizer = SRSTE(model, 2, 4), sgd(model)
    with attach(optimizer, training, total_steps=1, model=model):
        step(model, optimizer, 0)
    latent = training.latent
    assert not torch.equal(latent["3.weight"], model[3].weight)
    model[6].requires_grad_(True)
    handle = attach(sgd(model), training, total_steps=1, model=model)
    assert counts(model[6].weight) == {2}
    assert all(torch.equal(w, latent[n]) for n, w in training.latent.items())
    handle.remove(completed=False)
    assert set(training.latent) == set(latent) and training.latent["6.weight"].count_nonzero() == latent["6.weight"].numel()


def test_latent_weights_go_along_to_another_precision():
    model = net()
    training = SRSTE(model, 2, 4)
    train(model, training)
    latent = training.latent["6.weight"]
    model.bfloat16()  # other sums, of the same weights
    attach(sgd(model), training, total_steps=1, model=model).remove(completed=False)
    hidden = latent - latent * training.masks["6.weight"]
    assert torch.equal(training.latent["6.weight"] - model[6].weight, hidden.bfloat16())
