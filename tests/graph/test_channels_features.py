"""An input that features names has labels, and goes with all that reads it; any other stays whole as ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.features import Features

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Readers(nn.Module):
    """A norm and a layer behind it read the input, and another layer reads it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.head = nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(self.norm(x))) + self.b(x))


class Wired(nn.Module):
    """A net of a few layers with a forward pass of the test's own."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, x, other=None):
        return self._forward(self.layers, x) if other is None else self._forward(self.layers, x, other)


def released(net: nn.Module, *inputs: object, features: object = 1):
    graph = channel_graph(net, inputs, features=features)
    return graph, [group for group in graph.groups if group.inputs]


def test_all_readers_of_an_input_are_in_one_group():
    graph, (group,) = released(Readers(), X)
    assert group.name == "x.1" and group.channels == 6
    scale, stats = [("norm.weight", 0), ("norm.bias", 0)], [("norm.running_mean", 0), ("norm.running_var", 0)]
    assert set(group.places) == {*scale, *stats, ("a.weight", 1), ("b.weight", 1)}
    assert set(group.inputs) == {("x", 1)}
    for indices in (*group.places.values(), *group.inputs.values()):
        assert indices.tolist() == [[0], [1], [2], [3], [4], [5]]
    assert graph.input_sizes == {("x", 1): 6} and graph.inputs == {("x", 0): "it is that of the samples"}
    assert "input x" in str(group)


def test_by_default_inputs_stay_whole_and_all_else_is_as_without_them():
    net = Readers()
    plain, asked = channel_graph(net, (X,)), channel_graph(net, (X,), features={"x": 1})
    assert [set(g.places) for g in plain.groups] == [set(g.places) for g in asked.groups if not g.inputs]
    assert plain.inputs["x", 1].startswith("it is an input, which stays whole unless features={'x': 1}")
    assert plain.pinned["a.weight", 1] == "linear reads a dimension of fixed size"
    assert plain.input_sizes == {} and not any(g.inputs for g in plain.groups)


def test_indices_that_are_to_stay_are_in_no_group():
    _, (group,) = released(Readers(), X, features=Features(1, keep=[0, 4]))
    assert group.inputs["x", 1].ravel().tolist() == [1, 2, 3, 5]
    assert group.places["b.weight", 1].ravel().tolist() == [1, 2, 3, 5]
    graph, none = released(Readers(), X, features=Features(1, keep=range(6)))
    assert none == [] and graph.inputs["x", 1] == "it is kept as asked for"


def test_a_residual_sum_ties_an_input_to_what_is_added_to_it():
    net = Wired(
        lambda m, x: m["head"](x + m["b"](F.relu(m["a"](x)))), a=nn.Linear(6, 9), b=nn.Linear(9, 6), head=nn.Linear(6, 3)
    )
    _, (group,) = released(net, X)
    made, read = {("layers.b.weight", 0), ("layers.b.bias", 0)}, {("layers.a.weight", 1), ("layers.head.weight", 1)}
    assert set(group.places) == made | read and group.name == "x.1"


def test_a_concatenation_keeps_the_places_of_the_input():
    net = Wired(lambda m, x: m["head"](torch.cat([F.relu(m["a"](x)), x], 1)), a=nn.Linear(6, 4), head=nn.Linear(10, 3))
    _, (group,) = released(net, X)
    assert group.places["layers.head.weight", 1].ravel().tolist() == [4, 5, 6, 7, 8, 9]


def test_equal_parts_lose_the_same_index_each():
    def forward(m, x):
        a, b = x.chunk(2, 1)
        return m["head"](m["a"](a) + m["b"](b))

    _, (group,) = released(Wired(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), head=nn.Linear(4, 2)), X)
    assert group.inputs["x", 1].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_channels_of_a_picture_go_with_all_their_pixels_where_it_is_flattened():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    _, (group,) = released(net, torch.randn(2, 3, 2, 2))
    assert group.name == "input.1" and group.places["1.weight", 1].tolist() == np.arange(12).reshape(3, 4).tolist()
    _, (columns,) = released(net, torch.randn(2, 3, 2, 2), features={"input": 3})
    assert columns.places["1.weight", 1].tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_convolutions_read_channels_and_depthwise_ones_pass_them_on():
    layers = {"a": nn.Conv2d(6, 6, 3, groups=6), "b": nn.Conv2d(6, 8, 1), "head": nn.Linear(8, 3)}
    net = Wired(lambda m, x: m["head"](F.relu(m["b"](m["a"](x))).mean((2, 3))), **layers)
    graph, (group,) = released(net, torch.randn(2, 6, 5, 5))
    assert {("layers.a.weight", 0), ("layers.a.bias", 0), ("layers.b.weight", 1)} == set(group.places)
    assert graph.inputs["x", 2].startswith("it is an input")


def test_two_inputs_that_meet_go_together_if_both_are_named():
    net = Wired(lambda m, x, other: m["head"](F.relu(m["a"](x * other))), a=nn.Linear(6, 5), head=nn.Linear(5, 3))
    _, (group,) = released(net, X, X, features={"x": 1, "other": 1})
    assert set(group.inputs) == {("x", 1), ("other", 1)}
    graph, none = released(net, X, X, features={"x": 1})
    assert none == [] and graph.inputs["x", 1] == "mul meets a dimension of fixed size"


@pytest.mark.parametrize(
    ("forward", "x", "features", "why"),
    [
        (lambda m, x: (m["a"](x), x), X, 1, "it is an output of the network"),
        (lambda m, x: m["a"](x[:, ::2]) + m["b"](x[:, 10:]), torch.randn(2, 12), 1, "cuts it at fixed positions"),
        (lambda m, x: m["a"](F.softmax(x, 1)), X, 1, "mixes its entries"),
        (lambda m, x: m["a"](F.layer_norm(x, (6,))), X, 1, "averages over it"),
        (lambda m, x: m["a"](m["e"](x).mean(1)), torch.randint(0, 9, (2, 4)), 1, "looks rows up by number"),
        (lambda m, x: m["a"](x.mean(1)), torch.randn(2, 5, 6), 1, "averages over it, and it is not zero where its"),
        (lambda m, x: m["a"](x.amax(1)), torch.randn(2, 5, 6), 1, "amax reduces it to one number"),
        (lambda m, x: m["c"](x).mean((2, 3)), torch.randn(2, 6, 5, 4), 2, "computes across it; single pixels may go where"),
        (lambda m, x: m["a"](torch.ones(2, 6)), X, 1, "no weight reads it"),
    ],
)
def test_what_has_to_stay_says_why(forward, x, features, why):
    layers = {"a": nn.Linear(6, 3), "b": nn.Linear(2, 3), "c": nn.Conv2d(6, 3, 3), "e": nn.Embedding(9, 6)}
    graph, groups = released(Wired(forward, **layers), x, features=features)
    assert groups == []
    assert why in graph.inputs["x", features]


def test_training_mode_reads_the_same_labels():
    class Aside(Readers):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            found = super().forward(x)
            return (found, self.aside(x)) if self.training else found

    _, (group,) = released(Aside(), X)
    assert ("aside.weight", 1) in group.places


def test_projections_of_an_attention_read_the_same_features():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    _, (group,) = released(Attends(), torch.randn(2, 5, 8), features=2)
    assert group.name == "x.2" and set(group.places) == {("attention.in_proj_weight", 1)}
