"""Masks of all readers of an input agree where its features are units, in training and through a resume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Batch, Fit, Loop
from fasterai.graph.features import Features
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b, self.head = nn.BatchNorm1d(12), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(self.norm(x))) + self.b(x))


def sparsifier(net: nn.Module, features: object = 1, **options: object) -> Sparsifier:
    given = {"sparsity": 0.5, "example_inputs": X, "features": features} | options
    return Sparsifier(net, "coupled", "local", "large_final", **given)


def read(net: Readers) -> list[list[int]]:
    """The features that each of the readers still reads."""
    return [layer.weight.any(0).nonzero().ravel().tolist() for layer in (net.a, net.b)]


def train(net: nn.Module, method: Sparsifier, optimizer: torch.optim.Optimizer, steps: range, state: object = None) -> None:
    with attach(optimizer, method, model=net, total_steps=6) as handle:
        if state is not None:
            handle.load_state_dict(state)
        for _ in steps:
            optimizer.zero_grad()
            F.cross_entropy(net(X), Y).backward()
            optimizer.step()


def test_masks_of_all_readers_agree_and_the_features_then_go():
    net = Readers()
    method = sparsifier(net)
    method.sparsify_model()
    a, b = read(net)
    assert a == b and len(a) == 6
    assert net.norm.weight.nonzero().ravel().tolist() == a
    net.eval()
    wanted = net(X)
    result = remove(net, X, features=1, measure=False)
    assert result.inputs["x"].keep == tuple(a) and not result.refused
    torch.testing.assert_close(net(X[:, a]), wanted)
    assert method.sparsity.overall == 0


def test_without_features_two_readers_keep_all_columns():
    net = Readers()
    sparsifier(net, None).sparsify_model()
    assert read(net) == [list(range(12))] * 2


def test_features_have_a_share_of_their_own_and_some_stay():
    net = Readers()
    net.a.weight.data[:, [2, 5]] = net.b.weight.data[:, [2, 5]] = 1e-6
    sparsifier(net, Features(1, keep=[2, 5]), sparsity={"x.1": 0.9}).sparsify_model()
    assert {2, 5} <= set(read(net)[0]) and len(read(net)[0]) == 2 + 1
    assert net.a.weight.any(1).all()


def test_features_that_return_get_their_scale_back():
    net = Readers()
    method = sparsifier(net)
    method.sparsify_model(0.5)
    assert net.norm.weight.eq(0).sum() == 6
    method.sparsify_model(0.0)
    assert net.norm.weight.eq(1).all()


def test_a_resumed_run_ends_as_one_that_was_not_stopped():
    def begin() -> tuple[Readers, Sparsifier, torch.optim.Optimizer]:
        net = Readers()
        return net, sparsifier(net), torch.optim.Adam(net.parameters(), 0.01)

    net, method, optimizer = begin()
    train(net, method, optimizer, range(6))
    assert len(read(net)[0]) == 6 and read(net)[0] == read(net)[1]
    half, first, optimizer = begin()
    handle = attach(optimizer, first, model=half, total_steps=6)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(half(X), Y).backward()
        optimizer.step()
    states = copy.deepcopy((half.state_dict(), optimizer.state_dict(), handle.state_dict()))
    handle.remove(completed=False)
    other, second, optimizer = begin()
    other.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(other, second, optimizer, range(3), states[2])
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_inputs_are_looked_at_with_the_first_batch_where_none_are_given():
    net = Readers()
    method = sparsifier(net, {"x": 1}, example_inputs=None, schedule="one_shot")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loop = Loop([method])
    loop.start(Fit(2, net, optimizer, batch=Batch((X,), (Y,))))
    for _ in range(2):
        F.cross_entropy(net(X), Y).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
    loop.end(True)
    assert len(read(net)[0]) == 6 and read(net)[0] == read(net)[1]


@pytest.mark.parametrize("granularity", ["row", "weight", "column"])
def test_other_granularities_have_no_features(granularity):
    with pytest.raises(ValueError, match=r"features must be left out but for granularity 'coupled', got \{'x': 1\}"):
        Sparsifier(Readers(), granularity, features={"x": 1})


def test_what_is_no_features_is_refused_at_once():
    with pytest.raises(TypeError, match="features must be a dict of inputs to dimensions, a dimension or True, got 'x'"):
        Sparsifier(Readers(), "coupled", features="x")
