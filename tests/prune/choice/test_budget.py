"""Budgets: values by hand on small networks, reached within 1 % on others, whatever the steps of the choice."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

from fasterai.analyze.cost import cost
from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.prune.choice import budget as budget_module
from fasterai.prune.choice import cost_left as shares
from fasterai.prune.choice.budget import Budget, fit_budget, least_left
from fasterai.prune.choice.cost_left import macs_left, parameters_left
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import make_plan
from tests.networks import perceptron, short_mobilenet

Choose = Callable[[float], list[np.ndarray]]
X = torch.zeros(1, 4)


def mlp() -> nn.Module:
    """8 x (4 + 1 + 2) + 2 = 58 parameters, 8 x (4 + 2) = 48 MACs; a hidden channel is 7 and 6 of them."""
    return perceptron(4, 8, 2)


def chooser(graph: ChannelGraph, context: str = "local", round_to: int = 1, seed: int = 0) -> Choose:
    """Channels by random scores: the same share of each group, or the lowest of all."""
    dice = np.random.default_rng(seed)
    scores = [dice.random(g.channels) * (1 + dice.random()) for g in graph.groups]
    pooled = np.sort(np.concatenate(scores))

    def choose(sparsity: float) -> list[np.ndarray]:
        gone = round(sparsity * len(pooled))
        threshold = pooled[gone] if gone < len(pooled) else math.inf
        kept = []
        for values in scores:
            count = int((values >= threshold).sum()) if context == "global" else len(values) - round(sparsity * len(values))
            count = max(1, min(len(values), math.ceil(count / round_to) * round_to))
            kept.append(np.argsort(np.argsort(-values)) < count)
        return kept

    return choose


def counts(kept: list[np.ndarray]) -> list[int]:
    return [int(keep.sum()) for keep in kept]


# --- the value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of macs, params and latency, got none"),
        ({"macs": 0.5, "params": 0.4}, ValueError, "exactly one of macs, params and latency, got macs=0.5, params=0.4"),
        ({"macs": 0}, ValueError, r"macs must be in \(0, 1\], got 0$"),
        ({"params": -0.1}, ValueError, r"params must be in \(0, 1\], got -0.1"),
        ({"latency": 1.5}, ValueError, r"latency must be in \(0, 1\], got 1.5"),
        ({"macs": 50}, ValueError, "macs .* got 50; pass 0.5 for 50 %"),
        ({"macs": 100}, ValueError, "macs .* got 100; pass 1 for 100 %"),
        ({"macs": 101}, ValueError, "macs .* got 101$"),
        ({"macs": math.nan}, ValueError, "macs .* got nan"),
        ({"macs": math.inf}, ValueError, "macs .* got inf"),
        ({"macs": "half"}, TypeError, "macs must be a number .* got 'half'"),
        ({"params": True}, TypeError, "params must be a number .* got True"),
        ({"flops": 0.5}, TypeError, "Budget must be given macs=, params= or latency=, got flops=0.5; did you mean macs=0.5"),
        ({"parameters": 0.5}, TypeError, "got parameters=0.5; did you mean params=0.5"),
        ({"macs": 0.5, "memory": 1}, TypeError, "got memory=1$"),
        ({"batch": 4}, ValueError, "exactly one"),
        ({"macs": 0.5, "batch": 4}, ValueError, "batch must be left out for a budget of macs, got 4"),
        ({"latency": 0.5, "batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"latency": 0.5, "batch": 1.5}, TypeError, "batch must be a whole number .* got 1.5"),
    ],
)
def test_a_budget_says_what_is_wrong(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Budget(**options)  # type: ignore[arg-type]


def test_a_share_of_nothing_in_particular_is_no_budget() -> None:
    with pytest.raises(TypeError, match=r"given macs=, params= or latency=, got 0\.5; a share of what, as in macs=0\.5"):
        Budget(0.5)  # type: ignore[misc]


def test_a_budget_is_a_value() -> None:
    budget = Budget(latency=0.5, batch=4)
    assert (budget.kind, budget.share, budget.batch) == ("latency", 0.5, 4)
    assert (Budget(params=1).kind, Budget(params=1).share) == ("params", 1.0)
    assert Budget(macs=0.3) == Budget(macs=0.3) != Budget(macs=0.4)
    assert len({Budget(macs=0.3), Budget(macs=0.3)}) == 1
    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == replace(budget) == budget
    with pytest.raises(AttributeError):
        budget.batch = 5  # type: ignore[misc]


# --- by hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (Budget(params=0.5), 3),  # 2 + 7 x 3 = 23 of at most 29; 2 + 7 x 4 = 30 is more
        (Budget(params=0.52), 4),  # 30 of at most 30.16
        (Budget(macs=0.5), 4),  # 24 of 24: what is met exactly is kept to
        (Budget(macs=0.49), 3),
        (Budget(params=0.156), 1),  # 9 of 58 is 0.1552
        (Budget(params=0.97), 7),
    ],
)
def test_the_most_that_fits_stays(budget: Budget, kept: int) -> None:
    model = mlp()
    graph = channel_graph(model, (X,))
    found = fit_budget(model, graph, (X,), chooser(graph), budget)
    assert counts(found) == [kept]
    # The channels are those of the choice, not any as many.
    assert np.array_equal(found[0], chooser(graph)(1 - kept / 8)[0])


@pytest.mark.parametrize("kind", ["macs", "params", "latency"])
def test_all_stays_at_1(kind: str) -> None:
    model = mlp()
    graph = channel_graph(model, (X,))
    found = fit_budget(model, graph, (X,), chooser(graph), Budget(**{kind: 1.0}))
    assert counts(found) == [8]


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        (Budget(params=0.1), "params must be at least 0.156 .*got 0.1"),
        (Budget(macs=0.12), "macs must be at least 0.125 .*got 0.12"),
    ],
)
def test_what_cannot_be_reached_is_named(budget: Budget, least: str) -> None:
    """With one channel left it is 2 + 7 = 9 of 58 parameters, rounded up 0.156, and 6 of 48 MACs."""
    model = mlp()
    graph = channel_graph(model, (X,))
    with pytest.raises(ValueError, match=least):
        fit_budget(model, graph, (X,), chooser(graph), budget)


def test_the_share_that_is_named_can_be_reached() -> None:
    model = mlp()
    graph = channel_graph(model, (X,))
    assert counts(fit_budget(model, graph, (X,), chooser(graph), Budget(macs=0.125))) == [1]


def test_a_budget_counts_the_dense_model() -> None:
    """Of 58 parameters 4 channels leave 30; half of the 30 would be 15, or one channel."""
    dense, model = mlp(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = channel_graph(model, (X,))
    assert counts(fit_budget(model, graph, (X,), chooser(graph), Budget(params=0.5))) == [1]
    assert counts(fit_budget(model, graph, (X,), chooser(graph), Budget(params=0.5), dense)) == [3]
    assert counts(fit_budget(model, graph, (X,), chooser(graph), Budget(macs=0.25), dense)) == [2]
    assert counts(fit_budget(model, graph, (X,), chooser(graph), Budget(params=0.6), dense)) == [4]


def flags(*kept: int, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Of each group the first channels."""
    return [np.arange(size) < n for size, n in zip(sizes, kept, strict=True)]


@pytest.mark.parametrize("wanted", range(1, 8))
def test_the_first_number_for_which_it_holds(wanted: int) -> None:
    assert budget_module._first(lambda n: n >= wanted, 7) == wanted
    assert budget_module._first(lambda n: False, wanted) == wanted


def test_a_step_is_the_group_with_which_the_budget_is_kept() -> None:
    """Of 12 channels 12, 10, 7 and 6 are left; 8 are allowed. The third group does not move."""
    sizes = (4, 4, 1, 3)
    more, less = flags(4, 4, 1, 3, sizes=sizes), flags(2, 1, 1, 2, sizes=sizes)
    step = budget_module._step_between(lambda kept: sum(counts(list(kept))) / 12, more, less, 8 / 12)
    assert (counts(step.above), counts(step.below), step.group) == ([2, 4, 1, 3], [2, 1, 1, 3], 1)


def test_of_several_groups_that_move_too_much_the_one_that_leaves_most_goes_channel_by_channel() -> None:
    """A channel of the first group counts twice, so that the whole is 40; 24 are allowed.

    Without most of the second 31 are left, without most of the third as well 22, of the first instead 13: neither is close.
    From 31 on, channel by channel, it is 24 without seven of the third, or 23 without four of the first.
    """
    sizes = (10, 10, 10)

    def choose(sparsity: float) -> list[np.ndarray]:
        return flags(*(1 if sparsity >= at else 10 for at in (0.7, 0.5, 0.6)), sizes=sizes)

    def left(kept: Sequence[np.ndarray]) -> float:
        first, second, third = counts(list(kept))
        return (2 * first + second + third) / 40

    assert counts(budget_module._search(left, choose, 24 / 40)) == [10, 1, 3]


def test_a_model_without_products_has_no_budget_of_macs() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias = nn.Embedding(10, 6), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.table(x) + self.bias).relu().sum(-1)

    model, x = Table(), torch.zeros(1, 3, dtype=torch.long)
    graph = channel_graph(model, (x,))
    choose = lambda sparsity: [np.ones(g.channels, np.bool_) for g in graph.groups]  # noqa: E731
    with pytest.raises(ValueError, match=r"macs must be left out .* got 0.5; pass params"):
        fit_budget(model, graph, (x,), choose, Budget(macs=0.5))


# --- steps of the choice -------------------------------------------------------------------------------------------------


def test_a_leap_is_walked_group_by_group() -> None:
    """All groups leap at once, from 8 channels to 1; after two of the four leaps the budget is met."""
    model = nn.Sequential(*(layer for n in (4, 8, 8, 8) for layer in (nn.Linear(n, 8, bias=False), nn.ReLU())))
    model.append(nn.Linear(8, 2, bias=False))  # 32 + 3 x 64 + 16 = 240 weights
    graph = channel_graph(model, (X,))
    assert [g.channels for g in graph.groups] == [8, 8, 8, 8]

    asked = []

    def choose(sparsity: float) -> list[np.ndarray]:
        asked.append(sparsity)
        return [np.arange(8) < (8 if sparsity < 0.4 else 1)] * 4

    # After one leap: 4 + 8 + 128 + 16 = 156; after two: 4 + 1 + 8 + 64 + 16 = 93 of 240.
    found = fit_budget(model, graph, (X,), choose, Budget(params=93 / 240))
    assert counts(found) == [1, 1, 8, 8]
    assert len(asked) <= 25  # one bisection of [0, 1] to a millionth


def test_in_one_group_it_goes_channel_by_channel() -> None:
    """75 parameters a channel and 10 besides: of 19210 half is 9605, or 127 channels."""
    model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), torch.zeros(1, 64)
    graph = channel_graph(model, (x,))
    found = fit_budget(model, graph, (x,), lambda s: [np.arange(256) < (256 if s < 0.7 else 1)], Budget(params=0.5))
    assert counts(found) == [127]
    assert found[0][0]


def test_a_group_that_moves_too_much_is_held() -> None:
    """The first group has 4 channels, each an eighth of the MACs; the second makes up for it."""
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 64, bias=False), nn.ReLU())
    model.append(nn.Linear(64, 8, bias=False))  # MACs 256 + 256 + 512 = 1024; a channel 128, or 4 kept + 8
    x = torch.zeros(1, 64)
    graph = channel_graph(model, (x,))
    left = macs_left(model, graph, (x,), model)
    for share in (0.9, 0.8, 0.6, 0.45, 0.3):
        kept = fit_budget(model, graph, (x,), chooser(graph), Budget(macs=share))
        assert share - 12 / 1024 <= left(kept) <= share


def test_multiples_stay_where_the_budget_can_be_met_with_them() -> None:
    model, x, graph = network("resnet18")
    left = parameters_left(model, graph, model)
    for share in (0.31, 0.62):
        kept = fit_budget(model, graph, x, chooser(graph, "local", 8), Budget(params=share))
        assert share - 0.01 <= left(kept) <= share
        assert all(count % 8 == 0 for count in counts(kept))


# --- within 1 % ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.one, self.two = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.last, self.head = nn.Conv2d(32, 128, 3), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(self.one(x).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


NETWORKS = {
    "small": Small,
    "resnet18": lambda: resnet18(weights=None),
    "mobilenet_v2": short_mobilenet,
    "vit": lambda: VisionTransformer(32, 8, 2, 4, 128, 256),
}


@cache
def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...], ChannelGraph]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), (torch.randn(1, 3, 32, 32),)
    return model, x, channel_graph(model, x)


@settings(max_examples=12, deadline=None)
@given(
    share=st.floats(0.02, 1.0),
    kind=st.sampled_from(["macs", "params"]),
    context=st.sampled_from(["local", "global"]),
    round_to=st.sampled_from([1, 8]),
    seed=st.integers(0, 5),
)
def test_any_budget_is_met_or_refused(share: float, kind: str, context: str, round_to: int, seed: int) -> None:
    model, x, graph = network("small")
    choose = chooser(graph, context, round_to, seed)
    left = macs_left(model, graph, x, model) if kind == "macs" else parameters_left(model, graph, model)
    if left(choose(1.0)) > share:
        with pytest.raises(ValueError, match=f"{kind} must be at least"):
            fit_budget(model, graph, x, choose, Budget(**{kind: share}))
    else:
        kept = fit_budget(model, graph, x, choose, Budget(**{kind: share}))
        assert share - 0.01 <= left(kept) <= share
        assert all(keep.any() for keep in kept)


@pytest.mark.parametrize(
    ("name", "kind", "context"),
    [
        ("resnet18", "macs", "global"),
        ("mobilenet_v2", "params", "local"),
        ("vit", "macs", "local"),
        ("vit", "params", "global"),
    ],
)
def test_budgets_of_known_networks(name: str, kind: str, context: str) -> None:
    """Counted on a copy that is really cut, as is the number of its stream's channels that a transformer's class keeps."""
    model, x, graph = network(name)
    share = 0.6 if name == "vit" else 0.4
    small = copy.deepcopy(model)
    kept = fit_budget(model, graph, x, chooser(graph, context), Budget(**{kind: share}))
    Surgery(small, make_plan(small, graph, kept, streams=True))
    assert all(keep.sum() < len(keep) for keep in kept if context == "local")
    dense, after = cost(model, x), cost(small, x)
    left = after.macs / dense.macs if kind == "macs" else after.parameters / dense.parameters
    assert share - 0.01 <= left <= share
    assert small(*x).shape == model(*x).shape


# --- code with a size written into it ------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[1] != 32:
            raise RuntimeError("32 wanted")
        return self.third(self.second(x).relu())


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_groups_without_which_the_code_fails_stay_and_the_others_make_up_for_it(kind: str) -> None:
    """MACs 128 + 1024 + 64 = 1216, a second channel 34; half is 608 = 128 + 14.1 x 34, so that 14 stay.

    Parameters 160 + 1056 + 66 = 1282, a channel 35: 641 = 160 + 2 + 13.7 x 35, so that 13 stay.
    """
    model = Stubborn()
    graph = channel_graph(model, (X,))
    found = fit_budget(model, graph, (X,), chooser(graph), Budget(**{kind: 0.5}))
    assert sorted(counts(found)) == sorted([32, 14 if kind == "macs" else 13])


def test_what_must_stay_counts_in_the_least_share() -> None:
    """128 + 34 of 1216 are 0.1332."""
    model = Stubborn()
    graph = channel_graph(model, (X,))
    with pytest.raises(ValueError, match=r"macs must be at least 0\.134 .*got 0\.1;"):
        fit_budget(model, graph, (X,), chooser(graph), Budget(macs=0.1))


def test_the_least_that_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel of a group each: 9 of 58 parameters and 6 of 48 MACs; 162 of 1216 where the first group has to stay."""
    timed(monkeypatch, 0.4, 0.0)
    model, stubborn = mlp(), Stubborn()
    graph, other = channel_graph(model, (X,)), channel_graph(stubborn, (X,))
    least, dense = chooser(graph)(1.0), nn.Linear(4, 20)
    assert least_left(model, graph, (X,), least, Budget(params=0.5)) == 9 / 58
    assert least_left(model, graph, (X,), least, Budget(params=0.5), dense) == 9 / 100
    assert least_left(model, graph, (X,), least, Budget(macs=0.5)) == 6 / 48
    assert least_left(model, graph, (X,), least, Budget(latency=0.5)) == pytest.approx(0.4 + 0.6 * 6 / 48)
    assert least_left(stubborn, other, (X,), chooser(other)(1.0), Budget(macs=0.5)) == 162 / 1216


# --- latency -------------------------------------------------------------------------------------------------------------


def timed(
    monkeypatch: pytest.MonkeyPatch, overhead: float, noise: float, bend: Callable[[float], float] = lambda macs: macs
) -> list[tuple[int, ...]]:
    """A machine whose time is an overhead and the rest in proportion to the MACs, with noise; and the inputs' shapes it saw."""
    dice, seen = np.random.default_rng(0), []

    def time_left(model: nn.Module, graph: ChannelGraph, inputs: tuple[Tensor, ...], dense: nn.Module):
        macs = macs_left(model, graph, inputs, dense)

        def left(kept: list[np.ndarray]) -> float:
            seen.append(tuple(inputs[0].shape))
            return (overhead + (1 - overhead) * bend(macs(kept))) * float(dice.normal(1, noise))

        return left

    monkeypatch.setattr(budget_module, "time_left", time_left)
    return seen


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("overhead", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_latency_is_met_within_5_percent(
    monkeypatch: pytest.MonkeyPatch, share: float, overhead: float, noise: float
) -> None:
    seen = timed(monkeypatch, overhead, noise)
    model, x, graph = network("small")
    kept = fit_budget(model, graph, x, chooser(graph), Budget(latency=share))
    true = overhead + (1 - overhead) * macs_left(model, graph, x, model)(kept)
    assert share - 0.05 <= true <= share + 0.05
    assert len(seen) <= 10
    assert set(seen) == {(1, 3, 32, 32)}


@pytest.mark.parametrize("power", [0.3, 3.0])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_time_that_does_not_follow_the_macs_evenly_is_met(
    monkeypatch: pytest.MonkeyPatch, share: float, power: float
) -> None:
    seen = timed(monkeypatch, 0.0, 0.0, lambda macs: macs**power)
    model, x, graph = network("small")
    kept = fit_budget(model, graph, x, chooser(graph), Budget(latency=share))
    assert share - 0.05 <= macs_left(model, graph, x, model)(kept) ** power <= share + 0.05
    assert len(seen) <= 10


def test_of_a_time_with_leaps_the_nearest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are 1/3, 2/3 or 1; 2/3 is nearest to 0.63."""
    timed(monkeypatch, 0.0, 0.0, lambda macs: math.ceil(macs * 3) / 3)
    model, x, graph = network("small")
    kept = fit_budget(model, graph, x, chooser(graph), Budget(latency=0.63))
    assert 1 / 3 < macs_left(model, graph, x, model)(kept) <= 2 / 3


def test_a_latency_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.4 of overhead and 6 of 48 MACs left, 0.4 + 0.6 x 0.125 = 0.475 of the time is left."""
    timed(monkeypatch, 0.4, 0.0)
    model = mlp()
    graph = channel_graph(model, (X,))
    with pytest.raises(ValueError, match=r"latency must be at least 0\.475 .*got 0\.3;"):
        fit_budget(model, graph, (X,), chooser(graph), Budget(latency=0.3))


def test_the_batch_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch, 0.1, 0.0)
    model, x, graph = network("small")
    fit_budget(model, graph, x, chooser(graph), Budget(latency=0.6, batch=5))
    assert set(seen) == {(5, 3, 32, 32)}


def test_a_latency_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many MACs that takes is the machine's matter: a wide layer may fit its cache once some of it is gone."""
    torch.set_num_threads(1)
    monkeypatch.setattr(shares, "SECONDS", 0.2)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16))
    x = (torch.randn(64, 256),)
    graph = channel_graph(model, x)
    kept = fit_budget(model, graph, x, chooser(graph), Budget(latency=0.4))
    assert 0.05 < macs_left(model, graph, x, model)(kept) < 0.95
