"""Units as data: the masks that are read off them are those of the sparsifier, for every granularity."""

import pytest
import torch
from torch import nn

import fasterai
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.units import Place, Units, masks_of, read_units
from tests.networks import residual

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def masked(granularity, **options) -> Sparsifier:
    model = residual()
    sparsifier = Sparsifier(model, granularity, "global", "large_final", example_inputs=IMAGES, **options)
    sparsifier.sparsify_model(0.5)
    return sparsifier


def by_place(sparsifier: Sparsifier) -> dict[str, torch.Tensor]:
    """Masks of weights, biases and norms, as the record has them."""
    return {name: mask.expand(p.shape) for name, p, mask in sparsifier._record.masked()}


GRANULARITIES = ["weight", "kernel", "filter", "row", "shared_kernel", "coupled", "layer", fasterai.Block(2, 3)]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_masks_are_those_of_the_sparsifier(granularity):
    sparsifier = masked(granularity)
    shapes = {name: tuple(p.shape) for name, p in sparsifier.model.named_parameters()}
    units = read_units(sparsifier._record)
    found, wanted = masks_of(units, shapes), by_place(sparsifier)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [one.pruned for one in units] == [sparsifier._record.pruned(pool) for pool in sparsifier._record.pools]


def test_places_are_a_few_numbers_whatever_the_size():
    sparsifier = Sparsifier(nn.Linear(200, 100), "weight")
    sparsifier.sparsify_model(0.5)
    (units,) = read_units(sparsifier._record)
    assert [len(axis) for axis in units.places[0].axes] == [100, 200]
    assert torch.equal(units.places[0].numbers(), torch.arange(20_000).view(100, 200))


def test_a_place_is_read_by_sums():
    place = Place("w", (torch.tensor([0, 2]), torch.tensor([0, 1, 1])))
    units = Units("w", torch.tensor([True, False, False, True]), (place,))
    # The units of the weights are [[0, 1, 1], [2, 3, 3]].
    assert masks_of([units], {"w": (2, 3)})["w"].tolist() == [[True, False, False], [False, True, True]]


def test_a_weight_of_two_units_is_kept_if_both_are():
    rows = Units("r", torch.tensor([True, False]), (Place("w", (torch.tensor([0, 1]), torch.tensor([0, 0]))),))
    columns = Units("c", torch.tensor([False, True]), (Place("w", (torch.tensor([0, 0]), torch.tensor([0, 1]))),))
    assert masks_of([rows, columns], {"w": (2, 2)})["w"].tolist() == [[False, True], [False, False]]


def test_units_in_no_order_are_taken_weight_by_weight(monkeypatch):
    sparsifier = masked("kernel")
    monkeypatch.setattr("fasterai.sparse.tickets.units._separated", lambda name, numbers: None)
    shapes = {name: tuple(p.shape) for name, p in sparsifier.model.named_parameters()}
    found = masks_of(read_units(sparsifier._record), shapes)
    assert all(torch.equal(found[name], mask) for name, mask in by_place(sparsifier).items())


def test_shuffled_units_are_as_many():
    units = Units("w", torch.arange(100) < 30, ())
    other = units.shuffled(torch.Generator().manual_seed(0))
    assert other.pruned == units.pruned == 70 and not torch.equal(other.keep, units.keep)
    assert torch.equal(other.keep, units.shuffled(torch.Generator().manual_seed(0)).keep)
