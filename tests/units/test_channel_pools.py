"""Coupled channels as units: which there are, how they score and how they are rounded."""

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core.granularities import Coupled
from fasterai.graph.channels import channel_graph
from fasterai.units.channel_pools import channel_pools
from fasterai.units.pool import WeightScores
from tests.networks import perceptron, residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pools_of(model, x=X, over="sum"):
    return {p.name: p for p in channel_pools(model, channel_graph(model, (x,)), Coupled(over))}


def magnitude(target):
    return target.parameter.detach().abs()


def test_a_residual_sum_couples_its_makers_and_its_readers():
    pools = pools_of(residual())
    assert set(pools) == {"stem.weight", "branch.0.weight"}
    stream, inner = pools["stem.weight"], pools["branch.0.weight"]
    assert stream.makers == {"stem.weight", "branch.3.weight"}
    assert {t.name for t in stream.targets} == {"stem.weight", "branch.0.weight", "branch.3.weight", "head.weight"}
    assert (stream.shape, inner.shape) == ((6,), (4,))
    assert inner.makers == {"branch.0.weight"}


def test_a_channel_counts_the_weights_of_all_its_slices():
    pools = pools_of(residual())
    # branch.0 makes 4 channels of 6*3*3 weights each and branch.3 reads them with 6*1*1 each
    assert pools["branch.0.weight"].weights == 4 * 54 + 4 * 6
    # stem 27, branch.3 4, branch.0's reading side 4*9, the head's 5
    assert pools["stem.weight"].weights == 6 * (27 + 4 + 36 + 5)


@pytest.mark.parametrize(("over", "function"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
@pytest.mark.parametrize("reducer", ["sum", "mean"])
def test_a_channel_scores_by_its_slices(over, function, reducer):
    model = residual()
    found = pools_of(model, over=over)["stem.weight"].score(WeightScores(magnitude, reducer))
    w = {n: p.detach().abs().numpy() for n, p in model.named_parameters()}
    per_slice = np.sum if reducer == "sum" else np.mean
    slices = [
        per_slice(w["stem.weight"], (1, 2, 3)),
        per_slice(w["branch.0.weight"], (0, 2, 3)),
        per_slice(w["branch.3.weight"], (1, 2, 3)),
        per_slice(w["head.weight"], 0),
    ]
    assert np.allclose(found.numpy(), function(np.stack(slices), axis=0), rtol=1e-5)


def test_scores_are_held_against_the_scale_of_the_group():
    (pool,) = (p for p in channel_pools(residual(), channel_graph(residual(), (X,)), Coupled()) if p.count == 4)
    scores = torch.tensor([1.0, 2.0, 3.0, -6.0])
    assert pool.on_one_scale(scores, torch.tensor(3.0)).tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, -2.0])
    assert pool.on_one_scale(torch.zeros(4), torch.tensor(0.0)).tolist() == [0.0] * 4
    (raw,) = (p for p in channel_pools(residual(), channel_graph(residual(), (X,)), Coupled(relative=False)) if p.count == 4)
    assert raw.on_one_scale(scores, torch.tensor(3.0)).tolist() == scores.tolist()
    assert pool.is_looked_at and raw.is_looked_at


@pytest.mark.parametrize(("over", "wanted"), [("sum", [1.0, -1.0]), ("mean", [0.5, -0.5]), ("max", [3.0, 4.0])])
def test_parts_of_either_sign_are_added_up_over_slices(over, wanted):
    model = perceptron(1, 2, 1)
    parts = {"0.weight": torch.tensor([[3.0], [-4.0]]), "2.weight": torch.tensor([[-2.0, 3.0]])}
    pool = pools_of(model, torch.ones(1, 1), over)["0.weight"]
    assert pool.score(WeightScores(lambda t: parts[t.name], "sum", is_signed=True)).tolist() == wanted


def test_heads_score_and_round_as_heads():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    pools = pools_of(layer, torch.randn(2, 5, 16))
    heads = next(p for p in pools.values() if p.count == 4)
    assert heads.score(WeightScores(magnitude, "sum")).shape == (4,)
    assert heads.step(8) == 2, "two heads of four indices each are a multiple of 8"
    hidden = next(p for p in pools.values() if p.count == 32)
    assert (hidden.step(None), hidden.step(1), hidden.step(4)) == (8, 1, 4)


def test_few_channels_are_not_rounded_by_default():
    assert pools_of(residual(31))["stem.weight"].step(None) == 1
    assert pools_of(residual(32))["stem.weight"].step(None) == 8


def test_outputs_of_coupled_channels_are_those_of_all_makers_joined():
    model = residual()
    pools = pools_of(model)
    with torch.no_grad():
        for name in ("stem.weight", "branch.3.weight"):
            model.get_parameter(name)[2] = 0
        model.branch[0].weight[:, 2] = 0
        model.head.weight[:, 2] = 0
    made = {"stem.weight": torch.rand(6, 3), "branch.3.weight": torch.rand(6, 2), "branch.0.weight": torch.rand(4, 5)}
    found = pools["stem.weight"].outputs_of_units(made)
    wanted = torch.cat([made["stem.weight"], made["branch.3.weight"]], 1)
    wanted[2] = 0
    assert torch.equal(found, wanted)
    assert torch.equal(pools["branch.0.weight"].outputs_of_units(made), made["branch.0.weight"])
    with pytest.raises(ValueError, match=r"whose outputs can be watched, got stem\.weight"):
        pools["stem.weight"].outputs_of_units({"head.weight": torch.rand(5, 3)})


def test_outputs_of_a_reader_as_wide_as_its_inputs_are_none_of_its_inputs():
    pools = pools_of(perceptron(3, 4, 4, 2), torch.ones(1, 3))
    made = {"0.weight": torch.rand(4, 2), "2.weight": torch.rand(4, 5)}
    assert {p.name: p.outputs_of_units(made).shape[1] for p in pools.values()} == {"0.weight": 2, "2.weight": 5}


def test_outputs_of_a_head_are_those_of_its_channels():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    hidden = next(p for p in pools_of(layer, torch.randn(2, 5, 16)).values() if p.count == 32)
    assert torch.equal(hidden.outputs_of_units({"linear1.weight": torch.ones(32, 3)}), torch.ones(32, 3))
