"""Sizes of a study."""

from __future__ import annotations

import pytest

from fasterai.study.sizes import HALF, SIZES, Size


def test_they_rise():
    tiny, small, full = (SIZES[name] for name in ("tiny", "small", "full"))
    assert [size.name for size in SIZES.values()] == ["tiny", "small", "full"]
    assert tiny.images * tiny.epochs < small.images * small.epochs
    assert full.images is None and full.epochs > small.epochs and full.side > small.side > tiny.side


def test_half_has_half_the_steps_of_small_and_is_else_the_same():
    small, half = SIZES["small"], HALF["small"]
    assert 2 * half.images * half.epochs == small.images * small.epochs and half.side == small.side
    assert (HALF["tiny"], HALF["full"]) == (SIZES["tiny"], SIZES["full"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
    ],
)
def test_one_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError) as raised:
        Size(**{"name": "own", "images": 10, "test_images": 10, "side": 8, "epochs": 1, **changes})
    assert words in str(raised.value)


def test_it_is_one_line():
    assert repr(SIZES["tiny"]).startswith("Size(name='tiny', images=160") and "\n" not in repr(SIZES["tiny"])
