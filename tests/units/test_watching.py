"""Which targets a criterion of activations can watch; what it finds there is tested with the other evidence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_the_output_projection_of_attention_is_left_out_with_a_note_before_anything_runs(granularity):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(
        UserWarning, match=r"wanda cannot watch the inputs of self_attn\.out_proj\.weight: left out, and unpruned"
    ):
        sparsifier = Sparsifier(layer, granularity, "local", "wanda", data=[X])
    assert [t.name for t in sparsifier.targets] == ["self_attn.in_proj_weight", "linear1.weight", "linear2.weight"]
    assert sparsifier.report().left_out["self_attn.out_proj.weight"] == "wanda cannot watch its inputs"
    sparsifier.sparsify_model(0.5)
    assert [sparsifier.sparsity[t.name] for t in sparsifier.targets] == [0.5, 0.5, 0.5]
    assert bool((layer.self_attn.out_proj.weight != 0).all())


def test_recurrent_weights_are_left_out_and_the_others_pruned():
    with pytest.warns(UserWarning, match=r"wanda cannot watch the inputs of lstm\.weight_ih_l0, lstm\.weight_hh_l0"):
        sparsifier = Sparsifier(Tagger(), "weight", "local", "wanda", data=[X])
    sparsifier.sparsify_model(0.5)
    assert sparsifier.sparsity["head.weight"] == 0.5


def test_those_named_are_an_error_and_so_is_nothing_else_left():
    with pytest.raises(ValueError, match=r"whose inputs wanda can watch .*, got lstm\.weight_ih_l0, lstm\.weight_hh_l0; leave"):
        Sparsifier(Tagger(), "weight", "local", "wanda", data=[X], targets=["lstm", "head"])
    with pytest.raises(ValueError, match=r"whose inputs wanda can watch .*, got weight_ih_l0, weight_hh_l0"):
        Sparsifier(nn.LSTM(8, 8), "weight", "local", "wanda", data=[X])


def test_a_criterion_that_grows_units_is_asked_too():
    with pytest.warns(UserWarning, match="wanda cannot watch the inputs of lstm"):
        Sparsifier(Tagger(), "weight", "local", "large_final", data=[X], rule=DropAndGrow(grow="wanda"))


def test_a_layer_that_is_never_called_is_named_where_it_is_found_out():
    class Around(Tagger):
        def forward(self, x):
            return nn.functional.linear(x, self.head.weight)

    sparsifier = Sparsifier(Around(), "weight", "local", "wanda", data=[X], targets="head")
    with pytest.raises(ValueError, match=r"inputs can be watched, got head\.weight; leave it out"):
        sparsifier.sparsify_model(0.5)
