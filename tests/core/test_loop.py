from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fasterai.core.loop import EVENTS, Batch, Fit, Loop, Participant
from fasterai.model.cuts import announce, announce_move
from tests.messages import heard


class Diary(Participant):
    """Writes down what it hears; adds to the loss what it is told to."""

    def __init__(self, plus=0.0):
        self.plus = plus
        self.heard = []

    def on_fit_start(self, fit):
        self.heard.append(("start", fit.total_steps))

    def after_loss(self, loss, batch):
        self.heard.append(("loss", loss.item()))
        return loss + self.plus

    def before_step(self, position):
        self.heard.append(("before", position))

    def after_step(self, position):
        self.heard.append(("after", position))

    def on_fit_end(self, completed):
        self.heard.append(("end", completed))

    def state_dict(self):
        return {"heard": len(self.heard)}

    def load_state_dict(self, state):
        self.heard = [("loaded", state["heard"])]


class Failing(Participant):
    def on_fit_start(self, fit):
        raise RuntimeError("no")


BATCH = Batch((torch.zeros(1),))


@pytest.mark.parametrize(("given", "expected"), [(None, []), ("one", ["one"]), (["one", "two"], ["one", "two"])])
def test_the_optimizers_are_a_list_whatever_was_given(given, expected):
    assert Fit(1, optimizer=given).optimizers == expected


def test_events_come_in_order_with_the_position_after_the_step():
    diary = Diary()
    loop = Loop([diary])
    loop.start(Fit(total_steps=2))
    for _ in range(2):
        loop.after_loss(torch.tensor(3.0), BATCH)
        loop.before_step()
        loop.after_step()
    loop.end(completed=True)
    step = [("loss", 3.0), ("before", 0.5), ("after", 0.5)], [("loss", 3.0), ("before", 1.0), ("after", 1.0)]
    assert diary.heard == [("start", 2), *step[0], *step[1], ("end", True)]


def test_participants_hear_in_turn_and_the_loss_passes_through_all():
    first, second = Diary(plus=1.0), Diary(plus=10.0)
    loop = Loop([first, second])
    loop.start(Fit(total_steps=1))
    assert loop.after_loss(torch.tensor(0.5), BATCH).item() == 11.5
    assert first.heard[-1] == ("loss", 0.5)
    assert second.heard[-1] == ("loss", 1.5)


def test_an_accumulated_step_has_several_losses():
    loop = Loop([diary := Diary()])
    loop.start(Fit(total_steps=1))
    loop.after_loss(torch.tensor(1.0), BATCH)
    loop.after_loss(torch.tensor(2.0), BATCH)
    loop.before_step()
    loop.after_step()
    assert [kind for kind, _ in diary.heard] == ["start", "loss", "loss", "before", "after"]


def test_a_resumed_run_goes_on_at_its_step():
    loop = Loop([diary := Diary()])
    loop.start(Fit(total_steps=4))
    loop.load_state_dict({"step": 2, "participants": [{"heard": 7}]})
    loop.before_step()
    loop.after_step()
    assert diary.heard == [("loaded", 7), ("before", 0.75), ("after", 0.75)]


def test_a_framework_that_counts_for_itself_sets_the_step():
    loop = Loop([diary := Diary()])
    loop.start(Fit(total_steps=4))
    loop.step = 3
    loop.before_step()
    loop.after_step()
    assert diary.heard[1:] == [("before", 1.0), ("after", 1.0)]


@pytest.mark.parametrize(("total", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (None, TypeError)])
def test_total_steps_must_be_a_count(total, error):
    loop = Loop([diary := Diary()])
    with pytest.raises(error, match=f"total_steps must be .*at least 1, got {total}"):
        loop.start(Fit(total_steps=total))
    assert not loop.running
    assert diary.heard == []


def test_a_step_too_many_is_refused_before_anyone_hears_of_it():
    loop = Loop([diary := Diary()])
    loop.start(Fit(total_steps=1))
    loop.before_step()
    loop.after_step()
    heard = list(diary.heard)
    with pytest.raises(ValueError, match="total_steps must be at least the number of steps taken, got 1 and a further step"):
        loop.before_step()
    assert diary.heard == heard


def test_a_start_that_fails_leaves_no_run_and_ends_it_for_who_had_begun():
    loop = Loop([first := Diary(), Failing(), last := Diary()])
    with pytest.raises(RuntimeError, match="no"):
        loop.start(Fit(total_steps=3))
    assert not loop.running
    loop.end(completed=False)
    assert first.heard == [("start", 3), ("end", False)]
    assert last.heard == []


def test_a_participant_that_fails_at_the_end_does_not_keep_others_from_ending():
    class Stubborn(Diary):
        def on_fit_end(self, completed):
            raise RuntimeError("stubborn")

    loop = Loop([first := Diary(), Stubborn(), last := Diary()])
    loop.start(Fit(total_steps=3))
    with pytest.raises(RuntimeError, match="stubborn"):
        loop.end(completed=True)
    assert not loop.running
    assert first.heard[-1] == last.heard[-1] == ("end", True)


def test_ending_twice_or_without_a_start_does_nothing():
    loop = Loop([diary := Diary()])
    loop.end(completed=True)
    assert diary.heard == []
    loop.start(Fit(total_steps=1))
    assert loop.running
    loop.end(completed=False)
    loop.end(completed=True)
    assert not loop.running
    assert diary.heard == [("start", 1), ("end", False)]


def test_a_second_run_starts_at_the_beginning():
    loop = Loop([diary := Diary()])
    for _ in range(2):
        loop.start(Fit(total_steps=2))
        loop.before_step()
        loop.after_step()
        loop.end(completed=False)
    assert [e for e in diary.heard if e[0] == "after"] == [("after", 0.5), ("after", 0.5)]


def test_state_goes_to_each_participant_and_is_not_changed():
    loop = Loop([Diary(), Diary()])
    loop.start(Fit(total_steps=4))
    loop.before_step()
    loop.after_step()
    state = loop.state_dict()
    assert state == {"step": 1, "total_steps": 4, "participants": {"Diary": {"heard": 3}, "Diary:2": {"heard": 3}}}
    before = copy.deepcopy(state)
    other = Loop([Diary(), Diary()])
    other.load_state_dict(state)
    assert state == before
    assert other.step == 1
    assert [p.heard for p in other.participants] == [[("loaded", 3)], [("loaded", 3)]]


def test_a_state_of_other_participants_is_refused():
    loop = Loop([Diary()])
    with pytest.raises(ValueError, match="state must hold 1 participants, got 2"):
        loop.load_state_dict({"step": 1, "participants": [{"heard": 1}, {"heard": 1}]})
    assert loop.step == 0
    assert loop.participants[0].heard == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": 1}, "state must be what state_dict.. returned, got one with step"),
        ({}, "got one with nothing"),
        ([1, 2], r"got \[1, 2\]"),
    ],
)
def test_a_foreign_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Loop([]).load_state_dict(state)


def test_a_state_of_a_longer_run_is_refused():
    loop = Loop([])
    loop.start(Fit(total_steps=3))
    with pytest.raises(ValueError, match="total_steps must be at least the 4 steps of the state, got 3"):
        loop.load_state_dict({"step": 4, "participants": []})
    loop.load_state_dict({"step": 3, "participants": []})
    assert loop.step == 3


@pytest.mark.parametrize(("step", "total", "said"), [(2, 4, 0), (2, 8, 1), (4, 8, 0)])  # (4, 8) is of a run's end
def test_a_state_of_a_run_of_another_length_is_said(step, total, said):
    first, second = Loop([]), Loop([])
    first.start(Fit(total_steps=4))
    first.step = step
    second.start(Fit(total_steps=total))
    with heard() as messages:
        second.load_state_dict(first.state_dict())
    assert len(messages) == said
    assert all(
        "step 2 of 4, and this run has 8 steps: it goes on at position 25% of the schedule instead of 50%" in m
        for m in messages
    )


def test_a_state_without_a_length_is_one_of_earlier_versions():
    loop = Loop([])
    loop.start(Fit(total_steps=8))
    loop.load_state_dict({"step": 2, "participants": {}})
    assert loop.step == 2
    with pytest.raises(ValueError, match="state's total_steps must be at least 0, got -1"):
        loop.load_state_dict({"step": 2, "total_steps": -1, "participants": {}})


def test_the_length_of_a_run_is_saved_after_its_end_too():
    loop = Loop([])
    loop.start(Fit(total_steps=4, steps_per_epoch=2))
    loop.end(completed=True)
    assert loop.state_dict() == {"step": 0, "total_steps": 4, "steps_per_epoch": 2, "participants": {}}


@pytest.mark.parametrize(("step", "said"), [(0, False), (1, True)])
def test_a_run_that_fails_before_its_first_step_says_nothing_of_its_end(step, said):
    class Short(Participant):
        def shortfall(self):
            return "half of it"

    loop = Loop([Short()])
    loop.start(Fit(total_steps=4))
    loop.step = step
    with heard() as messages:
        loop.end(completed=False, why="it failed")
    assert ["step 1 of 4, with half of it: it failed" in message for message in messages] == [True] * said


def test_if_one_participant_refuses_its_state_all_stay_as_they_were():
    class Refusing(Diary):
        def load_state_dict(self, state):
            if state["heard"] == 9:
                raise ValueError("refused")

    loop = Loop([first := Diary(), Refusing()])
    first.heard = [1, 2]
    with pytest.raises(ValueError, match="refused"):
        loop.load_state_dict({"step": 5, "participants": [{"heard": 3}, {"heard": 9}]})
    assert loop.step == 0
    assert first.heard == [("loaded", 2)]


def test_a_participant_needs_no_event():
    plain = Participant()
    loop = Loop([plain])
    loop.start(Fit(total_steps=1))
    loss = torch.tensor(1.0)
    assert loop.after_loss(loss, BATCH) is loss
    loop.before_step()
    loop.after_step()
    loop.end(completed=True)
    assert plain.state_dict() == {}
    plain.load_state_dict({})


class Own(Participant):
    """Returns from its first event what it was told to."""

    def __init__(self, found):
        self.found = found

    def on_setup(self, model):
        return self.found


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (torch.nn.Parameter(torch.ones(2, 3)), r"a tensor of shape \(2, 3\)"),  # its rows would never train
        (None, "None"),
        ([torch.ones(1, requires_grad=True) * 2], "tensor"),
        ({"a": torch.ones(1)}, "'a'"),
    ],
)
def test_what_is_no_list_of_parameters_is_refused(found, got):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=rf"Own.on_setup must return a list of parameters, \[\] for none, got .*{got}"):
        Loop([Own(found)]).setup(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_lost_loss_is_said():
    class Forgets(Participant):
        def after_loss(self, loss, batch):
            loss + 1

    with pytest.raises(TypeError, match=r"Forgets\.after_loss must return the loss to go on with, got None"):
        Loop([Forgets()]).after_loss(torch.tensor(1.0), BATCH)


class Shows(Participant):
    def __init__(self, **figures):
        self.figures = figures

    def metrics(self):
        return self.figures


def test_only_equal_names_of_figures_are_numbered():
    loop = Loop([Shows(loss_teacher=1.0, loss=2.0, a_2=3.0), Shows(a=4.0, loss=5.0), Shows(a=6.0)])
    assert loop.metrics() == {"loss_teacher": 1.0, "loss": 2.0, "a_2": 3.0, "a": 4.0, "loss_2": 5.0, "a_3": 6.0}


def test_participants_of_one_name_are_numbered_whatever_it_is():
    class Named(Diary):
        name = "a:2"

    assert list(Loop([Named(), Named(), Named()]).state_dict()["participants"]) == ["a:2", "a:2:2", "a:2:3"]


def test_the_end_comes_in_the_order_in_which_participants_were_given():
    order = []

    class Ends(Participant):
        def __init__(self, number):
            self.number = number

        def on_fit_end(self, completed):
            order.append(self.number)

    loop = Loop([Ends(1), Ends(2), Ends(3)])
    loop.start(Fit(total_steps=1))
    loop.end(completed=True)
    assert order == [1, 2, 3]


def test_parameters_leave_an_optimizer_whose_run_does_not_begin():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = Loop([Own([torch.nn.Parameter(torch.ones(1))]), Failing()])
    loop.setup(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 3
    with pytest.raises(RuntimeError, match="no"):
        loop.start(Fit(total_steps=3))
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_who_hears_of_cuts_and_moves_follows_the_model_that_is_trained():
    class Hears(Participant):
        def __init__(self):
            self.cuts, self.moves = [], []

        def after_cut(self, cut):
            self.cuts = [*self.cuts, cut]

        def after_move(self, move):
            self.moves = [*self.moves, move]

    model, hears = torch.nn.Linear(3, 2), Hears()
    Loop([hears, Participant()]).start(Fit(total_steps=1, model=model))
    announce(model, {("weight", 1): np.array([0, 2])})
    announce_move(model, "a move")
    assert [list(cut) for cut in hears.cuts] == [[("weight", 1)]] and hears.moves == ["a move"]


class Broken(Participant):
    def __init__(self, event):
        self.event = event

    def _fail(self, event, found=None):
        if event == self.event:
            raise KeyError("inside")
        return found

    def on_setup(self, model):
        return self._fail("on_setup", ())

    def on_fit_start(self, fit):
        self._fail("on_fit_start")

    def after_forward(self, batch):
        self._fail("after_forward")

    def on_first_batch(self, batch):
        return self._fail("on_first_batch", ())

    def after_loss(self, loss, batch):
        return self._fail("after_loss", loss)

    def after_backward(self):
        self._fail("after_backward")

    def before_step(self, position):
        self._fail("before_step")

    def after_step(self, position):
        self._fail("after_step")

    def metrics(self):
        return self._fail("metrics", {})

    def after_skip(self):
        self._fail("after_skip")

    def on_fit_end(self, completed):
        self._fail("on_fit_end")


def run_through(loop):
    """Pass every event of a run of one step."""
    model, batch = torch.nn.Linear(2, 2), Batch((), ())
    loop.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    loop.start(Fit(total_steps=1))
    loop.after_forward(batch)
    loop.after_loss(torch.ones(()), batch)
    loop.after_backward()
    loop.before_step()
    loop.skip_step()
    loop.before_step()
    loop.after_step()
    loop.metrics()
    loop.end(True)


@pytest.mark.parametrize("event", [event for event in EVENTS if event not in ("after_move", "after_cut")])
def test_an_error_of_a_participant_says_whose_it_is(event):
    with pytest.raises(KeyError, match="inside") as caught:
        run_through(Loop([Broken(event)]))
    assert caught.value.__notes__ == [f"raised in {event} of the participant Broken"]


def test_a_step_is_skipped_once_and_only_if_it_was_announced():
    class Skips(Participant):
        count = 0

        def after_skip(self):
            self.count += 1

    skips = Skips()
    loop = Loop([skips])
    loop.start(Fit(total_steps=2))
    loop.settle()
    loop.skip_step()
    assert skips.count == 0
    loop.before_step()
    loop.settle()
    loop.settle()
    assert skips.count == 1 and loop.step == 0
    loop.before_step()
    loop.after_step()
    loop.settle()
    assert skips.count == 1 and loop.step == 1


class Deaf(Diary):
    """Has an answer to every event of a step, and says that it hears of losses alone."""

    def hears(self, event):
        return event == "after_loss"

    def after_forward(self, batch):
        self.heard.append(("forward",))

    def after_backward(self):
        self.heard.append(("backward",))


def test_a_participant_is_told_only_of_events_that_it_says_it_hears():
    deaf = Deaf(plus=1.0)
    loop = Loop([deaf])
    loop.start(Fit(total_steps=1))
    loop.after_forward(BATCH)
    assert loop.after_loss(torch.tensor(2.0), BATCH).item() == 3.0
    loop.after_backward()
    loop.before_step()
    loop.after_step()
    assert deaf.heard == [("start", 1), ("loss", 2.0)]
