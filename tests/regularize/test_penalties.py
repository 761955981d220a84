from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fasterai.core.granularities import Block
from fasterai.regularize import penalties
from fasterai.regularize.penalties import GroupLasso, Growing
from fasterai.regularize.regularizer import Regularizer

ROOT = math.sqrt
# Two filters of two weights: norms 5 and 1, gamma 1 and 16. Entry -> (penalty, its gradient, the proximal step at rate 0.5).
CASES = {
    "l1": (4.0, [[0.5, 0.5], [0.0, 0.5]], [[2.75, 3.75], [0.0, 0.75]]),
    "group_lasso": (
        *(6 * ROOT(2), [[0.6 * ROOT(2), 0.8 * ROOT(2)], [0.0, ROOT(2)]]),
        [[3 * (1 - 0.1 * ROOT(2)), 4 * (1 - 0.1 * ROOT(2))], [0.0, 1 - 0.5 * ROOT(2)]],
    ),
    "growing": (20.5, [[3.0, 4.0], [0.0, 16.0]], [[2.0, 8 / 3], [0.0, 1 / 9]]),
}
# One weight (2, 2, 1, 2): the norms of the units by granularity, 1 2 | 2 0 in the first filter and 0 0 | 0 2 in the second.
VALUES = [[[[1.0, 2.0]], [[2.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 2.0]]]]
BY_GRANULARITY = {
    "weight": (7.0, 7.0),
    "filter": (7 / 4, 2 * (3 + 2)),
    "kernel": (7 / 2, ROOT(2) * (ROOT(5) + 2 + 2)),
    "shared_kernel": (7 / 4, 2 * (ROOT(5) + ROOT(8))),
    "shared_weight": (7 / 2, ROOT(2) * (1 + 2 + 2 + 2)),
    "layer": (7 / 8, ROOT(8) * ROOT(13)),
}


def convolution(values: list) -> nn.Conv2d:
    weight = torch.tensor(values)
    made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def two_filters() -> nn.Sequential:
    return nn.Sequential(convolution([[[[3.0, 4.0]]], [[[0.0, 1.0]]]]))


def of(model: nn.Module, granularity: object = "filter", **options: object) -> Regularizer:
    return Regularizer(model, granularity=granularity, targets="*", **options)


@pytest.mark.parametrize("name", CASES)
def test_penalty_gradient_and_step_are_those_of_the_formula(name):
    value, gradient, stepped = CASES[name]
    model = two_filters()
    regularizer = of(model, penalty=name)
    found = regularizer.get_norm()
    assert found.item() == pytest.approx(value)
    assert torch.autograd.grad(found, model[0].weight)[0].view(2, 2).tolist() == [pytest.approx(row) for row in gradient]
    regularizer.terms[0].step_(lambda parameter: 0.5)
    assert model[0].weight.view(2, 2).tolist() == [pytest.approx(row) for row in stepped]


def test_every_entry_has_a_case():
    assert set(penalties.__all__) == {*CASES, "slimming"}


@pytest.mark.parametrize("granularity", BY_GRANULARITY)
def test_granularities_differ_as_worked_out_by_hand(granularity):
    model = nn.Sequential(convolution(VALUES))
    for name, value in zip(("l1", "group_lasso"), BY_GRANULARITY[granularity], strict=True):
        assert of(model, granularity, penalty=name).get_norm().item() == pytest.approx(value, rel=1e-6), name


def test_blocks_at_the_edge_count_the_weights_that_they_have():
    model = nn.Sequential(convolution([[[[3.0]], [[4.0]], [[2.0]]]]))  # blocks of 1 x 2: (3, 4), and 2 alone
    assert of(model, Block(1, 2)).get_norm().item() == pytest.approx(7 / 2 + 2)
    assert of(model, Block(1, 2), penalty="group_lasso").get_norm().item() == pytest.approx(5 * ROOT(2) + 2)


def test_settings_of_penalties():
    model = two_filters()
    assert of(model, penalty=GroupLasso(scaled=False)).get_norm().item() == pytest.approx(6)
    assert of(model, penalty=Growing(alpha=1)).get_norm().item() == pytest.approx((25 + 2) / 2)
    growing = of(model, penalty=GroupLasso(alpha=4))
    assert growing.get_norm().item() == pytest.approx(ROOT(2) * (5 + 16 * 1))
    growing.terms[0].step_(lambda parameter: 1.0001 / (16 * ROOT(2)))  # thresholds 1/16, and a little above 1
    assert model[0].weight.view(2, 2).tolist() == [pytest.approx([3 * 79 / 80, 4 * 79 / 80], rel=1e-5), [0, 0]]
    between = nn.Sequential(convolution([[[[5.0]]], [[[3.0]]], [[[1.0]]]]))  # (5 - 3) / (5 - 1) = 1/2, 2^(4/2) = 4
    assert of(between, penalty="growing").get_norm().item() == pytest.approx((25 + 4 * 9 + 16) / 2)
    equal = nn.Sequential(convolution([[[[2.0]]], [[[-2.0]]]]))
    assert of(equal, penalty="growing").get_norm().item() == pytest.approx((4 + 4) / 2)


def test_coupled_channels_are_one_unit_of_all_their_slices():
    first, last = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    first.weight, last.weight = nn.Parameter(torch.tensor([[3.0], [1.0]])), nn.Parameter(torch.tensor([[4.0, 0.0]]))
    model, inputs = nn.Sequential(first, nn.ReLU(), last), torch.ones(1, 1)
    made = {n: Regularizer(model, granularity="coupled", penalty=n, example_inputs=inputs) for n in CASES}
    assert {n: r.get_norm().item() for n, r in made.items()} == {n: pytest.approx(CASES[n][0]) for n in CASES}
    made["group_lasso"].terms[0].step_(lambda parameter: 0.5)
    assert first.weight.view(-1).tolist() == pytest.approx([3 * (1 - 0.1 * ROOT(2)), 1 - 0.5 * ROOT(2)])
    assert last.weight.view(-1).tolist() == pytest.approx([4 * (1 - 0.1 * ROOT(2)), 0])


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_slimming_penalises_the_scales_of_norms(granularity):
    norm = nn.BatchNorm2d(3)
    norm.weight, norm.bias = nn.Parameter(torch.tensor([2.0, -0.3, 1.0])), nn.Parameter(torch.ones(3))
    model = nn.Sequential(nn.Conv2d(1, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 1, 1))
    before = copy.deepcopy(model.state_dict())
    regularizer = Regularizer(model, granularity=granularity, penalty="slimming", example_inputs=torch.ones(2, 1, 2, 2))
    value = regularizer.get_norm()
    assert value.item() == pytest.approx(3.3)
    assert torch.autograd.grad(value, norm.weight)[0].tolist() == [1, -1, 1]
    regularizer.terms[0].step_(lambda parameter: 0.5)
    assert norm.weight.tolist() == pytest.approx([1.5, 0.0, 0.5])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if name != "1.weight")


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_a_scale_that_two_norms_share_is_penalised_once(granularity):
    one, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    other.weight = one.weight
    model = nn.Sequential(nn.Conv2d(3, 3, 1), one, nn.ReLU(), nn.Conv2d(3, 3, 1), other, nn.ReLU(), nn.Conv2d(3, 1, 1))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert Regularizer(model, granularity=granularity, penalty="slimming", example_inputs=x).get_norm().item() == 3


def test_units_at_or_below_the_threshold_are_exactly_zero_and_stay_without_nan():
    model = two_filters()
    regularizer = of(model, penalty="group_lasso")
    regularizer.terms[0].step_(lambda parameter: 1 / ROOT(2) + 1e-6)  # the threshold is a little above the norm 1
    assert model[0].weight.view(2, 2)[1].tolist() == [0, 0] and model[0].weight[0].norm().item() == pytest.approx(4, abs=1e-4)
    for rate in (0.0, torch.tensor(0.0), 10.0):
        for name in CASES:
            of(model, penalty=name).terms[0].step_(lambda parameter, rate=rate: rate)
            value = of(model, penalty=name).get_norm()
            gradient = torch.autograd.grad(value, model[0].weight)[0]
            assert value.isfinite() and gradient.isfinite().all() and not gradient[1].any(), (name, rate)


def test_entries_are_values_and_settings_are_checked():
    assert GroupLasso() == penalties.group_lasso and pickle.loads(pickle.dumps(Growing(3))) == Growing(3)
    for kind in (Growing, GroupLasso):
        with pytest.raises(ValueError, match=r"alpha must be a number of at least 0, got -1"):
            kind(alpha=-1)


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_a_unit_that_becomes_zero_takes_its_bias_and_its_norm_with_it(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.01, 1.0]).view(3, 1, 1, 1))
        model[3].weight.fill_(0.01)
        model[1].bias.fill_(1.0)
        model[0].bias.fill_(1.0)
    made = Regularizer(model, granularity=granularity, penalty="group_lasso", example_inputs=torch.ones(2, 1, 2, 2))
    made.terms[0].step_(lambda parameter: 0.1)
    for vector in (model[0].bias, model[1].weight, model[1].bias):
        assert vector.tolist() == [1.0, 0.0, 1.0]
    assert model[0].weight.view(-1)[1] == 0 and (model[3].weight.view(-1)[1] == 0) == (granularity == "coupled")


def test_without_strength_a_unit_of_zeros_keeps_its_bias():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 1))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    term = Regularizer(model, granularity="filter", penalty="group_lasso", targets="0").terms[0]
    for rate in (0.0, torch.tensor(0.0)):
        term.step_(lambda parameter, rate=rate: rate)
        assert model[0].bias.tolist() == [1, 1, 1] and not model[0].weight.any()
    term.step_(lambda parameter: 1e-6)
    assert not model[0].bias.any()
