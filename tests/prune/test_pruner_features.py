"""Features of an input are a group like any other: scored over all of their readers, counted exactly, cut in steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.features import Features
from fasterai.graph.inputs import InputCut
from fasterai.prune.choice.budget import Budget
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner

X = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(40, 8), nn.Linear(40, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x)) + self.b(x))


def pruner(net: nn.Module, ratio: object = 0.5, features: object = 1, **options: object) -> Pruner:
    return Pruner(net, ratio, "local", "large_final", example_inputs=X, features=features, **options)


def test_the_lowest_over_all_readers_go_and_the_count_is_exact():
    net = Readers()
    scores = (net.a.weight.abs() + net.b.weight.abs()).sum(0)
    best = tuple(sorted(scores.topk(31).indices.tolist()))  # 40 features, of which 22.5 % go: no multiple of 8
    result = pruner(net, {"x.1": 0.225}).prune_model(measure=False)
    assert result.inputs == {"x": InputCut("x", 1, best, 40)}
    assert result.removed == {"x.1": (40, 31)} and net.a.in_features == net.b.in_features == 31
    assert net(X[:, list(best)]).shape == (4, 3)


def test_a_multiple_that_is_given_counts_for_features_too():
    with pytest.warns(UserWarning, match="kept channels are rounded up to multiples of 16"):
        result = pruner(Readers(), {"x.1": 0.5}, round_to=16).prune_model(measure=False)
    assert len(result.inputs["x"].keep) == 32


def test_features_that_are_to_stay_stay_whatever_they_score():
    net = Readers()
    net.a.weight.data[:, [3, 7]] = net.b.weight.data[:, [3, 7]] = 0
    result = pruner(net, {"x.1": 0.9}, Features(1, keep=[3, 7])).prune_model(measure=False)
    assert {3, 7} <= set(result.inputs["x"].keep) and len(result.inputs["x"].keep) == 2 + 4


def test_at_least_one_feature_is_left():
    with pytest.warns(UserWarning, match="pruned 39: min_keep=1"):
        result = pruner(Readers(), {"x.1": 0.999}).prune_model(measure=False)
    assert len(result.inputs["x"].keep) == 1


@pytest.mark.parametrize("is_copied", [False, True])
def test_steps_count_from_the_first_input_and_go_on_with_the_small_one(is_copied):
    net = Readers()
    at_once = pruner(copy.deepcopy(net), {"x.1": 0.5}).prune_model(measure=False)
    one = pruner(net, {"x.1": 0.5}, iterative_steps=3)
    for step in range(3):
        result = one.prune_model(measure=False)
        if is_copied and not step:
            one = pickle.loads(pickle.dumps(one))
    assert result.inputs == at_once.inputs and len(result.inputs["x"].keep) == 20
    assert one.channels["x.1"] == (40, 20) and one.inputs[0].shape == (4, 20)
    assert len(result.plan.inputs[0].keep) == 20 and result.plan.inputs[0].size in (26, 27)


def test_data_of_the_user_stays_whole_over_the_steps():
    batches = [(X, torch.tensor([0, 1, 2, 0]))]
    net = Readers()
    one = Pruner(
        net, 0.5, "local", "taylor", example_inputs=X, features=1, iterative_steps=2, data=batches, loss=F.cross_entropy
    )
    one.prune_model(measure=False)
    assert len(one.prune_model(measure=False).inputs["x"].keep) == 20


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.4)])
def test_a_budget_counts_the_model_on_its_small_input_over_all_steps(budget):
    net = Readers()
    one = Pruner(net, budget, "global", "large_final", example_inputs=X, features=1, iterative_steps=2)
    assert one.is_within_reach()
    one.prune_model(measure=False)
    left = len(one.prune_model(measure=False).inputs["x"].keep)
    hidden = net.head.in_features
    macs, parameters = 2 * left * hidden + 3 * hidden, 2 * left * hidden + 5 * hidden + 3
    share = macs / 664 if budget.kind == "macs" else parameters / 683
    assert left < 40 and 0.39 - 2 * left / 664 <= share <= 0.4


def test_without_features_the_groups_are_those_of_before():
    one = pruner(Readers(), features=None)
    assert one.original == {"a.weight": 8}
    assert one.prune_model(measure=False).inputs == {}


def test_features_that_have_to_stay_are_refused():
    with pytest.raises(ValueError, match="which stays whole: layer_norm averages over it"):
        pruner(nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_a_training_is_sent_to_the_sparsifier():
    with pytest.raises(TypeError, match=r"features must be left out, got some: the batches of a training stay whole"):
        GradualPruner(Readers(), 0.5, "local", "large_final", example_inputs=X, features=1)


def test_a_group_of_features_is_meant_by_its_own_name_alone():
    names = r"of a.weight, b.weight, got 'x'; groups with names of their own are x.1$"
    with pytest.raises(ValueError, match=names):
        pruner(Readers(), {"x": 0.5})
    assert pruner(Readers(), {"*": 0.5}).prune_model(measure=False).removed == {"a.weight": (8, 4)}
