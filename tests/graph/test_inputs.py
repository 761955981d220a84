"""Inputs are known by their arguments, whatever they stand in, and are cut to what stays of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fasterai.core.loop import Batch
from fasterai.graph.inputs import InputCut, cut_inputs, input_cuts, input_names, less_of, put_inputs

CUT = InputCut("x", 1, (0, 2, 5), 6)


class Net(nn.Module):
    def forward(self, x, batch, *more, scale=None):
        return x


def test_leaves_are_named_by_their_argument_and_their_place_in_it():
    x = torch.zeros(2, 3)
    given = (x, {"cont": x, "pair": (x, None)}, x, [1, x])
    names = ["x", "batch['cont']", "batch['pair'][0]", "batch['pair'][1]", "more[0]", "more[1][0]", "more[1][1]"]
    assert input_names(Net(), given) == names
    assert input_names(nn.DataParallel(Net()), (x,)) == ["x"]
    assert input_names(nn.Sequential(), (x,)) == ["input"]


def test_an_input_is_cut_to_the_indices_that_stay():
    x = torch.arange(12).reshape(2, 6)
    assert CUT.cut(x).tolist() == [[0, 2, 5], [6, 8, 11]]
    assert InputCut("x", 2, (1,), 3).cut(torch.arange(6).reshape(1, 2, 3)).tolist() == [[[1], [4]]]


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (6,), ()])
def test_an_input_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have the size 6 in dimension 1, got (2x5|2x7|6|a single number)$"):
        CUT.cut(torch.zeros(shape))


def test_two_cuts_after_each_other_are_one():
    x = torch.randn(2, 6)
    later = InputCut("x", 1, (1, 2), 3)
    assert CUT.then(later) == InputCut("x", 1, (2, 5), 6)
    assert torch.equal(CUT.then(later).cut(x), later.cut(CUT.cut(x)))


def test_all_else_among_the_arguments_is_the_same_object():
    x, other = torch.randn(2, 6), torch.randn(2, 6)
    given = (x, {"cont": other, "n": 3})
    found = cut_inputs(Net(), given, [CUT])
    assert found[0].shape == (2, 3) and found[1]["cont"] is other and found[1]["n"] == 3
    assert cut_inputs(Net(), given, []) is given
    inner = cut_inputs(Net(), given, [InputCut("batch['cont']", 1, (1,), 6)])
    assert inner[0] is x and torch.equal(inner[1]["cont"], other[:, [1]])


def test_keywords_of_a_batch_are_cut_in_the_order_of_the_arguments():
    x, y = torch.randn(2, 6), torch.zeros(2)
    found = less_of(Net(), [CUT], Batch(targets=(y,), keywords={"batch": 1, "x": x}))
    assert torch.equal(found.inputs[0], x[:, [0, 2, 5]]) and found.inputs[1] == 1 and found.targets[0] is y


def test_a_model_keeps_the_note_of_its_inputs_through_copies_and_pickles():
    model = nn.Linear(3, 2)
    assert input_cuts(model) == {}
    put_inputs(model, {"input": CUT})
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.DataParallel(model)):
        assert input_cuts(one) == {"input": CUT}
    assert model.state_dict().keys() == {"weight", "bias"}
    put_inputs(model, {})
    assert vars(model).keys() == vars(nn.Linear(3, 2)).keys()


def test_a_cut_is_one_line_and_comes_back_from_plain_data():
    assert repr(CUT) == "<InputCut x.1: 3 of 6 stay>"
    assert str(InputCut("x", 1, tuple(range(9)), 20)).endswith("9 of 20 stay (0, 1, 2, 3, 4, 5, 6, 7, ...)")
    assert InputCut.from_dict(CUT.to_dict()) == CUT


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        *(("keep", value, ValueError) for value in ([], [2, 1], [1, 1], [6], [-1])),
        *(("keep", value, TypeError) for value in ("02", [True], None)),
        ("argument", 3, TypeError),
        ("dim", "1", TypeError),
        ("dim", 0, ValueError),
        ("size", None, TypeError),
    ],
)
def test_data_that_is_no_cut_is_refused(part, value, error):
    with pytest.raises(error):
        InputCut.from_dict(CUT.to_dict() | {part: value})
