"""The record of masks: moves are told by decisions, not by counts; states of the present format load."""

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.granularities import filter, weight
from fasterai.model.targets import find_targets
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.sparsifier import Sparsifier
from tests.messages import heard

T, F = True, False


def record(granularity=weight):
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    return MaskRecord(model, granularity, find_targets(model, fits=lambda t: None, coarse=False))


def decisions(first, second=(T, T)):
    return {"0.weight": torch.tensor([first]), "1.weight": torch.tensor(second).view(2, 1)}


def test_new_decisions_are_a_move_of_the_pools_that_changed():
    held = record()
    move = held.replace(decisions([T, F, T]))
    assert {n: k.tolist() for n, k in move.before.items()} == {"0.weight": [[T, T, T]]}
    assert {n: k.tolist() for n, k in move.after.items()} == {"0.weight": [[T, F, T]]}
    assert held.moves == 1


def test_the_same_decisions_are_no_move():
    held = record()
    held.replace(decisions([T, F, T]))
    move = held.replace(decisions([T, F, T]))
    assert not move.before
    assert not move.after
    assert held.moves == 1
    assert not record().replace(decisions([T, T, T])).after, "a dense pool without any decisions is all True"


def test_other_decisions_of_equal_counts_are_a_move():
    held = record()
    held.replace(decisions([T, F, T]))
    move = held.replace(decisions([F, T, T]))
    assert move.before["0.weight"].tolist() == [[T, F, T]]
    assert move.after["0.weight"].tolist() == [[F, T, T]]
    assert held.moves == 2


def test_decisions_of_other_pools_stay():
    held = record()
    held.replace(decisions([T, F, T], (F, T)))
    move = held.replace({"0.weight": torch.tensor([[F, F, T]])})
    assert list(move.after) == ["0.weight"]
    assert held.keep["1.weight"].flatten().tolist() == [F, T]


def test_masks_are_written_for_the_new_decisions():
    held = record()
    with torch.no_grad():
        held.model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    held.replace(decisions([T, F, T]))
    held.apply_()
    assert held.model[0].weight.tolist() == [[1.0, 0.0, 3.0]]
    held.replace(decisions([F, T, T]))
    held.apply_()
    assert held.model[0].weight.tolist() == [[0.0, 0.0, 3.0]]


def test_vectors_of_outputs_that_change_places_are_noted_and_given_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    held = MaskRecord(model, filter, find_targets(model, fits=lambda t: None, coarse=True))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([5.0, 7.0]))
    keep = torch.tensor([F, T]).view(2, 1, 1, 1)
    held.replace({"0.weight": keep})
    held.apply_()
    assert model[0].bias.tolist() == [0.0, 7.0]
    held.replace({"0.weight": ~keep})
    held.apply_()
    assert model[0].bias.tolist() == [5.0, 0.0]


def test_a_state_of_the_present_format_loads():
    """As `state_dict()` of the first format was: a literal, with no more keys than it had."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    sparsifier = Sparsifier(model, "weight", sparsity=0.5)
    state = {
        "format": 1,
        "granularity": "weight",
        "shapes": {"0.weight": [1, 3], "1.weight": [2, 1]},
        "keep": {"0.weight": torch.tensor([[T, F, T]]), "1.weight": torch.tensor([[F], [T]])},
        "noted": {},
        "trained": ["0.weight", "1.weight"],
        "initial": {},
        "previous": {},
        "share": 0.25,
        "asked": [2, 1, 1, "0.weight", "1.weight", 3, 2],
        "finished": False,
    }
    sparsifier.load_state_dict(state)
    assert sparsifier.masks["0.weight"].tolist() == [[T, F, T]]
    assert sparsifier.masks["1.weight"].tolist() == [[F], [T]]
    assert sparsifier.sparsity.overall == 2 / 5
    again = sparsifier.state_dict()
    assert {key: again[key] for key in ("share", "asked", "finished", "trained")} == {
        key: state[key] for key in ("share", "asked", "finished", "trained")
    }


@pytest.mark.parametrize("key", ["granularity", "keep", "asked"])
def test_a_state_that_lacks_something_is_refused_by_name(key):
    sparsifier = Sparsifier(nn.Linear(3, 2), "weight", targets="weight")
    state = sparsifier.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"one without {key}"):
        sparsifier.load_state_dict(state)


# --- layers that were replaced ------------------------------------------------------------------------------------------


def replacing(at: int, **options):
    """Train ten steps, before one of which the first layer is replaced; return the model and what is said."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.5, schedule="lin", **options)
    with heard("not in the model any more") as said, attach(optimizer, sparsifier, total_steps=10):
        for k in range(10):
            if k == at:
                model[0] = nn.Linear(6, 10)
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
    return said


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_layer_that_was_replaced_in_a_run_is_named_once(at):
    (message,) = replacing(at)
    assert message.startswith("the layer of 0.weight is not in the model any more, and what was put in its place is dense")


def test_a_layer_that_was_replaced_after_the_last_move_is_named_at_the_end():
    assert len(replacing(9, max_updates=1)) == 1
    assert replacing(10) == []


def test_a_layer_that_was_replaced_is_named_at_a_choice_at_once():
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    sparsifier = Sparsifier(model)
    model[1] = nn.Linear(10, 4)
    with pytest.warns(UserWarning, match=r"the layer of 1\.weight is not in the model any more"):
        sparsifier.sparsify_model(0.5)


def test_moves_go_on_being_counted_after_a_resumption():
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(0.25)
    sparsifier.sparsify_model(0.5)
    state = sparsifier.state_dict()
    other = Sparsifier(model)
    other.load_state_dict(state)
    assert other.moves == 2
    del state["moves"]  # as in those of earlier versions
    fresh = Sparsifier(model)
    fresh.load_state_dict(state)
    assert fresh.moves == 0
