"""Lottery tickets: a rewind is a rewind."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Fit, Loop
from fasterai.core.schedules import Iterative, OneShot
from fasterai.model.cuts import follow
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Net(nn.Module):
    """With what a rewind may forget: a norm's statistics, a raw parameter, an embedding, a PReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.PReLU()
        self.raw = nn.Parameter(torch.ones(8))
        self.table = nn.Embedding(3, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.act(self.norm(self.first(x))) * self.raw + self.table.weight.sum(0))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():  # pretrained statistics
        model.norm.running_mean.fill_(3.0)
        model.norm.weight.fill_(2.0)
    return model


def state_of(model):
    return {n: x.clone() for n, x in model.state_dict().items()}


def masked(state, sparsifier):
    return {n: x * sparsifier.masks[n] if n in sparsifier.masks else x for n, x in state.items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def run(model, sparsifier, ticket, steps, steps_per_epoch=None, after=lambda i: None):
    """Train; `after(i)` is called after step i, counted from 1."""
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    loop = Loop([sparsifier, ticket])
    loop.start(Fit(steps, model, optimizer, steps_per_epoch=steps_per_epoch))
    for i in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
        after(i)
    loop.end(completed=True)
    return optimizer


HALFWAY = OneShot(0.5)


def sparsifier_of(model, schedule=HALFWAY, **options):
    return Sparsifier(model, "weight", "local", "large_final", sparsity=0.5, schedule=schedule, **options)


def test_everything_goes_back_to_the_start_when_the_masks_move():
    model = net()
    start = state_of(model)
    sparsifier = sparsifier_of(model)
    seen = {}
    run(model, sparsifier, LotteryTicket(sparsifier), 8, after=lambda i: seen.update({i: state_of(model)}))
    # Positions i / 8: the masks move at the fourth step.
    assert equal(seen[4], masked(start, sparsifier))
    assert not torch.equal(seen[3]["raw"], start["raw"])
    assert not torch.equal(seen[5]["raw"], start["raw"]), "and training goes on"


def test_a_ticket_without_its_sparsifier_is_refused_as_it_would_prune_nothing():
    model = net()
    sparsifier = sparsifier_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for others in ([], [sparsifier_of(model)]):  # another sparsifier is not the one
        with pytest.raises(ValueError, match=r"attach\(optimizer, sparsifier, LotteryTicket\(sparsifier\), ...\)"):
            attach(optimizer, *others, LotteryTicket(sparsifier), total_steps=4)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="LotteryTicket follows"):  # as every framework's callback begins a run
        Loop([LotteryTicket(sparsifier)]).start(Fit(4, model, optimizer))


def test_a_ticket_may_follow_a_sparsifier_of_another_callback():
    model = net()
    sparsifier = sparsifier_of(model)
    pruning, rewinding = Loop([sparsifier]), Loop([LotteryTicket(sparsifier)])
    pruning.start(Fit(4, model))
    rewinding.start(Fit(4, model))
    pruning.end(True)
    rewinding.end(True)
    with pytest.raises(ValueError, match="LotteryTicket follows"):  # the other run is over
        rewinding.start(Fit(4, model))


def test_a_ticket_that_only_goes_back_at_the_end_needs_masks_and_no_moves():
    model = net()
    sparsifier = sparsifier_of(model)
    start = state_of(model)
    sparsifier.sparsify_model(0.5)
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, sparsifier.hold(), LotteryTicket(sparsifier, reset_end=True), total_steps=2):
        for _ in range(2):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert equal(state_of(model), masked(start, sparsifier))


@pytest.mark.parametrize("value", [True, 3])
def test_a_folder_that_is_none_is_refused_by_name(value):
    with pytest.raises(TypeError, match=f"save_tickets must be a folder, got {value}; pass save_tickets='tickets'"):
        LotteryTicket(sparsifier_of(net()), save_tickets=value)


def test_a_model_in_place_of_the_sparsifier_is_refused_in_a_line():
    with pytest.raises(TypeError, match=r"^sparsifier must be a Sparsifier, got Net \(Net\)$"):
        LotteryTicket(net())


def test_nothing_goes_back_before_the_masks_move():
    model = net()
    sparsifier = sparsifier_of(model)
    seen = []
    run(model, sparsifier, LotteryTicket(sparsifier), 6, after=lambda i: seen.append(state_of(model)["raw"]))
    assert not torch.equal(seen[0], torch.ones(8)), "the first step is no move"


def test_the_optimizers_state_is_cleared_by_a_rewind():
    model = net()
    sparsifier = sparsifier_of(model)
    optimizer = run(model, sparsifier, LotteryTicket(sparsifier), 8)
    assert {int(s["step"]) for s in optimizer.state.values()} == {4}


def test_the_states_of_several_optimizers_are_cleared_by_a_rewind():
    model = net()
    sparsifier = sparsifier_of(model)
    optimizers = [torch.optim.Adam(layer.parameters(), 0.05) for layer in (model.first, model.last)]
    loop = Loop([sparsifier, LotteryTicket(sparsifier)])
    loop.start(Fit(2, model, optimizers))  # the masks move at the first step
    F.cross_entropy(model(X), Y).backward()
    loop.before_step()
    for optimizer in optimizers:
        optimizer.step()
    loop.after_step()
    assert sparsifier.moves == 1
    assert not any(optimizer.state for optimizer in optimizers)


def test_the_epoch_gone_back_to_may_be_a_later_one():
    model = net()
    sparsifier = sparsifier_of(model, OneShot(0.7))
    seen = {}
    ticket = LotteryTicket(sparsifier, rewind_epoch=2)
    run(model, sparsifier, ticket, 8, 2, after=lambda i: seen.update({i: state_of(model)}))
    # Epoch 2 begins after the fourth step; the masks move at the sixth.
    assert equal(seen[6], masked(seen[4], sparsifier))


def test_reset_end_leaves_the_mask_on_the_early_weights():
    model = net()
    start = state_of(model)
    sparsifier = sparsifier_of(model)
    run(model, sparsifier, LotteryTicket(sparsifier, reset_end=True), 6)
    assert equal(state_of(model), masked(start, sparsifier))
    assert sparsifier.sparsity.overall == 0.5


def test_a_stopped_run_is_not_reset_at_its_end():
    model = net()
    sparsifier = sparsifier_of(model)
    ticket = LotteryTicket(sparsifier, reset_end=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, sparsifier, ticket, total_steps=8)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    after = state_of(model)
    handle.remove(completed=False)
    assert equal(state_of(model), after)


def test_tickets_are_saved_under_the_sparsity_that_they_have(tmp_path):
    model = net()
    start = state_of(model)
    sparsifier = sparsifier_of(model, Iterative(2, 0.25), targets="first")
    run(model, sparsifier, LotteryTicket(sparsifier, save_tickets=tmp_path / "tickets"), 8)
    files = sorted(p.name for p in (tmp_path / "tickets").iterdir())
    # The second half of 0.5 goes in two stairs: 8 and 16 of 32 weights.
    assert files == ["winning_ticket_0.2500.pt", "winning_ticket_0.5000.pt"]
    for name, zeros in zip(files, (8, 16), strict=True):
        ticket = torch.load(tmp_path / "tickets" / name, weights_only=True)
        assert list(ticket) == list(start)
        assert int((ticket["first.weight"] == 0).sum()) == zeros
        kept = ticket["first.weight"] != 0
        assert torch.equal(ticket["first.weight"][kept], start["first.weight"][kept])


def test_a_schedule_that_moves_all_the_time_is_warned_of():
    model = net()
    sparsifier = sparsifier_of(model, "lin")
    with pytest.warns(UserWarning, match="lth rewinds the weights at every move of the masks.*use a schedule with few moves"):
        run(model, sparsifier, LotteryTicket(sparsifier), 6)


def test_a_schedule_with_few_moves_is_not_warned_of():
    model = net()
    sparsifier = sparsifier_of(model, Iterative(2, 0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, sparsifier, LotteryTicket(sparsifier), 8)


def test_a_second_run_does_not_rewind_while_the_masks_stay():
    model = net()
    sparsifier = sparsifier_of(model)
    ticket = LotteryTicket(sparsifier)
    run(model, sparsifier, ticket, 4)
    seen = [state_of(model)["raw"]]
    run(model, sparsifier, ticket, 4, after=lambda i: seen.append(state_of(model)["raw"]))
    assert all(not torch.equal(a, seen[0]) for a in seen[1:])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (-1, ValueError, "rewind_epoch must be at least 0, got -1"),
        (0.5, TypeError, r"rewind_epoch must be a whole number of at least 0, got 0\.5"),
    ],
)
def test_a_bad_rewind_epoch_is_refused(epoch, error, message):
    with pytest.raises(error, match=message):
        LotteryTicket(sparsifier_of(net()), rewind_epoch=epoch)


def test_an_epoch_beyond_the_run_is_refused_at_its_start():
    sparsifier = sparsifier_of(net())
    ticket = LotteryTicket(sparsifier, rewind_epoch=4)
    with pytest.raises(ValueError, match="rewind_epoch must be below the 4 epochs of the run, got 4"):
        ticket.on_fit_start(Fit(8, sparsifier.model, steps_per_epoch=2))


def test_nothing_is_added_to_the_model():
    model = net()
    keys = list(model.state_dict())
    sparsifier = sparsifier_of(model)
    run(model, sparsifier, LotteryTicket(sparsifier), 4, after=lambda i: copy.deepcopy(model))
    assert list(model.state_dict()) == keys


def test_noted_weights_are_saved_and_loaded_as_copies():
    model = net()
    start = state_of(model)
    sparsifier = sparsifier_of(model)
    ticket = LotteryTicket(sparsifier)
    ticket.on_fit_start(Fit(4, model))
    state = ticket.state_dict()
    assert equal(state["saved"], start)
    other = LotteryTicket(sparsifier)
    other.load_state_dict(state)
    state["saved"]["raw"].zero_()
    assert equal(other.state_dict()["saved"], start)
    assert equal(ticket.state_dict()["saved"], start)


def test_noted_weights_are_cut_when_channels_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    early = state_of(model)
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", sparsity=0.75, schedule=Iterative(3), example_inputs=X)
    plans = []

    def after(i):
        if i == 5:
            plans.append(remove(model, X, measure=False).plan)

    run(model, sparsifier, LotteryTicket(sparsifier, reset_end=True), 12, after=after)
    left = torch.as_tensor(plans[0].keep["0.weight", 0])
    assert len(left) < 8
    expected = {"0.weight": early["0.weight"][left], "0.bias": early["0.bias"][left]}
    expected |= {"2.weight": early["2.weight"][:, left], "2.bias": early["2.bias"]}
    kept = sparsifier.masks["0.weight"].any(1)
    assert not kept.all()
    assert torch.equal(model[0].weight, expected["0.weight"] * kept[:, None])
    assert torch.equal(model[0].bias, expected["0.bias"] * kept)
    assert torch.equal(model[2].weight, expected["2.weight"] * kept)
    assert torch.equal(model[2].bias, expected["2.bias"])


def test_moves_of_another_sparsifier_of_the_model_do_not_rewind():
    model = net()
    follows = sparsifier_of(model, targets="first.weight", schedule=OneShot(1.0))
    other = sparsifier_of(model, targets="last.weight", schedule=OneShot(0.5))
    ticket = LotteryTicket(follows)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = Loop([follows, other, ticket])
    loop.start(Fit(4, model, optimizer))
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
        seen.append(model.raw.detach().clone())
    assert other.moves == follows.moves == 1
    assert not any(torch.equal(raw, torch.ones(8)) for raw in seen[:3]), "the other's masks moved at the second step"
    assert torch.equal(seen[3], torch.ones(8)), "its own at the last"


def test_a_move_of_another_sparsifier_of_the_same_targets_is_not_its_own():
    model = net()
    moves = []

    class Listener:
        def after_move(self, move):
            moves.append(move)

    listener = Listener()
    follow(model, listener)
    first, second = (sparsifier_of(model, targets="first.weight") for _ in range(2))
    first.sparsify_model(0.25)
    second.sparsify_model(0.5)
    assert [(first.made(move), second.made(move)) for move in moves] == [(True, False), (False, True)]


def test_a_move_between_two_steps_rewinds_at_the_next_step():
    model = net()
    sparsifier = sparsifier_of(model, schedule=OneShot(1.0))

    def after(i):
        if i == 2:
            sparsifier.sparsify_model(0.25)
        seen.append(state_of(model)["raw"])

    seen = []
    with warnings.catch_warnings(action="ignore"):  # the last step's move comes right after
        run(model, sparsifier, LotteryTicket(sparsifier), 5, after=after)
    assert [torch.equal(raw, torch.ones(8)) for raw in seen] == [False, False, True, False, True]
