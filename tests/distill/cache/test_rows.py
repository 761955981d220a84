"""Forms of kept logits: exact in float32, within rounding in float16, and the right shares of the k largest."""

from __future__ import annotations

import math

import pytest
import torch

from fasterai.distill.cache.rows import RowForm

SHAPES = [(7,), (4, 7), (7, 3, 2)]


def back(form: RowForm, logits: torch.Tensor) -> torch.Tensor:
    parts = form.pack(logits)
    for name, (dtype, shape) in form.shapes().items():
        assert parts[name].dtype is dtype
        assert parts[name].shape == (len(logits), *shape)
    return form.unpack(parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_logits_come_back(shape: tuple[int, ...]):
    logits = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(RowForm(shape, "float32"), logits), logits)
    half = back(RowForm(shape, "float16"), logits)
    assert half.dtype is torch.float32
    assert ((half - logits).abs() <= logits.abs() * 2**-11 + 2**-25).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_the_largest_keep_their_shares(shape: tuple[int, ...], top_k: int):
    logits = 3 * torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    form = RowForm(shape, "float32", top_k)
    found = back(form, logits)
    rows, own = (x.movedim(form.axis, -1).reshape(-1, 7).double() for x in (found, logits))
    top = own.topk(top_k, -1).indices
    shares, wanted = rows.softmax(-1), own.softmax(-1)
    assert torch.allclose(shares.gather(1, top), wanted.gather(1, top), atol=1e-6)
    rest = shares.scatter(1, top, 0.0)
    wanted_rest = wanted.scatter(1, top, 0.0).sum(1)
    assert torch.allclose(rest.sum(1), wanted_rest, atol=1e-6)
    others = torch.ones_like(rows, dtype=torch.bool).scatter(1, top, False)
    assert torch.allclose(rows[others].view(-1, 7 - top_k).std(1, unbiased=False), torch.zeros(len(rows), dtype=torch.float64))


def test_values_by_hand():
    """Of 3, 1, 0, 0 the largest stays; the others share log((e + 2) / 3)."""
    found = back(RowForm((4,), "float32", 1), torch.tensor([[1.0, 3.0, 0.0, 0.0]]))
    rest = math.log((math.e + 2) / 3)
    assert found[0].tolist() == pytest.approx([rest, 3.0, rest, rest])


def test_the_rest_gets_at_least_its_due_above_temperature_one():
    logits = torch.tensor([[4.0, 2.0, -1.0, -6.0]])
    found = back(RowForm((4,), "float32", 1), logits)
    due, got = ((x / 4).softmax(1)[0, 1:].sum() for x in (logits, found))
    assert got > due
    due, got = ((x / 0.5).softmax(1)[0, 1:].sum() for x in (logits, found))
    assert got < due


def test_as_many_as_there_are_is_all_of_them():
    logits = torch.randn(2, 5)
    form = RowForm((5,), "float32", 5)
    assert "rest" not in form.shapes()
    assert torch.equal(back(form, logits), logits)


def test_places_of_many_classes_fit():
    assert RowForm((1 << 15,), "float16", 2).shapes()["indices"][0] is torch.int16
    form = RowForm(((1 << 15) + 1,), "float16", 1)
    assert form.shapes()["indices"][0] is torch.int32
    logits = torch.zeros(1, (1 << 15) + 1)
    logits[0, -1] = 20.0
    assert back(form, logits).argmax() == 1 << 15
    small = torch.zeros(1, 1 << 15)
    small[0, -1] = 20.0
    assert back(RowForm((1 << 15,), "float16", 1), small).argmax() == (1 << 15) - 1


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_logits_that_are_not_finite_are_refused(value: float, word: str):
    with pytest.raises(ValueError, match=f"teacher must return finite logits, got {word} among them"):
        RowForm((2,), "float32").pack(torch.tensor([[0.0, value]]))


def test_logits_that_half_precision_cannot_hold_are_refused():
    with pytest.raises(
        ValueError, match=r"dtype must hold the teacher's logits, got float16, .* of 7e[+]04; pass dtype=torch.float32"
    ):
        RowForm((2,), "float16").pack(torch.tensor([[0.0, -70_000.0]]))
    assert back(RowForm((2,), "float32"), torch.tensor([[0.0, -70_000.0]]))[0, 1] == -70_000
