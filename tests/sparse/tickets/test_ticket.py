"""Tickets: applied, held against others, saved and loaded."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.ticket import Ticket
from tests.networks import residual
from tests.ticket_nets import equal, net, step, tensors_of, train

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def ticket_of(model: nn.Module, granularity="weight", sparsity=0.75, **options) -> Ticket:
    """A ticket of a model's present weights, with masks by their magnitudes."""
    first = tensors_of(model)
    sparsifier = Sparsifier(model, granularity, "global", "large_final", **options)
    sparsifier.sparsify_model(sparsity)
    ticket = Ticket.of(sparsifier, first)
    model.load_state_dict(first, strict=False)
    return ticket


def masked(weights, masks):
    return {name: x * masks[name] if name in masks else x for name, x in weights.items()}


def test_the_weights_are_written_masked_and_the_masks_hold():
    first = tensors_of(net())
    ticket = ticket_of(net())
    model = net(seed=5)
    hold = ticket.apply(model)
    assert equal(tensors_of(model), masked(first, ticket.masks))
    train(model, [hold])
    zeros = {name: int((model.get_parameter(name) == 0).sum()) for name in ticket.masks}
    assert zeros == {name: int((~mask).sum()) for name, mask in ticket.masks.items()}
    assert sum(zeros.values()) == 90  # three quarters of 32 + 64 + 24 weights
    assert ticket.sparsity == 0.75


def test_masked_weights_are_zero_after_every_step():
    model = net()
    hold = ticket_of(net()).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, hold, total_steps=3):
        for _ in range(3):
            step(model.train(), optimizer)
            assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in hold.masks.items())


def test_a_wrapped_model_takes_it_too():
    model = net(seed=5)
    hold = ticket_of(net()).apply(nn.DataParallel(model))
    assert set(hold.masks) == {"first.weight", "inner.weight", "last.weight"}


def _wider():
    model = net()
    model.last = nn.Linear(8, 4)
    return model


def _more():
    model = net()
    model.extra = nn.Linear(1, 1, bias=False)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(4, 8), "first.weight is missing; first.bias is missing"),
        (_wider, r"last.weight is \(4, 8\) here and \(3, 8\) there"),
        (_more, "extra.weight is there besides"),
    ],
)
def test_a_ticket_of_another_model_is_refused_and_nothing_is_changed(other, message):
    ticket, model = ticket_of(net()), other()
    before = tensors_of(model)
    with pytest.raises(ValueError, match=f"model must be one that the ticket was found for, got one where .*{message}"):
        ticket.apply(model)
    with pytest.raises(ValueError, match="model must be one that the ticket was found for"):
        ticket.reinitialised(model)
    assert equal(tensors_of(model), before)


def test_no_model_is_refused_by_type():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        ticket_of(net()).apply("model")


def test_weights_of_another_model_make_no_ticket():
    sparsifier = Sparsifier(net(), "weight")
    with pytest.raises(ValueError, match="weights must be those of the sparsifier's model, got some where"):
        Ticket.of(sparsifier, {"weight": torch.ones(2)})


# --- what it is held against -----------------------------------------------------------------------------------------


def test_random_masks_prune_as_many_of_each_target_on_the_same_weights():
    ticket = ticket_of(net())
    other = ticket.random(3)
    assert {u.name: u.pruned for u in other.units} == {u.name: u.pruned for u in ticket.units}
    assert all(not torch.equal(mask, ticket.masks[name]) for name, mask in other.masks.items())
    assert equal(other.weights, ticket.weights)
    assert equal(other.masks, ticket.random(3).masks)
    assert not equal(other.masks, ticket.random(4).masks)


def test_random_masks_of_coupled_channels_are_channels_in_every_layer():
    ticket = ticket_of(residual(8, 8), "coupled", 0.5, example_inputs=IMAGES)
    masks = ticket.random(1).masks
    kept = masks["stem.weight"][:, 0, 0, 0]
    assert 0 < kept.sum() < 8 and not torch.equal(kept, ticket.masks["stem.weight"][:, 0, 0, 0])
    assert torch.equal(masks["stem.bias"], kept)
    assert torch.equal(masks["branch.3.weight"].any((1, 2, 3)), kept)
    assert torch.equal(masks["head.weight"], kept.expand(5, -1))


def test_a_random_ticket_of_channels_can_be_taken_out():
    ticket = ticket_of(residual(8, 8), "coupled", 0.5, example_inputs=IMAGES)
    model = residual(8, 8)
    ticket.random(1).apply(model)
    before = model.eval()(IMAGES)
    remove(model, IMAGES, measure=False)
    stem = next(u for u in ticket.units if u.name == "stem.weight")
    assert model.stem.out_channels == 8 - stem.pruned
    torch.testing.assert_close(model(IMAGES), before)


def test_other_weights_under_the_same_masks():
    ticket, fresh = ticket_of(net()), net(seed=7)
    other = ticket.reinitialised(fresh)
    assert equal(other.masks, ticket.masks)
    assert equal(other.weights, tensors_of(fresh))
    train(fresh, [other.apply(fresh)])
    assert equal(other.weights, tensors_of(net(seed=7))), "they are copies"


def test_dense_is_the_same_without_masks():
    ticket = ticket_of(net())
    model = net(seed=7)
    ticket.dense().apply(model)
    assert equal(tensors_of(model), tensors_of(net()))


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        ticket_of(net()).random(-1)


# --- the hold ---------------------------------------------------------------------------------------------------------


def test_a_copy_holds_the_copied_model():
    model = net()
    hold = ticket_of(net()).apply(model)
    twin, held = copy.deepcopy((model, hold))
    train(twin, [held])
    assert all((twin.get_parameter(name)[~mask] == 0).all() for name, mask in hold.masks.items())
    assert not equal(tensors_of(model), tensors_of(twin))
    assert pickle.loads(pickle.dumps(hold)).sparsity == hold.sparsity


def test_an_optimizer_of_another_model_is_refused():
    hold = ticket_of(net()).apply(net())
    with pytest.raises(ValueError, match="optimizer must train the ticket's model"):
        attach(torch.optim.SGD(net().parameters(), 0.1), hold, total_steps=1)


@pytest.mark.parametrize("copied", [False, True])
def test_masks_follow_channels_that_are_taken_out(copied):
    model = residual(8, 8)
    ticket = ticket_of(residual(8, 8), "coupled", 0.5, example_inputs=IMAGES)
    hold = ticket.apply(model)
    if copied:
        model, hold = copy.deepcopy((model, hold))
    remove(model, IMAGES, measure=False)
    assert {n: tuple(m.shape) for n, m in hold.masks.items()} == {n: tuple(model.get_parameter(n).shape) for n in hold.masks}
    hold.apply_masks()


def test_a_training_goes_on_bit_for_bit():
    ticket = ticket_of(net())

    def steps(model, optimizer, count):
        for _ in range(count):
            step(model.train(), optimizer)

    def begin():
        model = net(seed=9)
        hold = ticket.apply(model)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        torch.manual_seed(0)
        return model, optimizer, attach(optimizer, hold, total_steps=6)

    whole, optimizer, handle = begin()
    steps(whole, optimizer, 6)
    handle.remove()
    first, optimizer, handle = begin()
    steps(first, optimizer, 3)
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict(), handle.state_dict(), torch.get_rng_state()))
    handle.remove(completed=False)
    second, optimizer, handle = begin()
    second.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    handle.load_state_dict(state[2])
    torch.set_rng_state(state[3])
    steps(second, optimizer, 3)
    handle.remove()
    assert equal(dict(whole.state_dict()), dict(second.state_dict()))


def test_a_state_of_another_ticket_is_refused():
    ticket = ticket_of(net())
    hold = ticket.apply(net())
    hold.load_state_dict(ticket.apply(net()).state_dict())
    with pytest.raises(ValueError, match="state's ticket must be the one that is held"):
        hold.load_state_dict(ticket.random(0).apply(net()).state_dict())
    with pytest.raises(ValueError, match=r"state must be what TicketHold\.state_dict"):
        hold.load_state_dict({})


# --- how it is seen ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_is():
    ticket = ticket_of(net())
    assert repr(ticket) == "<Ticket: 75.0% pruned, 90 of 120 units of 3 targets>"
    assert repr(ticket.apply(net())) == "<TicketHold: 75.0% pruned in 3 parameters>"
    assert "granularity: weight" in str(ticket) and "<td" in ticket._repr_html_()
    axes = ticket.plot()
    assert [bar.get_width() for bar in axes.patches] == [u.pruned / len(u.keep) for u in ticket.units]
