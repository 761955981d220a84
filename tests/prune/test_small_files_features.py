"""The file of a small model says what the model takes of its inputs."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fasterai.graph.inputs import InputCut, input_cuts
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:, [1, 4]] = 0
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    model = net()
    remove(model, X, features=1, measure=False)
    save_small(tmp_path / "small.safetensors", model)
    return model, tmp_path / "small.safetensors"


def test_the_loaded_model_knows_what_it_takes_and_computes_the_same(saved):
    model, path = saved
    loaded = load_small(path, net())
    assert input_cuts(loaded) == {"input": InputCut("input", 1, (0, 2, 3, 5), 6)}
    assert torch.equal(loaded(input_cuts(loaded)["input"].cut(X)), model(X[:, [0, 2, 3, 5]]))


def test_a_loaded_model_is_saved_with_its_inputs_again(saved, tmp_path):
    save_small(tmp_path / "again.safetensors", load_small(saved[1], net()))
    assert (tmp_path / "again.safetensors").read_bytes() == saved[1].read_bytes()


def test_a_model_with_whole_inputs_says_nothing_of_them(tmp_path):
    save_small(path := tmp_path / "whole.safetensors", net())
    with safe_open(path, "pt") as file:
        assert "inputs" not in file.metadata()
    assert input_cuts(load_small(path, net())) == {}


@pytest.mark.parametrize("told", ["{}", '["x"]', '[{"argument": "input", "dim": 1, "keep": [9], "size": 6}]', "no json"])
@pytest.mark.parametrize("has_stamp", [True, False])
def test_inputs_that_were_changed_are_refused(saved, told, has_stamp):
    path = saved[1]
    with safe_open(path, "pt") as file:
        header = file.metadata() | {"inputs": told}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if not has_stamp:
        del header["stamp"]
    save_file(tensors, path, header)
    model = net()
    with pytest.raises(ValueError, match="header was changed" if has_stamp else "whose header is not one"):
        load_small(path, model)
    assert model[0].in_features == 6 and input_cuts(model) == {}


def test_a_note_that_was_taken_out_is_missed(saved):
    path = saved[1]
    with safe_open(path, "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != "inputs"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match="header was changed"):
        load_small(path, net())
