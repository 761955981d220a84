"""What a user names is one dimension of one input, or an error says which could be meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.graph.features import Asked, Features, check_may_go, kept_inputs, read_features
from fasterai.graph.inputs import InputCut, put_inputs


class Net(nn.Module):
    def forward(self, x, batch=None, ids=None):
        return x


FLAT, PIXELS = torch.zeros(2, 6), torch.zeros(2, 3, 8, 8)
NESTED = (FLAT, {"cont": torch.zeros(2, 5, 4)})


@pytest.mark.parametrize(
    ("features", "inputs", "asked"),
    [
        (None, (FLAT,), ()),
        (False, (FLAT,), ()),
        (True, (FLAT,), (Asked("x", 1),)),
        (1, (FLAT,), (Asked("x", 1),)),
        (-1, (FLAT,), (Asked("x", 1),)),
        ({"x": True}, (FLAT,), (Asked("x", 1),)),
        ({"x": -3}, (PIXELS,), (Asked("x", 1),)),
        (True, (torch.zeros(2, 1, 1, 8),), (Asked("x", 3),)),
        (1, (FLAT, None, torch.zeros(2)), (Asked("x", 1),)),
        ({"cont": 2}, NESTED, (Asked("batch['cont']", 2),)),
        ({"batch['cont']": 1, "x": 1}, NESTED, (Asked("batch['cont']", 1), Asked("x", 1))),
        (Features(1, keep=[5, 0, -1, 0]), (FLAT,), (Asked("x", 1, (0, 5)),)),
        (Features({"x": 1, "cont": 2}, keep={"cont": range(2)}), NESTED, (Asked("x", 1), Asked("batch['cont']", 2, (0, 1)))),
    ],
)
def test_forms_of_features(features, inputs, asked):
    assert read_features(features, Net(), inputs) == asked


@pytest.mark.parametrize(
    ("features", "inputs", "error", "message"),
    [
        ("x", (FLAT,), TypeError, "features must be a dict of inputs to dimensions, a dimension or True, got 'x'"),
        ({"x": "1"}, (FLAT,), TypeError, "features must be dimensions or True, got '1' for x"),
        ({"x": False}, (FLAT,), TypeError, "features must be dimensions or True, got False for x"),
        ({1: 1}, (FLAT,), TypeError, "features must name inputs by their argument, got 1"),
        ({"y": 1}, NESTED, ValueError, r"features must be inputs, of x, batch\['cont'\], got 'y'"),
        ({"x": 0}, (FLAT,), ValueError, r"features must not be the dimension of the samples, got 0 for x \(2x6\)"),
        ({"x": 2}, (FLAT,), ValueError, r"features must be dimensions of several indices, of \[1\], got 2 for x"),
        ({"x": 1}, (torch.zeros(2, 1, 4),), ValueError, r"of several indices, of \[2\], got 1 for x \(2x1x4\)"),
        (1, NESTED, ValueError, r"which input is meant, got 1; the inputs are x \(2x6 float32\), batch\['cont'\] \(2x5x4 fl"),
        (True, (PIXELS,), ValueError, r"which dimension of x is meant, got True for 2x3x8x8, where \[1, 2, 3\] could be: pass"),
        (True, (torch.zeros(2, 1),), ValueError, "got True for 2x1, where none has several indices"),
        (
            {"a": 1},
            (FLAT, {"a": FLAT, "b": {"a": FLAT}}),
            ValueError,
            r"one input, got 'a', which may be batch\['a'\], batch\['b",
        ),
        (Features(1, keep=[6]), (FLAT,), ValueError, "keep must be indices of x below 6, got 6"),
        (Features(1, keep=[-7]), (FLAT,), ValueError, "keep must be indices of x below 6, got -7"),
        (Features(1, keep=[0.5]), (FLAT,), TypeError, "keep must be indices of x, got 0.5"),
        (Features(1, keep=[True]), (FLAT,), TypeError, "keep must be indices of x, got True"),
        (Features(1, keep="01"), (FLAT,), TypeError, "keep must be indices, or a dict"),
        (Features({"x": 1}, keep={"x": 3}), (FLAT,), TypeError, "keep must be indices of x, got 3"),
        (Features({"x": 1}, keep={"cont": [0]}), NESTED, ValueError, "keep must be of inputs that features names, of x, got"),
        (Features({"x": 1, "cont": 1}, keep=[0]), NESTED, ValueError, "keep must say which input is meant"),
    ],
)
def test_what_names_no_dimension_or_several_is_refused(features, inputs, error, message):
    with pytest.raises(error, match=message):
        read_features(features, Net(), inputs)


def test_single_pixels_come_with_a_repair():
    with pytest.raises(ValueError, match=r"pass features=\{'x': 1\}; to remove single pixels let the model take flat images"):
        read_features(True, Net(), (PIXELS,))


def test_a_second_dimension_of_an_input_that_was_cut_is_refused():
    net = Net()
    put_inputs(net, {"x": InputCut("x", 1, (0, 1), 9)})
    with pytest.raises(ValueError, match="features must be dimension 1 of x, which was cut before, got 2"):
        read_features({"x": 2}, net, (torch.zeros(2, 2, 4),))
    assert read_features({"x": 1}, net, (torch.zeros(2, 2, 4),)) == (Asked("x", 1),)


def test_each_dimension_that_stays_has_its_reason():
    tensors = {"x": torch.zeros(2, 1, 4), "y": PIXELS}
    found = kept_inputs(tensors, {("y", 1)}, {("y", 2): "conv2d computes across it"})
    assert found == {
        ("x", 0): "it is that of the samples",
        ("x", 1): "it has a single index",
        ("x", 2): "it is an input, which stays whole unless features={'x': 2} asks for less of it",
        ("y", 0): "it is that of the samples",
        ("y", 2): "conv2d computes across it; single pixels may go where the model takes flat images, as (N, 784)",
        ("y", 3): "it is an input, which stays whole unless features={'y': 3} asks for less of it",
    }


def test_a_dimension_that_has_to_stay_is_refused_with_the_reason():
    stay = {("x", 1): "it is an output of the network"}
    with pytest.raises(ValueError, match=r"indices may go, got 1 of x, which stays whole: it is an output of the network"):
        check_may_go({"x": 1}, Net(), (FLAT,), stay)
    check_may_go(None, Net(), (FLAT,), stay)
    check_may_go({"x": 1}, Net(), (FLAT,), {})


def test_features_are_one_line():
    assert repr(Features({"x": 1}, keep={"x": [0, 3]})) == "<Features: x.1 may lose indices, 2 of them stay>"
    assert repr(Features(True)) == "<Features: the input.? may lose indices>"
    assert [line.split() for line in str(Features({"x": 1}, keep=[3])).splitlines()[2:]] == [["x", "1", "3"]]
