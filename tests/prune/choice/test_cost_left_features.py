"""Shares of a model that loses features of its input: it is counted and timed on what it takes then."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.prune.choice import cost_left as shares
from fasterai.prune.choice.cost_left import macs_left, time_left
from tests.networks import perceptron

X = torch.zeros(3, 4)


def keeping(graph: ChannelGraph, **counts: int) -> list[np.ndarray]:
    """The first channels of the groups of features and of hidden channels."""
    wanted = [counts["features" if group.inputs else "hidden"] for group in graph.groups]
    return [np.arange(group.channels) < n for group, n in zip(graph.groups, wanted, strict=True)]


def test_macs_by_hand() -> None:
    model = perceptron(4, 8, 2)
    graph = channel_graph(model, (X,), features=1)
    left = macs_left(model, graph, (X,), model)
    assert left(keeping(graph, features=4, hidden=8)) == 1
    assert left(keeping(graph, features=1, hidden=8)) == (8 + 16) / 48
    assert left(keeping(graph, features=3, hidden=2)) == (6 + 4) / 48


def test_macs_of_a_model_that_takes_less_already() -> None:
    dense, model = perceptron(4, 8, 2), perceptron(3, 8, 2)
    graph = channel_graph(model, (X[:, :3],), features=1)
    left = macs_left(model, graph, (X[:, :3],), dense, (X,))
    assert left(keeping(graph, features=2, hidden=8)) == (16 + 16) / 48


def test_each_model_is_timed_on_its_own_input(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def seconds(model, inputs, *_):
        seen.add((model[0].in_features, tuple(inputs[0].shape)))
        return float(model[0].in_features)

    monkeypatch.setattr(shares, "seconds_per_pass", seconds)
    monkeypatch.setattr(shares, "SECONDS", 0.0)
    dense, model = perceptron(4, 8, 2), perceptron(3, 8, 2)
    graph = channel_graph(model, (X[:, :3],), features=1)
    assert time_left(model, graph, (X[:, :3],), dense, (X,))(keeping(graph, features=2, hidden=8)) == 0.5
    assert seen == {(4, (3, 4)), (2, (3, 2))}
