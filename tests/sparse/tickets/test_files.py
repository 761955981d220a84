"""Files of tickets: bit-equal, compact, and refused where they are none."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fasterai.core.files import write_tensors
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.files import _sum
from fasterai.sparse.tickets.ticket import Ticket
from tests.networks import residual
from tests.ticket_nets import equal, net, tensors_of


def ticket_of(model: nn.Module, granularity="weight", **options) -> Ticket:
    first = tensors_of(model)
    sparsifier = Sparsifier(model, granularity, "global", "large_final", **options)
    sparsifier.sparsify_model(0.5)
    found = Ticket.of(sparsifier, first)
    return Ticket(found.weights, found.units, {**found.settings, "note": "äöü"}, [0.5, None, 0.25])


@pytest.fixture(params=["weight", "coupled"])
def ticket(request) -> Ticket:
    images = torch.randn(2, 3, 6, 6)
    return ticket_of(net()) if request.param == "weight" else ticket_of(residual(), "coupled", example_inputs=images)


def test_what_is_loaded_is_what_was_saved(ticket, tmp_path):
    ticket.save(tmp_path / "a.safetensors")
    loaded = Ticket.load(tmp_path / "a.safetensors")
    assert equal(loaded.weights, ticket.weights) and equal(loaded.masks, ticket.masks)
    assert {n: x.dtype for n, x in loaded.weights.items()} == {n: x.dtype for n, x in ticket.weights.items()}
    assert (loaded.settings, loaded.results, loaded.stamp) == (ticket.settings, ticket.results, ticket.stamp)
    loaded.save(str(tmp_path / "b.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_decision_takes_a_bit(tmp_path):
    model = nn.Linear(512, 256)
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    Ticket.of(sparsifier, tensors_of(model)).save(tmp_path / "t.safetensors")
    weights, decisions, places = 4 * (512 * 256 + 256), 512 * 256 // 8, 4 * (512 + 256)
    assert 0 < (tmp_path / "t.safetensors").stat().st_size - weights - decisions - places < 1500  # the header


def test_half_precision_and_scalars_survive(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    Ticket.of(sparsifier, tensors_of(model)).save(tmp_path / "t.safetensors")
    assert equal(Ticket.load(tmp_path / "t.safetensors").weights, tensors_of(model) | {"0.weight": _first(tmp_path)})


def _first(folder):
    with safe_open(str(folder / "t.safetensors"), "pt") as file:
        return file.get_tensor("weights/0.weight")


def read(path):
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


SPOILED = {
    "another format": (lambda h, t: h.update(format="other"), "a ticket's format"),
    "no stamp": (lambda h, t: h.pop("stamp"), "the content that it was saved with"),
    "settings that are none": (lambda h, t: h.update(settings="[]"), "settings in words"),
    "results in words": (lambda h, t: h.update(results='["good"]'), "results that are numbers"),
    "units that are none": (lambda h, t: h.update(units='[["first.weight"]]'), "units"),
    "no units": (lambda h, t: h.pop("units"), "units"),
    "decisions missing": (lambda h, t: t.pop("keep/0"), "decisions of first.weight"),
    "too few decisions": (lambda h, t: t.update({"keep/0": t["keep/0"][:2]}), "decisions of first.weight"),
    "a place missing": (lambda h, t: t.pop("place/0/0"), "a place of units in first.weight"),
    "a place of no weight": (lambda h, t: t.pop("weights/first.weight"), "a place of units in first.weight"),
    "a weight of another size": (
        lambda h, t: t.update({"weights/first.weight": torch.ones(3)}),
        "a place of units in first.weight",
    ),
    "units that there are not": (lambda h, t: t["place/0/0"].add_(40), "units in first.weight that there are"),
    "no JSON": (lambda h, t: h.update(units="["), "Expecting value"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_each_part_is_checked(what, tmp_path):
    ticket_of(net()).save(tmp_path / "t.safetensors")
    header, tensors = read(tmp_path / "t.safetensors")
    change, message = SPOILED[what]
    change(header, tensors)
    if "stamp" in header:  # a file that was made so
        header["stamp"] = _sum(header, tensors)
    write_tensors(tmp_path / "t.safetensors", tensors, header)
    with pytest.raises(ValueError, match=f"path must be a file that Ticket.save wrote, got .*{message}"):
        Ticket.load(tmp_path / "t.safetensors")


def test_a_changed_weight_is_noticed(tmp_path):
    ticket_of(net()).save(tmp_path / "t.safetensors")
    content = bytearray((tmp_path / "t.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="the content that it was saved with"):
        Ticket.load(tmp_path / "t.safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(size, tmp_path):
    ticket_of(net()).save(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"path must be a file that Ticket\.save wrote"):
        Ticket.load(tmp_path / "t.safetensors")


def test_another_file_of_tensors_is_refused_and_a_missing_one_is_said(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a ticket's format"):
        Ticket.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        Ticket.load(tmp_path / "none.safetensors")


def test_the_header_is_readable_by_others(tmp_path):
    ticket_of(net()).save(tmp_path / "t.safetensors")
    header, _ = read(tmp_path / "t.safetensors")
    assert header["format"] == "fasterai-ticket-1" and json.loads(header["settings"])["granularity"] == "weight"
