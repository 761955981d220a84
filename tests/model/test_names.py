"""Tensors have one name each way they can be reached, with or without wrappers."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from fasterai.model.names import own_tensors, plain_name, unwrap, walk_parameters, walk_tensors


class Shared(nn.Module):
    """A norm under two names, a weight in two layers, and parts that are None."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.twice = self.norm


def test_every_name_of_every_tensor():
    model = Shared()
    walked = {name: (module, attribute) for name, module, attribute, _ in walk_tensors(model)}
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert list(walked) == [
        *["first.weight", "again.weight", "again.bias"],
        *(f"{norm}.{buffer}" for norm in ("norm", "twice") for buffer in buffers),
    ]
    assert walked["again.weight"] == (model.again, "weight")
    assert all(getattr(module, attribute) is tensor for _, module, attribute, tensor in walk_tensors(model))
    assert [name for name, *_ in walk_parameters(model)] == ["first.weight", "again.weight", "again.bias"]
    assert all(parameter is model.get_parameter(name) for name, _, _, parameter in walk_parameters(model))


def test_a_modules_own_tensors():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("nothing", None)
    assert [(name, tensor is getattr(model, name)) for name, tensor in own_tensors(model)] == [("scale", True), ("count", True)]


def test_wrappers_add_nothing_to_a_name():
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(nn.DataParallel(torch.compile(model))) is model
    assert plain_name("1._orig_mod.0.weight") == "1.0.weight"
    names = [name for name, *_ in walk_tensors(model)]
    model[1] = torch.compile(model[1])
    assert [name for name, *_ in walk_tensors(model)] == names == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]


def test_they_are_found_under_their_old_path():
    old = importlib.import_module("fasterai.core.targets")
    assert (old.unwrap, old.plain_name, old.walk_parameters) == (unwrap, plain_name, walk_parameters)
