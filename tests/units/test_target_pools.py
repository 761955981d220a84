"""One target's units as a pool."""

import pytest
import torch
from torch import nn

from fasterai.core.criteria import large_final
from fasterai.core.granularities import filter as filters
from fasterai.core.types import Evidence
from fasterai.model.targets import all_targets
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.pool import WeightScores
from fasterai.units.target_pools import TargetPool
from tests.networks import residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def large_final_of(target):
    return large_final(Evidence(target.name, target.parameter.detach()))


def test_a_target_pool_is_the_units_of_its_target():
    sparsifier = Sparsifier(residual(), "filter", example_inputs=X)
    pools = sparsifier._record.pools
    assert all(isinstance(p, TargetPool) for p in pools)
    assert [p.count for p in pools] == [6, 4, 6]
    assert [p.score(WeightScores(large_final_of, "sum")).shape for p in pools] == [(6, 1, 1, 1), (4, 1, 1, 1), (6, 1, 1, 1)]


def test_a_grouped_weight_keeps_its_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1))
    sparsifier = Sparsifier(model, "kernel", "local", targets="2")
    sparsifier.sparsify_model(0.25)
    masks = sparsifier.masks["2.weight"]
    with torch.no_grad():
        model[2].weight[::2] = 0
        model[2].bias[::2] = 0
    result = remove(model.eval(), X)
    assert result.plan.keep["2.weight", 0].tolist() == [1, 3, 5, 7], "the first output of each of the four groups goes"
    assert torch.equal(sparsifier.masks["2.weight"], masks[1::2])


def test_outputs_of_units_of_zero_weights_are_zeros():
    conv = nn.Conv2d(1, 3, 2)
    with torch.no_grad():
        conv.weight[1] = 0  # its bias is left
    pool = TargetPool(all_targets(conv)[0], filters)
    found = pool.outputs_of_units({"weight": torch.ones(3, 4)})
    assert found.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]
    with pytest.raises(ValueError, match="whose outputs can be watched, got weight, which the model did not call on the data"):
        pool.outputs_of_units({"other.weight": torch.ones(3, 4)})
