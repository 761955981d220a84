import inspect

import pytest
from torch import nn
from torch.nn.parallel import DataParallel

import fasterai.callbacks.fastai as with_fastai
import fasterai.callbacks.lightning as with_lightning
from fasterai.callbacks.settings import SparsifySettings
from fasterai.core import schedules
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket

CALLBACKS = [with_fastai.SparsifyCallback, with_lightning.SparsifyCallback]
GOOD = {
    "sparsity": 0.5,
    "granularity": "weight",
    "context": "local",
    "criteria": "large_final",
    "schedule": "one_cycle",
}


def settings(lth=False, rewind_epoch=0, reset_end=False, save_tickets=False, **options) -> SparsifySettings:
    ticket = {"lth": lth, "rewind_epoch": rewind_epoch, "reset_end": reset_end, "save_tickets": save_tickets}
    return SparsifySettings(*GOOD.values(), **ticket, options=options)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_the_arguments_in_their_familiar_order(callback):
    names = list(inspect.signature(callback).parameters)
    assert names == [
        "sparsity",
        "granularity",
        "context",
        "criteria",
        "schedule",
        "lth",
        "rewind_epoch",
        "reset_end",
        "save_tickets",
        "model",
        "round_to",
        "nm",
        "layer_type",
        "options",
    ]


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("sparsity", 50, ValueError, r"sparsity must be in \[0, 1\], got 50; pass 0\.5 for 50 %"),
        ("sparsity", -0.1, ValueError, r"sparsity must be in \[0, 1\], got -0\.1"),
        ("sparsity", float("nan"), ValueError, r"sparsity must be in \[0, 1\], got nan"),
        ("sparsity", "0.5", TypeError, r"sparsity must be a number in \[0, 1\], got '0\.5'"),
        ("sparsity", {"0": 30}, ValueError, r"sparsity must be in \[0, 1\], got 30; pass 0\.3"),
        ("granularity", "filters", ValueError, "granularity must be one of .*, got 'filters'; did you mean 'filter'"),
        ("context", "globe", ValueError, "context must be one of .*, got 'globe'"),
        ("criteria", "large", ValueError, "criteria must be one of .*, got 'large'"),
        ("criteria", schedules.one_cycle, TypeError, "a schedule; are criteria and schedule in each other's place"),
        ("criteria", 3, TypeError, "criteria must be a criterion, its name, or a function of the weight, got 3"),
        ("schedule", "one_cycel", ValueError, "schedule must be one of .*, got 'one_cycel'; did you mean 'one_cycle'"),
        ("schedule", 3, TypeError, "schedule must be a schedule, its name, or a function of the position, got 3"),
        ("rounds_to", 8, TypeError, "unexpected keyword argument 'rounds_to'"),
    ],
)
def test_what_needs_no_model_is_checked_at_once(callback, argument, value, error, message):
    with pytest.raises(error, match=message):
        callback(**{**GOOD, argument: value})


@pytest.mark.parametrize("callback", CALLBACKS)
def test_tickets_need_lth(callback):
    with pytest.raises(ValueError, match="save_tickets must be left out without lth=True, got True"):
        callback(**GOOD, save_tickets=True)


def test_one_sparsifier_for_each_model():
    ours, model, other = settings(), nn.Linear(4, 4), nn.Linear(4, 4)
    (first,) = ours.participants(model)
    assert isinstance(first, Sparsifier) and first is ours.sparsifier
    assert ours.participants(model) == [first]
    wrapped = DataParallel(model)
    assert ours.participants(wrapped) == [first] and first.model is wrapped
    (second,) = ours.participants(other)
    assert second is not first and second is ours.sparsifier and second.model is other


def test_options_reach_the_sparsifier():
    ours = settings(max_updates=7, targets="1.weight", round_to=2)
    (sparsifier,) = ours.participants(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert sparsifier.max_updates == 7 and sparsifier.round_to == 2
    assert [t.name for t in sparsifier.targets] == ["1.weight"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"rewind_epoch": 1}, None),
        ({"lth": True}, (True, 0, False)),
        ({"lth": True, "rewind_epoch": 2, "reset_end": True}, (True, 2, True)),
        ({"reset_end": True}, (False, 0, True)),
    ],
)
def test_lottery_tickets(arguments, expected, tmp_path):
    participants = settings(**arguments).participants(nn.Linear(4, 4), tmp_path)
    if expected is None:
        assert len(participants) == 1
    else:
        sparsifier, ticket = participants
        assert isinstance(ticket, LotteryTicket) and ticket.sparsifier is sparsifier
        assert (ticket.rewind, ticket.rewind_epoch, ticket.reset_end) == expected
        assert ticket.save_tickets == tmp_path


def test_arguments_are_kept_unchanged():
    shares = {"0": 0.5}
    ours = SparsifySettings(
        shares,
        "weight",
        "local",
        "large_final",
        "agp",
        lth=False,
        rewind_epoch=0,
        reset_end=False,
        save_tickets=False,
        options={},
    )
    ours.participants(nn.Sequential(nn.Linear(4, 4)))
    assert ours.options["sparsity"] is shares and shares == {"0": 0.5}


def test_a_dict_as_context_gives_the_sparsities():
    ticket = {"lth": False, "rewind_epoch": 0, "reset_end": False, "save_tickets": False, "options": {}}
    found = SparsifySettings(None, "weight", {"0": 0.25}, "large_final", "lin", **ticket)
    (sparsifier,) = found.participants(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    sparsifier.sparsify_model()
    assert dict(sparsifier.sparsity) == {"0.weight": 0.25, "1.weight": 0.0}
    with pytest.raises(ValueError, match=r"sparsity must be None where a dict as context gives each target its own, got 0\.5"):
        SparsifySettings(0.5, "weight", {"0": 0.25}, "large_final", "lin", **ticket)
