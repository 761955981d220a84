"""Operations recorded from runs: what runs show, the ways that values take, and that the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import ChannelGraph, channel_graph
from fasterai.graph.exported import exported, unmet, used_otherwise
from fasterai.graph.recorded import Recording, recorded, variations
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal, mask_channels_, remove

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, two branches, a head, and a forward pass as a function of them."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.head = nn.Linear(8, 2)
        self.more = nn.ModuleDict(layers)
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def two_ways(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x).relu()
    return m.head((m.left(y) if x.sum() > 0 else m.right(y)).relu())


def one(run: Callable[..., Any] = two_ways, *inputs: Any, **layers: nn.Module) -> Recording:
    """The record of the first run of a network."""
    return recorded(Net(run, **layers).eval(), inputs or (X,))[0]


def halved(net: nn.Module, inputs: Any = X) -> tuple[Removal, float]:
    """Half of all channels masked and removed, and how far outputs have moved, on both ways through the code."""
    ways = [inputs, -inputs, inputs.abs(), -inputs.abs()]
    graph = channel_graph(net, (inputs,))
    mask_channels_(net, graph, [torch.arange(g.channels).numpy() % 2 == 0 for g in graph.groups])
    with torch.no_grad():
        before = [net(x) for x in ways]
        removal = remove(net, inputs, measure=False)
        return removal, max(float((net(x) - y).abs().max()) for x, y in zip(ways, before, strict=True))


def test_branches_by_value_are_followed_each_and_their_channels_go() -> None:
    net = Net(two_ways).double().eval()
    programs = exported(net, (X.double(),))
    assert [one.unread() for one in programs] == [["left.weight", "left.bias"], ["right.weight", "right.bias"]][
        :: 1 if X.sum() < 0 else -1
    ]
    removal, moved = halved(net, X.double())
    assert removal.removed == {"stem.weight": (16, 8), "left.weight": (8, 4)} and not removal.refused
    assert moved < 1e-12
    assert tuple(net.right.weight.shape) == (4, 8)


def test_the_reports_say_that_operations_were_recorded_and_why() -> None:
    net = Net(two_ways).eval()
    graph = channel_graph(net, (X,))
    assert isinstance(graph, ChannelGraph)
    removal = Pruner(net, 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    for shown in (str(graph), str(removal), removal.to_dict()["recorded"]):
        assert "operations recorded from runs, which took 2 ways through the code" in shown
        assert "data-dependent" in shown
    assert channel_graph(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (X,)).recorded == ""


def test_what_no_run_has_met_keeps_all_that_it_may_read() -> None:
    """One way is taken by no example: what it may read, 16 wide, and what it makes, 20 wide, stays; 12 wide may go."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.more["wide"](m.stem(x).relu()).relu() if x.sum() < 1e9 else m.more["rare"](m.stem(x).relu())
        return m.more["last"](m.more["end"](y).relu())

    layers = {"wide": nn.Linear(16, 20), "rare": nn.Linear(16, 20, bias=False), "end": nn.Linear(20, 12)}
    net = Net(run, **layers, last=nn.Linear(12, 2)).eval()
    net.left = net.right = net.head = nn.Identity()
    with pytest.warns(UserWarning, match=r"no recorded run has met all parameters, such as more\.rare\.weight"):
        graph = channel_graph(net, (X,))
    assert [g.name for g in graph.groups] == ["more.end.weight"]
    assert "more.rare.weight, which no recorded run has met, may read it" in graph.pinned["stem.weight", 0]
    rare = torch.full((1, 4), 1e9)
    mask_channels_(net, graph, [torch.arange(12).numpy() > 5])
    wanted = net(rare)
    with pytest.warns(UserWarning, match="channels that they fit stay"):
        assert remove(net, X, measure=False).removed == {"more.end.weight": (12, 6)}
    torch.testing.assert_close(net(rare), wanted)


def test_a_way_that_breaks_without_channels_is_found_by_the_check() -> None:
    """A size stands in the code of one way; the runs have met all parameters."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        y = y.reshape(len(x), 16) if x.sum() > 0 else y
        return m.head((m.left(y) + m.right(y)).relu())

    removal, moved = halved(Net(run).double().eval(), X.double())
    assert set(removal.removed) == {"left.weight"} and moved < 1e-12
    assert "the model fails without them" in removal.refused["stem.weight"]


def test_a_weight_that_makes_on_one_way_and_reads_on_another_is_known() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        return F.linear(m.left(y), m.left.weight.t() if x.sum() > 0 else m.right.weight.t())

    with pytest.warns(UserWarning, match="no recorded run has met all parameters"):  # the head is in no way
        assert used_otherwise(exported(Net(run).eval(), (X,))) == {"left.weight"}


def test_tensors_are_known_by_where_they_lie() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu().data
        return m.head(F.linear(torch.from_numpy(y.numpy()), m.left.weight.data, m.left.bias) * 2.0)

    found = one(run)
    assert found.reads_values
    uses = {found.names[n.name]: len(n.users) for n in found.graph.nodes if n.name in found.names}
    assert uses["left.weight"] == 1
    assert not any(n.name.startswith("constant") for n in found.graph.nodes)


def test_a_number_from_nowhere_is_a_constant_that_fixes_what_it_meets() -> None:
    scale = torch.ones(16)
    graph = channel_graph(Net(lambda m, x: m.head(m.left(m.stem(x) * scale * x.sum().item()))).eval(), (X,))
    assert "fixed size" in graph.pinned["stem.weight", 0]


def test_operations_know_their_modules_and_inputs_their_names() -> None:
    found = one(norm=nn.LayerNorm(16), run=lambda m, x: m.head(m.left(m.more["norm"](m.stem(x)))))
    (norm,) = [n for n in found.graph.nodes if "layer_norm" in str(n.target)]
    assert list(norm.meta["nn_module_stack"].values()) == [("", Net), ("more.norm", nn.LayerNorm)]
    assert set(found.inputs.values()) == {"inputs[0]"}
    assert tuple(norm.meta["val"].shape) == (3, 16)
    assert not found.reads_values


def test_the_model_stays_as_it_was() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Any:
            self.last = x * 2
            self.more["norm"].running_mean.add_(1)
            return super().forward(x)

    net = Keeps(two_ways, norm=nn.BatchNorm1d(4)).train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    recorded(net, (X,), training=True)
    assert not hasattr(net, "last") and net.training and not net._forward_hooks
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    net.more["norm"](net.stem(X)[:, :4]).sum().backward()  # nothing of the record is left in the way of a training
    assert net.stem.weight.grad is not None


def test_equal_ways_stand_once_and_values_that_are_not_allowed_are_left_out() -> None:
    def picky(m: Any, x: Tensor) -> Tensor:
        if (x == 0).all():
            raise ValueError("zeros")
        return two_ways(m, x)

    assert len(recorded(Net(picky).eval(), (X,))) == 2
    assert len(recorded(Net(lambda m, x: m.head(m.left(m.stem(x)))).eval(), (X,))) == 1
    with pytest.raises(ValueError, match="zeros"):
        recorded(Net(picky).eval(), (X * 0,))


def test_variations_keep_shapes_and_ranges() -> None:
    tokens = torch.tensor([[1, 2, 5]])
    found = list(variations((X, [tokens], "text", 3)))
    assert [x.shape for x, *_ in found] == [X.shape] * 4
    assert [y[0].tolist() for _, y, *_ in found] == [[[1, 2, 5]], [[5, 2, 1]], [[1, 1, 1]], [[5, 5, 5]]]
    assert torch.equal(found[1][0], -X) and not found[2][0].any() and found[3][0].abs().max() > 20
    assert [rest for _, _, *rest in found] == [["text", 3]] * 4


def test_a_head_of_training_with_a_branch_is_recorded() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.stem(x).relu()
            if not self.training:
                return self.head(self.left(y))
            return self.head(self.left(y)), self.right(y if x.sum() > 0 else -y)

    net = Auxiliary(two_ways).eval()
    programs = exported(net, (X,))
    assert [bool(one.refused) for one in programs] == [False, True]
    assert unmet(programs) == {}
    removal = Pruner(net, 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert removal.removed == {"stem.weight": (16, 8), "left.weight": (8, 4)}
    assert [tuple(y.shape) for y in net.train()(X)] == [(3, 2), (3, 8)]
