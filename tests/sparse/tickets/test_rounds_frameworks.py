"""Tickets are found and trained in every framework, and a training of one goes on bit for bit."""

import pytest
import torch

from fasterai.sparse.tickets.rounds import find_ticket
from fasterai.sparse.tickets.ticket import Ticket
from tests.callbacks.test_own_method import FRAMEWORKS, Net
from tests.ticket_nets import equal, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ticket() -> Ticket:
    """A ticket whose weights are those of no new network."""
    model = Net()
    with torch.no_grad():
        model.body.weight.mul_(2)

    def short(model, participants):
        return FRAMEWORKS[0](model, participants, None, stop=False, resume=False)

    return find_ticket(short, model, 0.5, rounds=2)


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_a_ticket_is_found(run, tmp_path):
    model, first, began = Net(), tensors_of(Net()), []

    def train(model, participants):
        began.append(tensors_of(model))
        run(model, participants, tmp_path, stop=False, resume=False)
        assert not any(torch.equal(x, first[name]) for name, x in tensors_of(model).items())

    ticket = find_ticket(train, model, 0.5, rounds=2)
    assert equal(ticket.weights, first) and len(began) == 2
    # Of 48 + 24 weights 1 - 0.5 ** 0.5, then half.
    assert sum(int((x == 0).sum()) for x in began[1].values()) == 21 and ticket.sparsity == 0.5
    assert equal(tensors_of(model), {name: x * ticket.masks.get(name, 1) for name, x in first.items()})


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_a_resumed_training_of_a_ticket_is_the_same_bit_for_bit(run, ticket, tmp_path):
    whole, stopped, resumed = Net(), Net(), Net()
    run(whole, [ticket.apply(whole)], tmp_path / "whole", stop=False, resume=False)
    (tmp_path / "parts").mkdir()
    run(stopped, [ticket.apply(stopped)], tmp_path / "parts", stop=True, resume=False)
    run(resumed, [ticket.apply(resumed)], tmp_path / "parts", stop=False, resume=True)
    assert equal(tensors_of(whole), tensors_of(resumed))
    assert all((whole.get_parameter(name)[~mask] == 0).all() for name, mask in ticket.masks.items())
