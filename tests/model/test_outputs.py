"""Outputs held against outputs: a difference counts as a share of the scale, fillers aside, and is named."""

from __future__ import annotations

import math

import pytest
import torch

from fasterai.model.outputs import TOLERANCES, Movement, check_same, movement, tolerance

INF, NAN = math.inf, math.nan


def test_a_difference_counts_as_a_share_of_the_scale():
    expected = [torch.tensor([1.0, 100.0])]
    check_same(expected, [torch.tensor([1.009, 100.0])], "onnx", "it")
    with pytest.raises(
        ValueError, match=r"it must agree with the model to 0\.0001 .*, got a difference of 0\.011 in output 0 .* 100"
    ):
        check_same(expected, [torch.tensor([1.011, 100.0])], "onnx", "it")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([], "it must give 1 outputs as the model does, got 0"),
        ([torch.zeros(3)], r"it must give output 0 the shape \(2,\), got \(3,\)"),
        ([torch.tensor([0.0, float("nan")])], "got a difference of nan"),
    ],
)
def test_other_outputs_are_named(got, message):
    with pytest.raises(ValueError, match=message):
        check_same([torch.zeros(2)], got, "onnx", "it")


def test_empty_and_zero_outputs_are_the_same():
    check_same([torch.zeros(2), torch.zeros(0, 3)], [torch.zeros(2), torch.zeros(0, 3)], "onnx", "it")


def test_whole_numbers_of_a_fold_are_the_same():
    check_same([torch.tensor([3, 9])], [torch.tensor([3, 9])], "fold", "it")
    with pytest.raises(
        ValueError, match="it must agree with the model exactly, got a difference of 1 in output 0 at a scale of 9"
    ):
        check_same([torch.tensor([3, 9])], [torch.tensor([2, 9])], "fold", "it")
    check_same([torch.tensor([3, 90_000])], [torch.tensor([3, 90_001])], "onnx", "it")


def test_the_output_that_differs_is_counted_from_the_first():
    same = torch.ones(2, dtype=torch.float64)
    check_same([same, same], [same, same + 9e-13], "fold", "it")
    with pytest.raises(
        ValueError, match=r"to 1e-12 of the outputs' scale, got a difference of 2e-12 in output 1 at a scale of 1"
    ):
        check_same([same, same], [same, same + 2e-12], "fold", "it")


@pytest.mark.parametrize(
    ("before", "after", "difference", "scale"),
    [
        ([1.0, -4.0], [1.0, -3.0], 1.0, 4.0),
        ([0.0, 0.0], [0.0, 0.5], 0.5, 0.0),
        ([INF, 2.0, -INF], [INF, 1.0, -INF], 1.0, 2.0),  # equal infinities are equal, and no scale
        ([2.0, 2.0], [2.0, 2.0], 0.0, 2.0),
        ([], [], 0.0, 0.0),
        # Two fillers that stay, a thousand times as large as what moves and more, are no scale; one alone may be an output.
        ([-1e9, -1e9, 4.0], [-1e9, -1e9, 3.0], 1.0, 4.0),
        ([-1e9, 4.0], [-1e9, 3.0], 1.0, 1e9),
        ([4000.0, 4000.0, 4.0], [4000.0, 4000.0, 3.0], 1.0, 4000.0),
        ([4001.0, 4001.0, 4.0], [4001.0, 4001.0, 3.0], 1.0, 4.0),
        ([-1e9, -1e9, 4.0], [-1e9, -2e9, 4.0], 1e9, 1e9),  # a filler that moves is none
    ],
)
def test_how_far_an_output_has_moved(before, after, difference, scale):
    assert movement(torch.tensor(before), torch.tensor(after)) == Movement(difference, scale)


@pytest.mark.parametrize(("before", "after"), [([NAN, 1.0], [NAN, 1.0]), ([2.0], [NAN]), ([INF], [-INF]), ([INF], [1.0])])
def test_what_is_no_number_has_moved_without_end(before, after):
    assert movement(torch.tensor(before), torch.tensor(after)).share == INF


def test_types_are_compared_in_their_common_type():
    assert movement(torch.tensor([True, False]), torch.tensor([True, True])) == Movement(1.0, 1.0)
    assert movement(torch.tensor([2, 3]), torch.tensor([2.0, 3.5])) == Movement(0.5, 3.0)
    assert movement(torch.tensor([3 + 4j]), torch.tensor([3 + 3j])) == Movement(1.0, 5.0)
    assert Movement(1.0, 4.0).share == 0.25


@pytest.mark.parametrize(
    ("change", "dtype", "allowed"),
    [
        ("removal", torch.float64, 1e-9),
        ("removal", torch.bfloat16, 1e-2),
        ("doubtful", torch.float64, 0.0),
        ("doubtful", torch.float16, 1.0),
        ("fold", torch.float32, 1e-5),
        ("fold", torch.complex64, 1e-5),
        ("fold", torch.complex128, 1e-12),
        ("fold", torch.float16, 1e-2),
        ("fold", torch.float8_e4m3fn, 5e-2),
        ("fold", torch.int64, 0.0),
        ("fold", torch.bool, 0.0),
        ("program", torch.float16, 1e-5),
        ("onnx", torch.float32, 1e-4),
    ],
)
def test_what_rounding_may_do(change, dtype, allowed):
    assert tolerance(change, dtype) == allowed


def test_every_change_has_a_number_for_every_column():
    assert {len(row) for row in TOLERANCES.values()} == {5}
