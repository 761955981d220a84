"""Searches for tickets that are interrupted, by a kill as well, go on after the last whole round to equal bytes."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fasterai.sparse.tickets.rounds import find_ticket
from fasterai.sparse.tickets.ticket import Ticket
from tests.ticket_nets import equal, net, tensors_of, train

ROOT = Path(__file__).parents[2]


def found(folder, train=train, seed=0, **options):
    model = net()
    torch.manual_seed(seed)
    return find_ticket(train, model, 0.5, rounds=3, folder=folder, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found(folder)
    return contents(folder)


def test_each_round_leaves_its_ticket(whole, tmp_path):
    assert list(whole) == ["round_01.safetensors", "round_02.safetensors", "round_03.safetensors"]
    pruned = []
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        ticket = Ticket.load(tmp_path / name)
        pruned.append(round(ticket.sparsity * 120))
        assert equal(ticket.weights, tensors_of(net()))
    # 1 - 0.5 ** (k / 3) of 120: 24.8, 44.4, 60
    assert pruned == [25, 44, 60]
    assert len(ticket.results) == 3 and ticket.settings["round"] == "3 of 3"


def test_without_a_folder_the_ticket_is_the_same(whole, tmp_path):
    found(None).save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == whole["round_03.safetensors"]


@pytest.mark.parametrize("stopped", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"schedule": "one_cycle"}, {"criteria": "movement", "rewind": 0.5}], ids=str)
def test_an_interrupted_search_goes_on_to_equal_bytes(stopped, options, tmp_path):
    calls = []

    def breaking(model, participants):
        calls.append(train(model, participants))
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        found(tmp_path / "a", breaking, **options)
    again = []
    # A new process draws other numbers, unless no round was whole.
    found(tmp_path / "a", lambda m, p: again.append(train(m, p)) or again[-1], seed=99 if stopped > 1 else 0, **options)
    found(tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(again) == 4 - stopped, "whole rounds are not trained again"


def test_a_killed_search_goes_on_to_equal_bytes(whole, tmp_path):
    script = f"""
        import os, signal, torch
        from fasterai.core.loop import Participant
        from fasterai.sparse.tickets.rounds import find_ticket
        from tests.ticket_nets import net, train

        class Killing(Participant):
            def after_step(self, position):
                if len(calls) == 3 and position == 0.5:
                    os.kill(os.getpid(), signal.SIGKILL)

        calls = []
        def killed(model, participants):
            calls.append(1)
            return train(model, [*participants, Killing()])

        torch.set_num_threads(1)
        model = net()
        torch.manual_seed(0)
        find_ticket(killed, model, 0.5, rounds=3, folder={str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(contents(tmp_path)) == ["round_01.safetensors", "round_02.safetensors"]
    torch.manual_seed(123)
    ticket = find_ticket(train, net(), 0.5, rounds=3, folder=tmp_path)
    assert contents(tmp_path) == whole
    assert ticket.stamp == Ticket.load(tmp_path / "round_03.safetensors").stamp


def test_a_finished_search_trains_nothing(whole, tmp_path):
    found(tmp_path)
    model = net()
    ticket = find_ticket(_never, model, 0.5, rounds=3, folder=tmp_path)
    ticket.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == whole["round_03.safetensors"]
    assert equal(tensors_of(model), {n: x * ticket.masks.get(n, 1) for n, x in ticket.weights.items()})


def _never(model, participants):
    raise AssertionError("nothing is left to train")


def test_a_folder_of_another_call_is_refused(tmp_path):
    found(tmp_path)
    files = contents(tmp_path)
    for options, message in (
        ({"criteria": "movement"}, "criteria was .*large_final.* and is .*movement"),
        ({"rewind": 0.5}, "rewind was 0.0 and is 0.5"),
        ({"targets": "first"}, "targets was None and is 'first'"),
    ):
        with pytest.raises(ValueError, match=f"folder must be of the same call, got .*{message}.*; pass another folder"):
            found(tmp_path, _never, **options)
    wider = net()
    wider.last = torch.nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"last.weight was \(3, 8\) and is \(4, 8\)"):
        find_ticket(_never, wider, 0.5, rounds=3, folder=tmp_path)
    assert contents(tmp_path) == files


def test_other_first_weights_are_said(tmp_path):
    found(tmp_path)
    model = net(seed=5)
    with pytest.warns(UserWarning, match="holds rounds of a model with other first weights: the search goes on with those"):
        ticket = find_ticket(_never, model, 0.5, rounds=3, folder=tmp_path)
    assert equal(ticket.weights, tensors_of(net()))


@pytest.mark.parametrize("content", [b"", b"nothing", b"torn", "list", "format", "random", "results"], ids=str)
def test_a_spoiled_file_is_refused(content, tmp_path):
    path = tmp_path / "rounds.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        found(tmp_path)
        state = torch.load(path, weights_only=True)
        torch.save([1] if content == "list" else {**state, content: 3}, path)
    model = net()
    before = tensors_of(model)
    with pytest.raises(ValueError, match=r"folder must hold what find_ticket has written, got .*rounds\.pt, which is none"):
        find_ticket(_never, model, 0.5, rounds=3, folder=tmp_path)
    assert equal(tensors_of(model), before)
