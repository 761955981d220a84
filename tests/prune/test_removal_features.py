"""Features that no layer reads go from all that reads the input; the small model computes from what stays of it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.features import Features
from fasterai.graph.inputs import InputCut, cut_inputs, input_cuts
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove, silent_channels
from fasterai.prune.surgery.operate import apply_plan_
from fasterai.prune.surgery.plan import Plan


class Flat(nn.Module):
    """Several readers of one input: a norm in front of one, a sum with the input itself, and a concatenation with it."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm1d(features), nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.c, self.head = nn.Linear(features, hidden), nn.Linear(hidden + features, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.relu(self.a(self.norm(x))))
        return self.head(torch.cat([F.relu(self.c(x)), x], 1))

    def readers(self, hidden: int) -> list[Tensor]:
        return [self.a.weight, self.c.weight, self.head.weight[:, hidden:]]


class Picture(nn.Module):
    """A depthwise layer and two convolutions read the channels of one input."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(features, features, 3, padding=1, groups=features), nn.Conv2d(features, hidden, 1)
        self.c, self.head = nn.Conv2d(features, hidden, 3, padding=1), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x))) + self.c(x)).mean((2, 3)))

    def readers(self, hidden: int) -> list[Tensor]:
        return [self.b.weight, self.c.weight]


def drawn(seed: int) -> tuple[nn.Module, Tensor, list[int]]:
    """A net of random sizes and weights of which some features are read by nobody, an input, and the features that are."""
    dice = np.random.default_rng(seed)
    torch.manual_seed(seed)
    features, hidden = int(dice.integers(3, 12)), int(dice.integers(2, 9))
    kind, shape = [(Flat, (5, features)), (Picture, (2, features, 6, 5))][seed % 2]
    net = kind(features, hidden)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    dead = dice.permutation(features)[: int(dice.integers(1, features))]
    with torch.no_grad():
        for weight in net.readers(hidden):
            weight[:, torch.as_tensor(dead)] = 0
        one = net.readers(hidden)[0]  # a column that only one of the readers has lost
        one[:, int(next(i for i in range(features) if i not in dead))] = 0
    return net.eval(), torch.randn(shape), sorted(set(range(features)) - set(dead.tolist()))


@pytest.mark.parametrize("seed", range(8))
def test_exactly_the_features_that_nobody_reads_go_and_the_outputs_stay(seed):
    net, x, read = drawn(seed)
    wanted = net(x)
    result = remove(net, x, features={"x": 1}, measure=False)
    assert result.inputs == {"x": InputCut("x", 1, tuple(read), x.shape[1])} and not result.refused
    assert result.removed["x.1"] == (x.shape[1], len(read))
    torch.testing.assert_close(net(x[:, read]), wanted, rtol=1e-4, atol=1e-5)


def column_net() -> nn.Sequential:
    """Six features, of which 1 and 4 are read by nobody."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.data[:, [1, 4]] = 0
    return net.eval()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_without_being_asked_inputs_stay_whole():
    net = column_net()
    with pytest.warns(UserWarning, match="nothing was removed"):
        result = remove(net, X)
    assert result.inputs == {} and net[0].in_features == 6 and input_cuts(net) == {}
    assert "cut_inputs" not in result.to_dict()


def test_dead_features_that_are_to_stay_stay():
    net = column_net()
    result = remove(net, X, features=Features(1, keep=[4]), measure=False)
    assert result.inputs["input"].keep == (0, 2, 3, 4, 5)


def test_the_report_names_what_stays_of_the_input_and_counts_the_small_one_on_it():
    result = remove(column_net(), X, features=True)
    assert "takes less of its input input, dimension 1: 4 of 6 stay (0, 2, 3, 5)" in str(result).splitlines()
    macs = {name: cost.macs for name, cost in result.comparison.costs.items()}
    assert macs == {"dense": 3 * (6 * 8 + 8 * 2), "small": 3 * (4 * 8 + 8 * 2)}
    data = json.loads(json.dumps(result.to_dict()))
    assert data["cut_inputs"] == [{"argument": "input", "dim": 1, "keep": [0, 2, 3, 5], "size": 6}]


def test_the_plan_tells_a_fresh_model_what_it_takes():
    result = remove(net := column_net(), X, features=1, measure=False)
    plan = Plan.from_dict(json.loads(json.dumps(result.plan.to_dict())))
    apply_plan_(fresh := column_net(), plan)
    assert input_cuts(fresh) == result.inputs == {"input": InputCut("input", 1, (0, 2, 3, 5), 6)}
    assert torch.equal(fresh(*cut_inputs(fresh, (X,), plan.inputs)), net(X[:, [0, 2, 3, 5]]))
    assert "input" in str(plan)


def test_a_second_removal_counts_from_the_first_input():
    net = column_net()
    remove(net, X, features=1, measure=False)
    net[0].weight.data[:, 2] = 0  # feature 3 of the first input
    result = remove(net, X[:, [0, 2, 3, 5]], features=1, measure=False)
    assert result.inputs == {"input": InputCut("input", 1, (0, 2, 5), 6)}
    assert result.plan.inputs == (InputCut("input", 1, (0, 1, 3), 4),)


def test_a_removal_that_fails_leaves_no_note(monkeypatch):
    net = column_net()
    before = copy.deepcopy(net.state_dict())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fasterai.prune.surgery.operate.announce", fail)
    with pytest.raises(KeyboardInterrupt):
        remove(net, X, features=1, measure=False)
    assert input_cuts(net) == {} and net[0].in_features == 6
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())


def test_features_that_code_counts_on_are_refused_with_the_reason():
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.split(3, 1)  # three, whatever comes
            return self.a(a) + self.b(b)

    net = Splits()
    net.a.weight.data[:, 1] = net.b.weight.data[:, 1] = 0
    wanted = net(X)
    with pytest.warns(UserWarning, match="nothing was removed"):
        result = remove(net, X, features=1, rewrite=False)
    assert "the model fails without them" in result.refused["x.1"] and result.inputs == {} and net(X).shape == (3, 4)
    result = remove(net, X, features=1, measure=False)  # its code is put right
    assert result.inputs == {"x": InputCut("x", 1, (0, 2, 3, 5), 6)}
    assert torch.equal(net(X[:, [0, 2, 3, 5]]), wanted)


def test_features_that_may_not_go_are_refused_before_anything_is_changed():
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="which stays whole: layer_norm averages over it"):
        remove(net, X, features=1)
    assert net[1].in_features == 6


def test_inputs_in_a_dict_are_cut_where_they_stand():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)

        def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
            return (self.a(batch["cont"]) + self.b(batch["rest"])) * scale

    net = Nested().eval()
    net.a.weight.data[:, [0, 2]] = 0
    given = ({"cont": X, "rest": torch.randn(3, 5)}, 2.0)
    wanted = net(*given)
    result = remove(net, given, features={"cont": 1}, measure=False)
    assert result.inputs == {"batch['cont']": InputCut("batch['cont']", 1, (1, 3, 4, 5), 6)}
    torch.testing.assert_close(net(*cut_inputs(net, given, result.inputs.values())), wanted)


def test_an_optimizer_and_a_copy_lose_the_same_columns():
    net, average = column_net(), column_net()
    optimizer = torch.optim.Adam(net.parameters())
    net.train()(X).sum().backward()
    optimizer.step()
    net[0].weight.data[:, [1, 4]] = 0
    remove(net, X, features=1, optimizer=optimizer, copies=[average], measure=False)
    assert optimizer.state[net[0].weight]["exp_avg"].shape == average[0].weight.shape == (8, 4)
    assert input_cuts(average) == input_cuts(net)


def test_continuous_columns_of_a_tabular_model_go_and_categories_stay():
    tabular = pytest.importorskip("fastai.tabular.model")
    torch.manual_seed(0)
    net = tabular.TabularModel([(5, 3), (4, 2)], 6, 2, [8]).eval()
    net.layers[0][0].weight.data[:, 5 + 2] = 0
    given = (torch.randint(0, 4, (3, 2)), X)
    wanted = net(*given)
    result = remove(net, given, features={"x_cont": 1}, measure=False)
    assert result.inputs["x_cont"].keep == (0, 1, 3, 4, 5) and net.bn_cont.num_features == 5
    torch.testing.assert_close(net(given[0], result.inputs["x_cont"].cut(X)), wanted)
    with pytest.raises(ValueError, match="takes one entry of it by number"):
        remove(net, (given[0], X[:, :5]), features={"x_cat": 1})


def test_the_small_model_is_exported_with_its_small_input(tmp_path):
    pytest.importorskip("onnxruntime")
    from fasterai.export.onnx import ONNXModel, export_onnx

    result = remove(net := column_net(), X, features=1, measure=False)
    small = result.inputs["input"].cut(X)
    path = export_onnx(net, small, tmp_path / "small.onnx")
    torch.testing.assert_close(ONNXModel(path)(small), net(small), rtol=1e-4, atol=1e-5)


class Wired(nn.Module):
    """A net of a few layers with a forward pass of the test's own."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self._forward = nn.ModuleDict(layers), forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self.layers, *inputs)


def attention(width: int, **options: int) -> nn.Module:
    return nn.MultiheadAttention(width, 2, batch_first=True, **options)


def squeezed(m, x):
    return m["head"](x * torch.sigmoid(m["b"](F.relu(m["a"](x.mean((2, 3), keepdim=True))))))


#: How inputs are read: layers, the forward pass, shapes of inputs, and the dimension that is released, of the last of them.
READ = {
    "keys and values": (
        {"a": attention(8, kdim=6, vdim=6), "head": nn.Linear(8, 3)},
        lambda m, x, y: m["head"](m["a"](x, y, y, need_weights=False)[0]),
        [(2, 5, 8), (2, 4, 6)],
        2,
    ),
    "attention with a sum": (
        {"a": attention(8), "head": nn.Linear(8, 3)},
        lambda m, x: m["head"](x + m["a"](x, x, x, need_weights=False)[0]),
        [(2, 5, 8)],
        2,
    ),
    "recurrent": (
        {"a": nn.GRU(6, 5, 2, bidirectional=True, batch_first=True), "head": nn.Linear(10, 3)},
        lambda m, x: m["head"](m["a"](x)[0]),
        [(2, 5, 6)],
        2,
    ),
    "one layer twice": (
        {"a": nn.Linear(6, 6), "head": nn.Linear(6, 3)},
        lambda m, x: m["head"](m["a"](F.relu(m["a"](x)))),
        [(4, 6)],
        1,
    ),
    "gate": ({"a": nn.Linear(6, 6), "head": nn.Linear(6, 3)}, lambda m, x: m["head"](x * m["a"](x).sigmoid()), [(4, 6)], 1),
    "squeeze and excite": (
        {"a": nn.Conv2d(6, 4, 1), "b": nn.Conv2d(4, 6, 1), "head": nn.Conv2d(6, 5, 1)},
        squeezed,
        [(2, 6, 4, 4)],
        1,
    ),
    "transposed": ({"head": nn.Linear(6, 8)}, lambda m, x: m["head"](x.transpose(1, 2)), [(2, 6, 5)], 1),
    "repeated": ({"head": nn.Linear(12, 3)}, lambda m, x: m["head"](x.repeat(1, 2)), [(4, 6)], 1),
    "groups": ({"a": nn.ConvTranspose2d(6, 8, 3, groups=2)}, lambda m, x: m["a"](x), [(2, 6, 5, 5)], 1),
    "group norm": (
        {"norm": nn.GroupNorm(3, 6), "head": nn.Conv2d(6, 4, 1)},
        lambda m, x: m["head"](m["norm"](x)),
        [(2, 6, 3, 3)],
        1,
    ),
}


@pytest.mark.parametrize("way", READ)
def test_the_small_network_computes_on_the_cut_input_what_zeros_in_all_readers_do(way):
    layers, forward, shapes, dim = READ[way]
    torch.manual_seed(0)
    dense = Wired(forward, **copy.deepcopy(layers)).double().eval()
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    small, masked, name = copy.deepcopy(dense), copy.deepcopy(dense), f"inputs[{len(shapes) - 1}]"
    pruner = Pruner(small, {f"{name}.{dim}": 0.5}, "local", "random", example_inputs=inputs, features={name: dim})
    result = pruner.prune_model(measure=False)
    with torch.no_grad():
        for (parameter, d), kept in result.plan.keep.items():
            weight = masked.get_parameter(parameter)
            gone = np.setdiff1d(np.arange(weight.shape[d]), kept)
            weight.index_fill_(d, torch.as_tensor(gone), 0)
    others = tuple(torch.randn_like(x) for x in inputs)
    assert result.inputs[name].keep and not result.refused
    torch.testing.assert_close(small(*cut_inputs(small, others, result.inputs.values())), masked(*others))


def test_what_is_added_to_an_input_does_not_make_it_silent():
    layers = {"a": nn.Linear(6, 4), "b": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    net = Wired(lambda m, x: m["head"](x + m["b"](F.relu(m["a"](x)))), **layers)
    layers["b"].weight.data.zero_()
    layers["b"].bias.data.zero_()  # what is added is zero, what enters is not
    graph = channel_graph(net, (X,), features=1)
    (at,) = (i for i, group in enumerate(graph.groups) if group.inputs)
    assert not silent_channels(net, graph)[at].any()
    for name in ("a", "head"):
        layers[name].weight.data[:, 2] = 0
    assert silent_channels(net, graph)[at].tolist() == [False, False, True, False, False, False]
