"""Which targets a criterion of activations can watch; what it finds there is tested with the other evidence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.model.targets import all_targets
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.evidence import Source
from fasterai.units.rules import DropAndGrow
from fasterai.units.watching import outputs

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


class Spread(nn.Module):
    """A convolution, a transposed one in two groups, and a linear layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.head = nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(5, 1)

    def forward(self, x):
        h = self.up(self.conv(x)).movedim(1, 2)
        return self.head(h) + self.head(-h)


def test_outputs_are_those_of_the_layers_with_a_row_for_each():
    torch.manual_seed(0)
    model = Spread().train()
    targets = [t for t in all_targets(model) if t.parameter.dim() > 1]
    found = outputs(model, targets, Source(data=[X, (X + 1, None)]))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "conv.weight": (4, 2 * 2 * 6),
        "up.weight": (6, 2 * 2 * 7),
        "head.weight": (5, 2 * 2 * 2 * 7),
    }
    by_hand = torch.cat([model.conv(x).movedim(1, 0).flatten(1) for x in (X, X + 1)], 1)
    assert torch.equal(found["conv.weight"], by_hand.detach())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_of_many_places_a_sample_at_even_distances_is_noted():
    layer = nn.Linear(1, 2, bias=False)
    places = torch.arange(10_001.0).unsqueeze(1)
    found = outputs(layer, all_targets(layer), Source(data=[places, places]))["weight"] / layer.weight.detach()
    assert found.shape == (2, 4096)
    assert found[0, [0, 2047, 2048]].tolist() == pytest.approx([0, 10_000, 0])


def test_outputs_of_half_precision_are_widened():
    layer = nn.Linear(3, 2).bfloat16()
    assert outputs(layer, all_targets(layer)[:1], Source(data=[torch.ones(4, 3).bfloat16()]))["weight"].dtype is torch.float32


def test_what_puts_nothing_out_of_its_own_is_left_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"large_final cannot watch the outputs of self_attn\.in_proj_weight, .*left out"):
        sparsifier = Sparsifier(layer, "row", "local", "variety(large_final, cosine, activations)", data=[X])
    assert [t.name for t in sparsifier.targets] == ["linear1.weight", "linear2.weight"]
    with pytest.raises(ValueError, match=r"whose outputs large_final can watch \(convolutions, linear layers\), got self_attn"):
        Sparsifier(layer, "row", criteria="variety(l1, cosine, activations)", data=[X], targets="self_attn.in_proj_weight")
