"""Statistics of batch norms are those of the data; all else stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fasterai.misc.ternary.norms import measure_norms_

BATCHES = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))


def test_statistics_are_the_averages_over_the_batches():
    model = network()
    measure_norms_(model, [(x, None) for x in BATCHES])
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean(0) for x in BATCHES]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x in BATCHES]).mean(0))
    seen = [nn.functional.batch_norm(x, None, None, model[0].weight, model[0].bias, True) for x in BATCHES]
    expected = torch.stack([model[2](x).mean(0) for x in seen]).mean(0)  # nothing is dropped meanwhile
    torch.testing.assert_close(model[3].running_mean, expected.detach())


def test_it_agrees_with_torchs_own_without_dropout():
    model, other = network(), network()
    model[1].p = other[1].p = 0.0
    measure_norms_(model, BATCHES)
    torch.optim.swa_utils.update_bn(list(BATCHES), other)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(model[3], name), getattr(other[3], name))


@pytest.mark.parametrize("training", [True, False])
def test_all_else_stays(training):
    model = network().train(training)
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    measure_norms_(model, BATCHES)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == modes
    assert (model[0].momentum, model[3].momentum) == (0.3, None)
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {f"{i}.running_{kind}" for i in (0, 3) for kind in ("mean", "var")}


def test_norms_without_statistics_and_those_not_reached_stay():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    model.unused = nn.BatchNorm1d(4)
    model.unused.running_mean.fill_(7)
    model.forward = lambda x: model[1](model[0](x))
    measure_norms_(model, BATCHES)
    assert model.unused.running_mean.tolist() == [7] * 4 and model[0].running_mean is None


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "data must hold at least one batch, got none"), ([BATCHES[0], torch.zeros(2, 5)], "data must hold batches that the")],
)
def test_data_that_do_not_fit_change_nothing(data, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        measure_norms_(model, data)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert model.training and model[0].momentum == 0.3
