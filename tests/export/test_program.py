"""A program file computes what the model does, or is not written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fasterai.export.program import export_program
from tests.networks import Branching, Counting

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 5))


def test_the_program_computes_what_the_model_does_in_eval_mode(tmp_path):
    model = small_net().train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    path = export_program(model, X, tmp_path / "m.pt2")
    loaded = torch.export.load(path).module()
    expected = copy.deepcopy(model).eval()(X)
    assert (loaded(X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


class Image(torch.Tensor):
    """A tensor of a class of one's own, as fastai's batches are."""


def test_the_file_wants_no_class_of_the_sample(tmp_path):
    path = export_program(nn.Conv2d(3, 4, 3), X.as_subclass(Image), tmp_path / "m.pt2")
    assert type(torch.export.load(path).example_inputs[0][0]) is torch.Tensor


class Structured(nn.Module):
    def forward(self, x, y):
        return {"sum": x + y, "best": (x - y).argmax(1)}


def test_several_inputs_and_outputs(tmp_path):
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    loaded = torch.export.load(export_program(Structured(), (a, b), str(tmp_path / "m.pt2"))).module()
    assert torch.equal(loaded(a, b)["best"], (a - b).argmax(1))


def test_a_program_that_disagrees_is_not_left_behind(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_text("an older file")
    with pytest.raises(ValueError, match="the program must agree with the model to 1e-05 of the outputs' scale"):
        export_program(Counting(), X, path)
    assert path.read_text() == "an older file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_a_model_that_cannot_be_exported_is_named_and_keeps_its_mode(tmp_path):
    model = Branching(nn.Identity())
    with pytest.raises(ValueError, match=r"model must be exportable by torch\.export, got an error"):
        export_program(model, X, tmp_path / "m.pt2")
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="sample must be arguments that the model runs on"):
        export_program(small_net(), torch.randn(2, 7, 8, 8), tmp_path / "m.pt2")
    with pytest.raises(ValueError, match="path must be in a folder that is there"):
        export_program(nn.ReLU(), X, tmp_path / "nowhere" / "m.pt2")
    with pytest.raises(TypeError, match="sample must be a tensor"):
        export_program(nn.ReLU(), None, tmp_path / "m.pt2")
