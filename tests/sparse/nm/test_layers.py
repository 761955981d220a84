"""The layers of N:M training: what divides, what is left out with which reason, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.sparse.nm.layers import choose_layers
from fasterai.sparse.nm.srste import SRSTE


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.attention = nn.MultiheadAttention(12, 2)
        self.recurrent = nn.LSTM(12, 8)
        self.words = nn.Embedding(10, 12)
        self.head = nn.Linear(12, 5)
        self.odd = nn.Linear(10, 5)
        self.tail = nn.Linear(6, 5)


def chosen(**given):
    arguments = {"targets": None, "layer_type": None, "skip": False, **given}
    return choose_layers(Net(), 4, arguments["targets"], arguments["layer_type"], arguments["skip"])


def test_defaults_are_linear_layers_and_convolutions_and_the_rest_is_said():
    found = chosen(skip=True)
    assert [t.name for t in found.targets] == ["up.weight", "attention.out_proj.weight", "head.weight"]
    assert found.left_out["stem.weight"] == "its 3 inputs are fewer than a group of 4"
    assert found.left_out["depthwise.weight"] == "its 1 inputs are fewer than a group of 4"
    assert found.left_out["odd.weight"] == "its 10 inputs are not a multiple of 4"
    assert found.left_out["attention.in_proj_weight"] == "attention weights only when named in targets="
    assert found.left_out["recurrent.weight_hh_l0"] == "recurrent weights only when named in targets="
    assert "embeddings" in found.left_out["words.weight"]


def test_layers_that_do_not_divide_are_refused_by_name():
    words = (
        r"targets must have a multiple of 4 inputs, got odd.weight with 10, tail.weight with 6; leave them dense with "
        r"skip=True, or by name with skip=\['odd', ...\]"
    )
    with pytest.raises(ValueError, match=words):
        chosen()
    with pytest.raises(ValueError, match=r"got tail.weight with 6"):
        chosen(skip="odd")
    assert [t.name for t in chosen(skip=["odd", "tail*", "up"]).targets] == ["attention.out_proj.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"got stem.weight with 3"):
        chosen(targets=["stem", "head"])
    assert [t.name for t in chosen(targets=["stem", "head"], skip=True).targets] == ["head.weight"]


def test_attention_and_recurrent_weights_by_name_train_in_groups():
    names = [t.name for t in chosen(targets=["attention", "recurrent"]).targets]
    assert names == [
        *("attention.in_proj_weight", "attention.out_proj.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    ]
    model = nn.MultiheadAttention(8, 2)
    training = SRSTE(model, 2, 4, targets="in_proj_weight")
    assert float(training.sparsity) == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, training, total_steps=1, model=model):
        x = torch.randn(3, 2, 8)
        model(x, x, x)[0].sum().backward()
        optimizer.step()
    assert set((model.in_proj_weight.view(-1, 4) != 0).sum(1).tolist()) == {2}


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"skip": "haed"}, ValueError, "skip must be the name of a layer or a glob over them, of .* got 'haed'"),
        ({"skip": [3]}, TypeError, r"skip must be True, False, or names or globs of layers, got 3 \(int\)"),
        ({"skip": 3}, TypeError, r"skip must be True, False, or names or globs of layers, got 3 \(int\)"),
        ({"targets": "head.bias"}, ValueError, "targets must have inputs to make groups of, got a parameter of shape"),
        ({"targets": ["odd", "tail"], "skip": True}, ValueError, "targets must be left, got none in Net"),
        ({"layer_type": nn.GRU}, ValueError, "layer_type must match a layer"),
    ],
)
def test_bad_choices_are_refused(given, kind, words):
    with pytest.raises(kind, match=words):
        chosen(**given)
