from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasterai.distill.losses.shapes import UnlikeShapesError, as_maps, attention_of, grid_of, resize

#: Shapes of the student and of the teacher -> of the maps that are compared.
FIT = {
    "vectors": ((2, 3), (2, 5), (2, 3), (2, 5)),
    "images": ((2, 3, 4, 4), (2, 5, 8, 6), (2, 3, 4, 4), (2, 5, 8, 6)),
    "volumes": ((2, 3, 4, 4, 2), (2, 5, 2, 2, 2), (2, 3, 4, 4, 2), (2, 5, 2, 2, 2)),
    "tokens": ((2, 7, 3), (2, 7, 5), (2, 3, 7), (2, 5, 7)),
    "tokens of two squares": ((2, 9, 3), (2, 17, 5), (2, 3, 3, 3), (2, 5, 4, 4)),
    "tokens with and without a class": ((2, 9, 3), (2, 10, 5), (2, 3, 3, 3), (2, 5, 3, 3)),
    "tokens beside their map": ((2, 6, 3), (2, 5, 2, 3), (2, 3, 2, 3), (2, 5, 2, 3)),
    "a map beside tokens with a class": ((2, 3, 2, 3), (2, 7, 5), (2, 3, 2, 3), (2, 5, 2, 3)),
    "tokens beside a larger map": ((2, 10, 3), (2, 5, 7, 7), (2, 3, 3, 3), (2, 5, 7, 7)),
    "tokens of a volume": ((2, 9, 3), (2, 5, 2, 2, 2), (2, 3, 2, 2, 2), (2, 5, 2, 2, 2)),
    "a map of one place beside a vector": ((2, 3, 1, 1), (2, 5), (2, 3), (2, 5)),
}
UNFIT = {
    "a vector beside a map": ((2, 3), (2, 5, 4, 4)),
    "a vector beside tokens": ((2, 3), (2, 9, 5)),
    "an image beside a volume": ((2, 3, 4, 4), (2, 5, 4, 4, 4)),
    "tokens of no square beside a map": ((2, 11, 3), (2, 5, 4, 4)),
    "two numbers of tokens, one of no square": ((2, 9, 3), (2, 12, 5)),
    "tokens beside a volume of other places": ((2, 9, 3), (2, 5, 4, 4, 4)),
    "two batches": ((2, 3, 4, 4), (1, 3, 4, 4)),
    "no channels": ((2,), (2,)),
}


@pytest.mark.parametrize("shapes", FIT.values(), ids=FIT)
def test_features_become_maps_with_as_many_dimensions(shapes):
    student, teacher = as_maps(torch.zeros(shapes[0], dtype=torch.float16), torch.zeros(shapes[1]))
    assert (tuple(student.shape), tuple(teacher.shape)) == shapes[2:]
    assert student.dtype == teacher.dtype == torch.float32


@pytest.mark.parametrize("shapes", UNFIT.values(), ids=UNFIT)
def test_shapes_that_do_not_fit_are_refused_with_both(shapes):
    with pytest.raises(UnlikeShapesError, match="features of pair 3 must be of shapes that can be compared") as error:
        as_maps(torch.zeros(shapes[0]), torch.zeros(shapes[1]), pair=3)
    assert f"got {shapes[0]} of the student and {shapes[1]} of the teacher" in str(error.value)
    assert error.value.message("a and b").startswith("features of a and b must be")


def test_three_dimensions_are_tokens_unless_said_otherwise():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(as_maps(x, x)[0], x.transpose(1, 2))
    assert torch.equal(as_maps(x, x, channels_first=True)[0], x)


def test_tokens_are_laid_out_in_rows_and_the_first_one_is_the_class():
    tokens = torch.arange(5.0)[None, :, None]
    assert as_maps(tokens, torch.zeros(1, 1, 2, 2))[0][0, 0].tolist() == [[1, 2], [3, 4]]


def test_places_of_tokens():
    assert [grid_of(n) for n in (0, 1, 2, 3, 4, 5, 16, 17, 18)] == [
        *(None, (1, 1), (1, 1), None, (2, 2), (2, 2), (4, 4), (4, 4), None)
    ]
    assert grid_of(6, (2, 3)) == grid_of(7, (2, 3)) == (2, 3)
    assert grid_of(9, (2, 3)) == (3, 3)
    assert grid_of(9, (2, 3, 2)) is None


def test_smaller_sizes_are_averages_and_larger_ones_lines():
    maps = torch.tensor([[[0.0, 2, 4, 6]]])
    assert resize(maps, (2,)).tolist() == [[[1, 5]]]
    assert resize(maps[..., :2], (4,)).tolist() == [[[0, 0.5, 1.5, 2]]]
    assert resize(maps[..., None], (2, 2))[0, 0].tolist() == [[1, 1], [5, 5]]
    assert resize(maps, (4,)) is maps
    assert resize(torch.ones(1, 2, 4, 4, 3), (2, 5, 3)).shape == (1, 2, 2, 5, 3)


def test_attention_is_the_mean_of_powers():
    maps: Tensor = torch.tensor([[[1.0, -2], [3, 0]]])
    assert attention_of(maps).tolist() == [[[5, 2]]]
    assert attention_of(maps, 1).tolist() == [[[2, 1]]]
