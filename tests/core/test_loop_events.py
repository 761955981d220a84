"""Who hears what in a loop, in which order, and under which names states are kept."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core.loop import EVENTS, Batch, Fit, Loop, Participant
from fasterai.core.types import Move
from fasterai.model.cuts import announce, announce_move


class Named(Participant):
    def __init__(self, name: str, heard: list[str]) -> None:
        self._name, self.heard, self.value = name, heard, 0

    @property
    def name(self) -> str:
        return self._name

    def on_fit_start(self, fit) -> None:
        self.heard.append(f"start {self._name}")

    def after_backward(self) -> None:
        self.heard.append(f"backward {self._name}")

    def on_fit_end(self, completed) -> None:
        self.heard.append(f"end {self._name}")

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state) -> None:
        self.value = state["value"]


def test_all_hear_in_the_order_in_which_they_were_given_of_the_end_too():
    heard: list[str] = []
    loop = Loop([Named("a", heard), Named("b", heard), Named("c", heard)])
    loop.start(Fit(1))
    loop.after_backward()
    loop.end(completed=True)
    assert heard == [f"{event} {name}" for event in ("start", "backward", "end") for name in "abc"]


def test_a_participant_hears_what_it_has_an_answer_to():
    class Both(Participant):
        def after_loss(self, loss, batch):
            return loss

        def metrics(self):
            return {}

    assert [event for event in EVENTS if Both().hears(event)] == ["after_loss", "metrics"]
    assert not any(Participant().hears(event) for event in EVENTS)
    assert Loop([Participant(), Both()]).wants("before_step", "after_loss")
    assert not Loop([Participant(), Both()]).wants("before_step", "after_step")
    assert not Loop([]).wants(*EVENTS)


def test_figures_of_one_name_are_numbered():
    class Says(Participant):
        def __init__(self, **figures: float) -> None:
            self.figures = figures

        def metrics(self):
            return self.figures

    loop = Loop([Says(sparsity=0.5, loss=1.0), Says(sparsity=0.75), Says(sparsity=0.9)])
    assert loop.metrics() == {"sparsity": 0.5, "loss": 1.0, "sparsity_2": 0.75, "sparsity_3": 0.9}


def test_moves_and_cuts_of_the_model_reach_the_participants_of_a_run():
    class Follows(Participant):
        def __init__(self) -> None:
            self.heard = []

        def after_move(self, move) -> None:
            self.heard.append(move)

        def after_cut(self, cut) -> None:
            self.heard.append(cut)

    model, other = nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3)
    follows = Follows()
    loop = Loop([follows, Participant()])
    move = Move({"0.weight": torch.ones(3, 2, dtype=torch.bool)}, {"0.weight": torch.zeros(3, 2, dtype=torch.bool)})
    announce_move(model, move)
    assert follows.heard == []  # no run yet
    loop.start(Fit(1, model=model))
    announce_move(model, move)
    announce_move(other, move)
    announce(model, {("0.weight", 0): np.array([0, 2])})
    assert follows.heard[0] is move and len(follows.heard) == 2
    assert [index.tolist() for index in follows.heard[1].values()] == [[0, 2]]


def test_states_go_by_name_whatever_the_order():
    loop = Loop([Named("a", []), Named("b", []), Named("a", [])])
    for value, participant in enumerate(loop.participants):
        participant.value = value
    state = loop.state_dict()
    assert state["participants"] == {"a": {"value": 0}, "b": {"value": 1}, "a:2": {"value": 2}}
    other = Loop([Named("b", []), Named("a", []), Named("a", [])])
    other.load_state_dict(state)
    assert [p.value for p in other.participants] == [1, 0, 2]


def test_states_of_earlier_versions_go_by_position():
    loop = Loop([Named("a", []), Named("b", [])])
    loop.load_state_dict({"step": 3, "participants": [{"value": 5}, {"value": 6}]})
    assert loop.step == 3 and [p.value for p in loop.participants] == [5, 6]


def test_a_participant_that_was_added_or_left_out_is_said():
    loop = Loop([Named("a", []), Named("b", [])])
    with pytest.warns(UserWarning, match="state and loop differ in the participant b: it begins afresh"):
        loop.load_state_dict({"step": 1, "participants": {"a": {"value": 5}}})
    assert [p.value for p in loop.participants] == [5, 0]
    with pytest.warns(UserWarning, match="state and loop differ in the participant c: it is left out"):
        loop.load_state_dict({"step": 1, "participants": {"a": {"value": 7}, "b": {"value": 8}, "c": {"value": 9}}})
    with pytest.raises(ValueError, match="state must hold a, b, got c"):
        loop.load_state_dict({"step": 1, "participants": {"c": {"value": 9}}})
    assert [p.value for p in loop.participants] == [7, 8]


def test_own_parameters_leave_at_every_end():
    class Owns(Participant):
        def __init__(self, fails: bool = False) -> None:
            self.own, self.fails = nn.Parameter(torch.zeros(1)), fails

        def on_setup(self, model):
            return [self.own]

        def on_fit_start(self, fit) -> None:
            if self.fails:
                raise RuntimeError("no")

    for fails, completed in ((False, True), (False, False), (True, False)):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loop = Loop([Owns(fails)])
        loop.setup(model, optimizer)
        assert len(optimizer.param_groups[0]["params"]) == 3
        if fails:
            with pytest.raises(RuntimeError, match="no"):
                loop.start(Fit(1, model=model))
        else:
            loop.start(Fit(1, model=model))
            loop.end(completed)
        assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (torch.ones(2), [1.0, 1.0]),
        ({"loss": 0.0, "logits": torch.zeros(1)}, [0.0]),
        ((3.0, torch.full((1,), 2.0), torch.ones(1)), [2.0]),
    ],
)
def test_logits_of_outputs(outputs, expected):
    assert Batch(outputs=outputs).logits.tolist() == expected


def test_outputs_without_logits_are_refused():
    for outputs in (None, {"loss": torch.ones(1)}, (1, 2)):
        with pytest.raises(ValueError, match="outputs must be a tensor, or have one of logits, got "):
            _ = Batch(outputs=outputs).logits
    with pytest.raises(ValueError, match="got a dict of scores, loss; return the logits under 'logits'"):
        _ = Batch(outputs={"scores": torch.ones(1), "loss": torch.ones(1)}).logits


def test_labels():
    assert Batch(targets=(1, 2), keywords={"labels": 3}).labels == 1
    assert Batch(keywords={"labels": 3}).labels == 3
    assert Batch().labels is None


# --- parameters that join with the first batch --------------------------------------------------------------------------


class Later(Participant):
    """Has a parameter as wide as the outputs, which only the first batch tells."""

    def __init__(self, fails: int = 0) -> None:
        self.own: list[nn.Parameter] = []
        self.seen: list[str] = []
        self.fails = fails

    def after_forward(self, batch) -> None:
        self.seen.append("forward")

    def on_first_batch(self, batch):
        self.seen.append("first")
        if self.fails:
            self.fails -= 1
            raise ValueError("outputs must be wider")
        self.own = [nn.Parameter(torch.ones(batch.logits.shape[1]))]
        return self.own

    def after_loss(self, loss, batch):
        self.seen.append("loss")
        return loss + self.own[0].square().sum()


class Early(Participant):
    """Has a parameter from the beginning."""

    def __init__(self) -> None:
        self.own = nn.Parameter(torch.ones(1))

    def on_setup(self, model):
        return [self.own]

    def after_loss(self, loss, batch):
        return loss + self.own.square().sum()


class Run:
    def __init__(self, *participants: Participant, total: int = 4, state=None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.1)
        self.loop = Loop(participants)
        self.loop.setup(self.model, self.optimizer)
        self.loop.start(Fit(total, model=self.model, optimizer=self.optimizer))
        if state is not None:
            self.loop.load_state_dict(state)

    def batch(self) -> torch.Tensor:
        outputs = self.model(torch.ones(1, 2))
        batch = Batch((torch.ones(1, 2),), outputs=outputs)
        self.loop.after_forward(batch)
        return self.loop.after_loss(outputs.sum(), batch)

    def step(self) -> None:
        self.batch().backward()
        self.loop.after_backward()
        self.loop.before_step()
        self.optimizer.step()
        self.loop.after_step()
        self.optimizer.zero_grad()

    @property
    def count(self) -> int:
        return len(self.optimizer.param_groups[0]["params"])


def test_parameters_join_with_the_first_batch_once_and_leave_with_the_run():
    later, early = Later(), Early()
    run = Run(later, early, Participant())
    assert run.count == 3
    run.step()
    assert run.count == 4 and later.seen == ["forward", "first", "loss"]
    kept = run.optimizer.state[early.own]["step"].clone()
    run.step()
    assert later.seen == ["forward", "first", "loss", "forward", "loss"]
    assert float(run.optimizer.state[early.own]["step"]) == float(kept) + 1 == 2  # its state went on
    assert (later.own[0] < 1).all()
    run.loop.end(True)
    assert run.count == 2
    run.loop.setup(run.model, run.optimizer)  # a second run asks again
    run.loop.start(Fit(1, model=run.model, optimizer=run.optimizer))
    run.step()
    assert later.seen.count("first") == 2 and run.count == 4


def test_a_first_batch_that_is_refused_is_none_and_nothing_has_joined():
    later = Later(fails=1)
    run = Run(later)
    with pytest.raises(ValueError, match="outputs must be wider"):
        run.batch()
    assert run.count == 2
    run.step()
    assert run.count == 3 and later.seen == ["forward", "first", "forward", "first", "loss"]
    run.loop.end(False)


def test_what_is_no_list_of_parameters_is_refused():
    class Wrong(Participant):
        def on_first_batch(self, batch):
            return torch.ones(2)

    run = Run(Wrong())
    with pytest.raises(TypeError, match=r"Wrong.on_first_batch must return a list of parameters, \[\] for none, got a tensor"):
        run.batch()
    assert run.count == 2
    run.loop.end(False)


def test_a_run_whose_parameters_come_with_the_first_batch_resumes():
    finals = []
    for resumes in (False, True):
        run = Run(later := Later(), early := Early())
        for i in range(4):
            if resumes and i == 2:
                state, weights = run.loop.state_dict(), {n: v.clone() for n, v in run.model.state_dict().items()}
                values, held = (later.own[0].detach().clone(), early.own.detach().clone()), run.optimizer.state_dict()
                run.loop.end(False)
                run = Run(later := Later(), early := Early(), state=state)
                run.model.load_state_dict(weights)
                run.optimizer.load_state_dict(held)
                with torch.no_grad():
                    early.own.copy_(values[1])
                assert run.loop.state_dict()["joined"] is state["joined"]  # saved anew before the first batch
                later.on_first_batch = partial(_made_as, later, values[0])
            run.step()
        finals.append([later.own[0].detach(), early.own.detach(), *(p.detach() for p in run.model.parameters())])
        run.loop.end(True)
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def _made_as(later, value, batch):
    later.own = [nn.Parameter(value.clone())]
    return later.own


def test_a_state_of_other_parameters_is_refused_at_the_first_batch_and_again():
    run = Run(Later())
    run.step()
    state = run.loop.state_dict()
    run.loop.end(True)
    two = {"states": state["joined"]["states"] * 2, "owners": ["Later", "Later"]}
    again = Run(Later(), state={**state, "joined": two})
    for _ in range(2):
        with pytest.raises(ValueError, match="state must be of 1 joined parameters of Later, got 2"):
            again.batch()
    again.loop.end(False)
    assert again.count == 2


def test_loops_of_earlier_versions_have_no_first_batch():
    loop = Loop([Participant()])
    for name in ("_awaits_batch", "_joined_later"):
        vars(loop).pop(name, None)
    loop.start(Fit(1))
    loop.after_forward(Batch())
    assert "joined" not in loop.state_dict()
    loop.end(True)


def test_ordinary_participants_take_a_saved_state_of_theirs_over_at_once():
    early = Early()
    run = Run(early)
    run.step()
    state = run.loop.state_dict()
    run.loop.end(True)
    again = Run(other := Early(), state=state)
    assert float(again.optimizer.state[other.own]["step"]) == 1
    again.loop.end(True)
