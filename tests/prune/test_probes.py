"""Inputs of other values and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasterai.prune.probes import probes


def shapes(*inputs: Any) -> list[list[tuple[int, ...]]]:
    return [[tuple(x.shape) for x in probe] for probe in probes(inputs)]


def test_the_inputs_come_first_and_unchanged() -> None:
    x, y = torch.randn(2, 3), {"mask": torch.ones(2, dtype=torch.bool), "scale": 2.0, "none": None}
    first = next(iter(probes((x, y))))
    assert first[0] is x
    assert first[1] is y


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        # the batch, larger numbers in float64, another size
        ((torch.randn(2, 3, 64, 40),), [(2, 3, 64, 40), (3, 3, 64, 40), (2, 3, 32, 20)]),
        ((torch.randn(2, 3, 8, 8).double(),), [(2, 3, 8, 8), (3, 3, 8, 8), (2, 3, 8, 8), (2, 3, 16, 16)]),
        ((torch.randn(2, 5, 7),), [(2, 5, 7), (3, 5, 7), (2, 5, 14), (2, 10, 7)]),
        ((torch.randn(2, 5),), [(2, 5), (3, 5)]),
        ((torch.ones(2, 6, dtype=torch.long),), [(2, 6), (3, 6), (2, 3)]),
        ((torch.ones(2, 6, dtype=torch.uint16),), [(2, 6), (2, 6), (2, 6)]),
        ((torch.randn(2, 5, 7), torch.ones(2, dtype=torch.long)), [(2, 5, 7), (3, 5, 7)]),
    ],
    ids=["images", "small images", "sequences", "features", "words", "unsigned", "lengths beside"],
)
def test_sizes(inputs: Any, wanted: list[tuple[int, ...]]) -> None:
    assert [found[0] for found in shapes(*inputs)] == wanted


def test_what_is_as_long_as_the_first_input_stays_as_long() -> None:
    words, mask = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert shapes(words, mask)[-1] == [(2, 3), (2, 1, 3, 3)]


def test_integers_stay_in_their_range_and_masks_change() -> None:
    words, mask = torch.tensor([[3, 4, 9], [4, 3, 9]]), torch.ones(8, 8, dtype=torch.bool)
    for w, m in list(probes((words, mask)))[1:]:
        assert int(w.min()) >= 3
        assert int(w.max()) <= 9
        assert m.any()
        assert not m.all()


def test_numbers_of_one_probe_are_large_and_all_are_the_same_each_time() -> None:
    x = torch.randn(64, 64, dtype=torch.float64)
    (_, (other,), (large,)), again = list(probes((x,))), list(probes((x,)))
    assert 0.9 < float(other.std()) < 1.1
    assert 27 < float(large.std()) < 33
    assert other.dtype == torch.float64
    assert torch.equal(again[2][0], large)


def test_complex_numbers_change_with_the_others() -> None:
    x, z = torch.randn(2, 5), torch.zeros(2, 4, dtype=torch.complex64)
    _, (other, changed) = list(probes((x, z)))
    assert (tuple(other.shape), tuple(changed.shape)) == ((3, 5), (3, 4))
    assert changed.dtype == torch.complex64
    assert changed.imag.any()


def test_the_largest_integer_is_no_obstacle() -> None:
    x = torch.full((2, 6), 2**63 - 1)
    assert len(list(probes((x,)))) == 3
