"""Finding tickets: counts, what goes back, controls of arguments."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.rounds import find_ticket, plan_rounds
from tests.networks import residual
from tests.ticket_nets import X, Y, equal, net, step, tensors_of, train

UNITS = 32 + 64 + 24  # the weights of the network's three layers
IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def found(model=None, sparsity=0.5, train=train, **options):
    model = net() if model is None else model
    torch.manual_seed(0)
    return find_ticket(train, model, sparsity, **options)


def masked(weights, masks):
    return {name: x * masks[name] if name in masks else x for name, x in weights.items()}


def watched(seen):
    """The training, which notes the weights that it begins and ends with."""

    def once(model, participants):
        seen.append([tensors_of(model)])
        result = train(model, participants)
        seen[-1].append(tensors_of(model))
        return result

    return once


# --- counts -----------------------------------------------------------------------------------------------------------


def test_each_round_prunes_20_percent_of_the_survivors():
    seen = []
    ticket = found(sparsity=0.5, train=watched(seen))
    zeros = [sum(int((x == 0).sum()) for n, x in begin.items() if n.endswith("weight") and x.dim() == 2) for begin, _ in seen]
    # 1 - 0.8 ** k of 120: 24, 43.2, 58.56; then 0.5
    assert zeros == [0, 24, 43, 59] and ticket.sparsity == 60 / UNITS
    assert ticket.settings["rounds"] == "4" and len(ticket.results) == 4


@pytest.mark.parametrize(
    ("sparsity", "rounds", "shares"),
    [
        (0.36, None, [0.2, 0.36]),
        (0.2, None, [0.2]),
        (0.1, None, [0.1]),
        (0.488, None, [0.2, 0.36, 0.488]),
        (0.75, 2, [0.5, 0.75]),
        (0.875, 3, [0.5, 0.75, 0.875]),
        (0.9, 1, [0.9]),
    ],
)
def test_shares_by_hand(sparsity, rounds, shares):
    sparsifier = Sparsifier(nn.Linear(100, 100), context="global")
    assert plan_rounds(sparsifier, sparsity, rounds) == pytest.approx(shares, abs=1e-12)


def test_default_rounds_that_would_prune_nothing_are_left_out():
    sparsifier = Sparsifier(nn.Linear(2, 2), context="global")
    # Of 4 weights 0.8, 1.44, 1.95, 2.36, 2.69, 2.95 and 3 go: rounded 1, 1, 2, 2, 3, 3, 3.
    assert plan_rounds(sparsifier, 0.75, None) == pytest.approx([1 - 0.8**2, 1 - 0.8**4, 0.75])


def test_more_rounds_than_units_are_refused_before_anything():
    model = nn.Sequential(nn.Linear(2, 4))
    before = tensors_of(model)
    with pytest.raises(ValueError, match=r"rounds must leave a unit to prune to each of them, got 9 for 4 of 8 units, where"):
        found(model, 0.5, rounds=9)
    with pytest.raises(ValueError, match="got 1 for 0 of 8 units, where round 1 would prune none"):
        found(model, 0.01)
    assert equal(tensors_of(model), before)


# --- going back -------------------------------------------------------------------------------------------------------


def test_everything_but_the_masks_goes_back_bit_for_bit():
    seen, first = [], tensors_of(net())
    ticket = found(train=watched(seen))
    for (_, end), (begin, _) in itertools.pairwise(seen):
        assert not any(torch.equal(x, first[name]) for name, x in end.items()), "all of it has moved"
        masks = {name: begin[name] != 0 for name in ticket.masks}
        assert equal(begin, masked(first, masks))
    assert equal(ticket.weights, first), "and no weight of a ticket is masked"


def test_masks_hold_in_each_round_and_nest():
    seen = []
    ticket = found(train=watched(seen))
    zeros = [{name: x[name] == 0 for name in ticket.masks} for pair in seen for x in pair]
    assert all((~before[n] | after[n]).all() for before, after in itertools.pairwise(zeros) for n in before)
    last = {name: ~mask for name, mask in ticket.masks.items()}
    assert all((~zeros[-1][n] | last[n]).all() for n in last)


def test_masks_nest_where_a_training_ends_on_weights_that_fill_them():
    began = []

    def averaging(model, participants):
        began.append({name: p == 0 for name, p in model.named_parameters() if p.dim() == 2})
        train(model, participants)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(5.0 * (p == 0))  # the highest of all

    with warnings.catch_warnings(action="ignore"):
        ticket = found(train=averaging)
    began.append({name: ~mask for name, mask in ticket.masks.items()})
    assert [sum(int(x.sum()) for x in zeros.values()) for zeros in began] == [0, 24, 43, 59, 60]
    assert all((~before[n] | after[n]).all() for before, after in itertools.pairwise(began) for n in before)


def test_the_model_ends_as_the_ticket_and_trains_as_it():
    model = net()
    ticket = found(model)
    assert equal(tensors_of(model), masked(ticket.weights, ticket.masks))


@pytest.mark.parametrize(
    ("when", "steps"), [({"rewind": 0.5}, 3), ({"rewind": 0.4}, 3), ({"rewind": 1 / 6}, 1), ({"rewind_epoch": 1}, 2)]
)
def test_a_later_moment_is_gone_back_to(when, steps):
    seen = {}

    def once(model, participants):
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        model.train()
        with attach(optimizer, *participants, epochs=3, steps_per_epoch=2):
            for i in range(1, 7):
                step(model, optimizer)
                seen.setdefault(i, tensors_of(model))

    ticket = found(train=once, **when)
    assert equal(ticket.weights, seen[steps])


def test_an_optimizer_that_is_used_again_is_cleared():
    steps = []
    optimizers = {}

    def once(model, participants):
        optimizer = optimizers.setdefault(0, torch.optim.Adam(model.parameters(), 0.05))
        with attach(optimizer, *participants, total_steps=2):
            for _ in range(2):
                step(model.train(), optimizer)
                steps.append({int(s["step"]) for s in optimizer.state.values()})

    found(train=once, rounds=2)
    assert steps == [{1}, {2}, {1}, {2}]


def test_a_ticket_trains_as_a_round_of_the_search_does():
    results = found(rounds=3).results
    model = net()
    ticket = found(sparsity=1 - 0.5 ** (2 / 3), rounds=2)
    assert ticket.results == results[:2]
    # The third round has trained the ticket of two.
    assert train(model, [ticket.apply(model)]) == results[2]


# --- granularities, criteria, schedules -------------------------------------------------------------------------------


def train_images(model, participants=(), steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with attach(optimizer, *participants, total_steps=steps, model=model):
        for _ in range(steps):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (("kernel", "local", "large_final"), {}),
        (("filter", "global", "random"), {"example_inputs": IMAGES}),
        (("coupled", "global", "large_final"), {"example_inputs": IMAGES, "round_to": 1}),
        (("weight", "local", "movement"), {}),
        (("weight", "local", "magnitude_increase"), {"schedule": "one_cycle"}),
        (("coupled", "local", "large_final"), {"example_inputs": IMAGES, "schedule": "agp"}),
    ],
)
def test_any_granularity_context_criterion_and_schedule(axes, options):
    torch.manual_seed(0)
    model = residual(8, 8)
    first = tensors_of(model)
    with warnings.catch_warnings(action="ignore"):
        ticket = find_ticket(train_images, model, 0.5, *axes, rounds=2, **options)
        plain = Sparsifier(residual(8, 8), *axes, example_inputs=IMAGES)
        plain.sparsify_model(0.5)
    assert ticket.sparsity == plain.sparsity.overall
    assert equal(ticket.weights, first)
    train_images(model, [ticket.apply(model)])
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in ticket.masks.items())


def test_with_a_schedule_a_round_prunes_while_it_trains():
    zeros = []

    class Counting(Participant):
        def __init__(self, model):
            self.model = model

        def after_step(self, position):
            zeros.append(sum(int((p == 0).sum()) for n, p in self.model.named_parameters() if p.dim() == 2))

    def once(model, participants):
        return train(model, [*participants, Counting(model)])

    ticket = found(train=once, schedule="lin", rounds=1)
    assert zeros == [10, 20, 30, 40, 50, 60] and ticket.sparsity == 0.5
    zeros.clear()
    found(train=once)
    assert zeros[:6] == [0] * 6, "without one, after it"


def test_a_training_that_stops_early_prunes_all_the_same():
    def once(model, participants):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        handle = attach(optimizer, *participants, total_steps=9)
        step(model.train(), optimizer)
        handle.remove(completed=False)

    for schedule in (None, "agp"):
        assert found(train=once, rounds=2, schedule=schedule).sparsity == 0.5


def test_a_criterion_that_reads_data_needs_some():
    with pytest.raises(ValueError, match="data must be given for taylor, which reads some after each round, got None"):
        found(criteria="taylor")
    data = [(X, Y)]
    ticket = found(criteria="taylor", rounds=2, data=data, loss=nn.functional.cross_entropy)
    assert ticket.sparsity == 0.5
    with warnings.catch_warnings(action="ignore"):
        assert found(criteria="taylor", rounds=2, schedule="one_shot", train=_with_loss).sparsity == 0.5


def _with_loss(model, participants):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, *participants, total_steps=2, loss=nn.functional.cross_entropy) as handle:
        for _ in range(2):
            optimizer.zero_grad()
            outputs = model.train()(X)
            handle.loss(nn.functional.cross_entropy(outputs, Y), X, Y, outputs).backward()
            optimizer.step()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 0.0}, ValueError, "sparsity must be above 0 and below 1, got 0.0"),
        ({"sparsity": 1}, ValueError, "sparsity must be above 0 and below 1, got 1"),
        ({"sparsity": 90}, ValueError, r"sparsity must be in \[0, 1\], got 90; pass 0.9"),
        ({"sparsity": "0.9"}, TypeError, r"sparsity must be a number in \[0, 1\]"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"rounds": 2.5}, TypeError, "rounds must be a whole number of at least 1, got 2.5"),
        ({"rewind": 1.0}, ValueError, r"rewind must be a position before the end of the training, in \[0, 1\), got 1.0"),
        ({"rewind": 3}, ValueError, "got 3; for an epoch pass rewind_epoch="),
        ({"rewind": -0.5}, ValueError, r"rewind must be in \[0, 1\], got -0.5"),
        ({"rewind": "1"}, TypeError, r"rewind must be a number in \[0, 1\]"),
        ({"rewind_epoch": -1}, ValueError, "rewind_epoch must be at least 0, got -1"),
        ({"rewind": 0.5, "rewind_epoch": 1}, ValueError, "rewind_epoch must be None beside rewind, got 1 and rewind=0.5"),
        ({"rewind_epoch": 1}, ValueError, "rewind_epoch must be left out for a loop that says no epochs"),
        ({"rewind": 0.9}, ValueError, "rewind must be before the end of the training, of 6 steps, got rewind=0.9"),
        ({"granularity": "cell"}, ValueError, "granularity must be one of"),
        ({"max_updates": 3}, TypeError, "options must be of targets, .*, got max_updates"),
        ({"train": "train"}, TypeError, r"train must be a function \(model, participants\), got str"),
        ({"context": "two_four", "sparsity": 0.8}, ValueError, "sparsity must be at most 0.5 for 2:4, got 0.8"),
        ({"granularity": "coupled"}, ValueError, "example_inputs"),
        ({"model": "model"}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(options, error, message):
    model = options.pop("model", None) or net()
    before = tensors_of(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        found(model, **options)
    if before:
        assert equal(tensors_of(model), before)


def _alone(model, participants):
    train(model, [Participant()])


def _nothing(model, participants):
    return 0.5


def _another(model, participants):
    other = net(3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with attach(optimizer, *participants, total_steps=1):
        step(other, optimizer)


def _first_alone(model, participants):
    train(model, participants[:1])


def _last_alone(model, participants):
    train(model, participants[-1:])


def _twice(model, participants):
    train(model, participants)
    train(model, participants)


@pytest.mark.parametrize(
    ("once", "message"),
    [
        (
            _alone,
            "train must let the participants take part in its training, got one that took no step with them",
        ),
        (_nothing, "train must let the participants take part in its training"),
        (_another, "optimizer must train the model that train was given, got one that holds none of its parameters"),
        (_first_alone, "participants must hold the Hold that RewindPoint follows"),
        (_last_alone, "train must let the participants take part in its training"),
        (_twice, "train must train once in a round, got a second run with the same participants"),
    ],
)
def test_a_training_without_the_participants_is_refused(once, message):
    model = net()
    before = tensors_of(model)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=message):
        found(model, train=once, rounds=2)
    assert equal(tensors_of(model), before), "and the model is as it was"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_training_leaves_the_model_as_it_was(error):
    model, rounds = net(), []
    before = tensors_of(model)

    def once(model, participants):
        rounds.append(train(model, participants))
        if len(rounds) == 2:
            raise error("stop")

    with pytest.raises(error):
        found(model, train=once)
    assert equal(tensors_of(model), before)
    assert equal(found(model).masks, found().masks), "so that the same call does the same"


def test_nothing_is_left_on_the_model():
    model = net()
    keys = list(model.state_dict())
    found(model)
    assert list(model.state_dict()) == keys
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    copy.deepcopy(model)
