"""Saved states that were changed by accident: refused with nothing changed, or the run ends as ever."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from fasterai.sparse.tickets.point import RewindPoint
from fasterai.sparse.tickets.ticket import Ticket
from fasterai.units.rules import DropAndGrow

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = torch.randn(8, 6, 1, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
STEPS, STOP = 8, 4


class Adapter(Participant):
    """Trains a parameter of its own."""

    def __init__(self):
        self.own = nn.Parameter(torch.ones(3))

    def on_setup(self, model):
        return [self.own]

    def after_loss(self, loss, batch):
        return loss + (self.own**2).sum()

    def state_dict(self):
        return {"own": self.own.detach().clone()}

    def load_state_dict(self, state):
        if not isinstance(state.get("own"), Tensor) or state["own"].shape != (3,) or not state["own"].isfinite().all():
            raise ValueError("state's own must be three numbers")
        with torch.no_grad():
            self.own.copy_(state["own"])


def masks(model):
    sparsifier = Sparsifier(model, "weight", "global", "movement", sparsity=0.6, schedule="lin")
    return [sparsifier, Adapter()]


def tickets(model):
    sparsifier = Sparsifier(model, "filter", "local", targets="0", sparsity=0.5, schedule="iterative", example_inputs=X)
    return [sparsifier, LotteryTicket(sparsifier)]


def exchange(model):
    rule = DropAndGrow(every=2, until=0.9, grow="large_final")
    return [Sparsifier(model, "weight", "local", sparsity=0.5, schedule="one_shot", rule=rule)]


def removal(model):
    return [GradualPruner(model, 0.5, "local", "movement", "lin", example_inputs=X, round_to=1)]


def held_ticket(model):
    """Holds the masks of a ticket, beside the note of a moment that a search for one goes back to."""
    first = {name: x.clone() for name, x in model.state_dict().items()}
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(0.5)
    return [Ticket.of(sparsifier, first).apply(model), RewindPoint(model, position=0.25)]


KINDS = {"masks": masks, "tickets": tickets, "exchange": exchange, "removal": removal, "held ticket": held_ticket}


def run(kind: str, upto: int, state: Any = None) -> tuple[list[Tensor], Any, Any]:
    """Train up to a step, from the start or from (weights, optimizer, handle's state); return weights, states and handle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = attach(optimizer, *KINDS[kind](model), total_steps=STEPS, model=model)
    if state is not None:
        before = copy.deepcopy((handle.state_dict(), handle.loop.step))
        try:
            handle.load_state_dict(state["handle"])
        except (ValueError, TypeError):
            assert same(before, (handle.state_dict(), handle.loop.step)), "a refused state has changed something"
            handle.remove(False)
            raise
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for _ in range(handle.loop.step, upto):
        handle.loss(F.cross_entropy(model(X), Y), X, Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    handle.remove(upto == STEPS)
    return [p.detach().clone() for p in model.parameters()], copy.deepcopy(saved), handle


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@functools.cache
def good(kind: str) -> tuple[Any, list[Tensor]]:
    _, state, _ = run(kind, STOP)
    end, _, _ = run(kind, STEPS, copy.deepcopy(state))
    return state, end


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry of nested dicts and lists; of lists of plain numbers only the list itself."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


WRONG = {
    "None": None, "text": "x", "negative": -5, "NaN": float("nan"), "infinity": float("inf"), "huge": 1e300,
    "a list of None": [None], "a dict": {"a": 1}, "True": True, "NaN tensor": torch.full((2,), float("nan")),
    "tensor": torch.ones(2, 2), "an empty list": [], "half": 0.5, "huge whole": 10**30,
}  # fmt: skip


def is_a_choice(path: tuple[Any, ...], wrong: str) -> bool:
    """Tell if a change leaves a state as good as the one before, of another run, which then rightly ends elsewhere.

    A share of the schedule may be 0.5, a pool without a mask is dense, and how many channels there were at first, or what an
    attribute was, no check can know. What the optimizer keeps of a parameter is known to the optimizer.
    """
    key, holder = path[-1], path[-2] if len(path) > 1 else None
    of_schedule = key in {"share", "done"} and wrong == "half"
    of_counts = (holder == "original" or key == "moves") and wrong == "huge whole"
    of_masks = holder == "keep" and wrong == "deleted"
    of_optimizer = path[:1] == ("joined",) and len(path) > 3
    return of_schedule or of_counts or of_masks or of_optimizer or bool({"attributes", "slim"} & set(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_not_changed_ends_as_the_run_would_have(kind):
    straight, _, _ = run(kind, STEPS)
    assert same(good(kind)[1], straight)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_changed_state_is_refused_and_changes_nothing_or_ends_alike(kind, data):
    state, end = good(kind)
    state = copy.deepcopy(state)
    path = data.draw(st.sampled_from(list(places(state["handle"]))))
    wrong = data.draw(st.sampled_from([*WRONG, "deleted", "added"]))
    if is_a_choice(path, wrong):
        return
    *way, key = path
    node = functools.reduce(lambda inner, k: inner[k], way, state["handle"])
    if wrong == "deleted":
        del node[key]
    elif wrong == "added":
        node.update({"of a later version": 1}) if isinstance(node, dict) and not way else None
    else:
        node[key] = WRONG[wrong]
    given_state = copy.deepcopy(state["handle"])
    try:
        found, _, _ = run(kind, STEPS, state)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert "state" in text or "total_steps" in text or "plan must" in text, text
    else:
        assert same(found, end), f"{path} {wrong}: the run ends elsewhere"
    assert repr(given_state) == repr(state["handle"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": -5}, ValueError, "state's step must be at least 0, got -5"),
        ({"step": "4"}, TypeError, "state's step must be a whole number of at least 0, got '4'"),
        ({"step": float("nan")}, ValueError, "state's step must be a finite whole number"),
        ({"participants": None}, TypeError, "state's participants must be a list, got None"),
        ({"participants": {"Sparsifier": 3}}, TypeError, "state's participants of Sparsifier must be a dict, got 3"),
        ({"joined": {"states": None}}, TypeError, "state's states must be a list, got None"),
        ({"joined": {"states": [{}], "owners": []}}, ValueError, "must have an owner for each of 1 states, got 0"),
    ],
)
def test_parts_of_a_loop_are_named(change, error, message):
    state = {**copy.deepcopy(good("masks")[0]), "model": {}, "optimizer": {}}
    state["handle"] |= change
    with pytest.raises(error, match=message):
        run("masks", STEPS, state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"share": None}, TypeError, r"state's share must be a number in \[0, 1\], got None"),
        ({"share": float("nan")}, ValueError, r"state's share must be in \[0, 1\], got nan"),
        ({"share": 2.0}, ValueError, r"state's share must be in \[0, 1\], got 2\.0"),
        ({"finished": "no"}, TypeError, "state's finished must be True or False, got 'no'"),
        ({"asked": "x"}, TypeError, "state's asked must be a list of names and numbers, got 'x'"),
        ({"trained": [1]}, TypeError, "state's trained's entries must be text, got 1"),
        ({"moves": -1}, ValueError, "state's moves must be at least 0, got -1"),
        ({"keep": {"0.weight": [True]}}, TypeError, r"state's keep of 0\.weight must be a tensor"),
        ({"noted": {"0.bias": torch.tensor([float("nan")])}}, ValueError, r"state's noted of 0\.bias must be finite"),
        ({"initial": None}, TypeError, "state's initial must be a dict, got None"),
        (
            {"initial": {"0.weight": torch.ones(1, device="meta")}},
            ValueError,
            r"state's initial of 0\.weight must hold values, got a tensor on the meta device",
        ),
        (
            {"keep": {"0.weight": torch.ones(1, device="meta")}},
            ValueError,
            r"state's keep of 0\.weight must hold values, got a tensor on the meta device",
        ),
        ({"shapes": {"0.weight": "x"}}, TypeError, r"state's shapes of 0\.weight must be a list, got 'x'"),
    ],
)
def test_parts_of_a_sparsifier_are_named(change, error, message):
    state = copy.deepcopy(good("masks")[0])
    state["handle"]["participants"]["Sparsifier"] |= change
    with pytest.raises(error, match=message):
        run("masks", STEPS, state)


@pytest.mark.parametrize("values", [torch.ones(0), torch.ones(1, 4), torch.ones(5)])
def test_noted_values_of_another_shape_are_refused(values):
    state = copy.deepcopy(good("tickets")[0])
    noted = state["handle"]["participants"]["Sparsifier"]["noted"]
    name = next(iter(noted))
    noted[name] = values
    with pytest.raises(ValueError, match=r"state's noted must be of shape \(\d+,\) for "):
        run("tickets", STEPS, state)


def test_earlier_weights_of_a_part_of_the_targets_are_refused():
    state = copy.deepcopy(good("masks")[0])
    earlier = state["handle"]["participants"]["Sparsifier"]["initial"]
    assert len(earlier) > 1
    del earlier["0.weight"]
    with pytest.raises(ValueError, match=r"must be those of all targets or of none, got them without 0\.weight"):
        run("masks", STEPS, state)


@pytest.mark.parametrize(
    ("kind", "name", "change", "error", "message"),
    [
        (
            "tickets",
            "LotteryTicket",
            {"saved": {"0.weight": torch.ones(1)}},
            ValueError,
            "state's saved weights must be of this",
        ),
        ("tickets", "LotteryTicket", {"saved": 3}, TypeError, "state's saved must be a dict, got 3"),
        ("removal", "GradualPruner", {"done": None}, TypeError, "state's done must be a number"),
        ("removal", "GradualPruner", {"plans": [{}]}, ValueError, "got one without shapes, keep"),
        ("removal", "GradualPruner", {"channels": {"0.weight": [1]}}, ValueError, r"state's channels of 0\.weight must be the"),
        ("removal", "GradualPruner", {"pruner": {"original": 1, "initial": {}, "previous": {}}}, TypeError, "state's original"),
    ],
)
def test_parts_of_others_are_named(kind, name, change, error, message):
    state = copy.deepcopy(good(kind)[0])
    state["handle"]["participants"][name] |= change
    with pytest.raises(error, match=message):
        run(kind, STEPS, state)
