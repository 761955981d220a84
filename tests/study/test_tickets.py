"""Study of lottery tickets: each kind of run trains what it says."""

from __future__ import annotations

import pytest
import torch

from fasterai.sparse.tickets.rounds import find_ticket
from fasterai.study import tickets
from fasterai.study.data import load_data
from fasterai.study.description import SIZES, Size
from fasterai.study.tickets import DENSE, FOUND, ONE_CYCLE, ONE_SHOT, OTHERS, RANDOM, ROUNDS, SPARSITIES, trial

SIZE = Size("tiny", 96, 60, 8, epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


def run(data, what, k=0):
    return trial({"what": what, "sparsity": SPARSITIES[k]}, 0, SIZE, data)


def test_a_ticket_that_the_next_round_has_trained_is_the_one_trained_by_itself(data):
    network = tickets._network(0, data)
    once = tickets._training(0, SIZE, data)
    ticket = find_ticket(once, network, SPARSITIES[1], rounds=2)
    assert ticket.sparsity == pytest.approx(0.75, abs=1e-4)
    assert once(network, [ticket.apply(network)]) == run(data, FOUND, 1)["accuracy"]
    dense = tickets._network(0, data)
    assert once(dense, [ticket.dense().apply(dense)]) == run(data, DENSE)["accuracy"]


def test_one_shot_of_half_the_weights_is_the_first_round(data):
    assert run(data, ONE_SHOT) == run(data, FOUND)


@pytest.mark.parametrize("what", [FOUND, ONE_SHOT, ONE_CYCLE, RANDOM, OTHERS])
def test_what_is_trained_has_the_masks_and_weights_that_it_says(what, data, monkeypatch):
    held = []
    apply = tickets.Ticket.apply
    monkeypatch.setattr(tickets.Ticket, "apply", lambda self, model: held.append(self) or apply(self, model))
    found = tickets._search(0, SIZE, data)
    held.clear()
    figures = run(data, what, ROUNDS - 1)
    ticket, last = held[-1], found.tickets[-1]
    assert ticket.sparsity == pytest.approx(SPARSITIES[-1], abs=1e-3)
    same_masks = all(torch.equal(mask, last.masks[name]) for name, mask in ticket.masks.items())
    same_weights = torch.equal(ticket.weights["0.weight"], last.weights["0.weight"])
    assert (same_masks, same_weights) == (what in (FOUND, OTHERS), what != OTHERS)
    assert figures["trainings"] == (2 if what in (ONE_SHOT, ONE_CYCLE) else ROUNDS + 1)


def test_the_study_holds_four_against_each_other_at_five_sparsities():
    settings = tickets.STUDY.settings("small")
    assert len(settings) == 1 + 5 * ROUNDS and SIZES["small"].images > tickets.STUDY.size("small").images
