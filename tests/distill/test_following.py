"""Which channels of a feature are left after a cut, told from autograd's graph; adapters that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.distill.following import Following, channel_dim, cut_adapter_, find_kept, joined_cuts, renew_adapter_
from fasterai.distill.losses.adapters import Projections


def cut_(model: nn.Module, **kept: list[int]) -> dict[tuple[str, int], np.ndarray]:
    """Cut parameters, named with `__` for dots and the dimension behind it, and return the cut."""
    cut = {}
    for name, indices in kept.items():
        *path, attribute, d = name.split("__")
        module = model.get_submodule(".".join(path))
        p = getattr(module, attribute)
        p.data = p.data.index_select(int(d), torch.tensor(indices))
        cut[".".join([*path, attribute]), int(d)] = np.array(indices)
    return cut


def following(model: nn.Module, feature: Tensor) -> Following:
    return Following().seen(model, [feature], [])


class Block(nn.Module):
    """A residual block behind a ReLU: no parameter's rows are the feature's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return (self.norm(self.conv(y)) + y).relu()


class Joined(nn.Module):
    """Two branches of other widths, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, x: Tensor, **kept: list[int]):
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
    state = following(model, model(x))
    cut = cut_(model, **kept)
    news = Following(state.features, (), (), state.parameters, (cut,)).news(model, [model(x)])
    return {i: (dim, None if rows is None else rows.tolist()) for i, (dim, rows) in news.items()}


def test_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    assert found(model, X, **{"0__weight__0": [1, 2, 4], "0__bias__0": [1, 2, 4]}) == {0: (1, [1, 2, 4])}
    assert found(nn.Sequential(nn.Conv2d(3, 5, 1)), X) == {}


def test_a_transposed_convolution_without_a_bias_has_its_outputs_in_the_second_dimension():
    assert found(nn.Sequential(nn.ConvTranspose2d(3, 5, 1, bias=False)), X, **{"0__weight__1": [0, 4]}) == {0: (1, [0, 4])}


def test_a_residual_block_with_dead_channels():
    model, kept = Block(), [0, 2, 3]
    names = ("stem__weight__0", "stem__bias__0", "conv__weight__0", "conv__bias__0", "norm__weight__0", "norm__bias__0")
    model.norm.running_mean, model.norm.running_var = torch.zeros(3), torch.ones(3)
    model.norm.track_running_stats, model.norm.running_mean, model.norm.running_var = False, None, None

    torch.manual_seed(0)
    state = following(model, model(X))
    cut = cut_(model, **dict.fromkeys(names, kept))
    model.conv.weight.data = model.conv.weight.data[:, kept]
    with torch.no_grad():
        model.norm.bias[1] = -100.0  # this channel is never above zero
    feature = model(X)
    assert float(feature.detach()[:, 1].abs().max()) == 0
    news = Following(state.features, (), (), state.parameters, ({**cut, ("conv.weight", 1): np.array(kept)},)).news(
        model, [feature]
    )
    assert news[0][0] == 1 and news[0][1].tolist() == kept


def test_branches_that_are_joined():
    kept = {"a__weight__0": [1, 3], "a__bias__0": [1, 3]}
    assert found(Joined(), X, **kept) == {0: (1, [1, 3, 4, 5, 6, 7, 8, 9])}
    kept |= {"b__weight__0": [0, 5], "b__bias__0": [0, 5]}
    assert found(Joined(), X, **kept) == {0: (1, [1, 3, 4, 9])}


def test_tokens():
    kept = {"0__weight__0": [2, 0], "0__bias__0": [2, 0]}
    assert found(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 7, 3), **kept) == {0: (2, [2, 0])}


def test_where_it_cannot_be_told():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 6)

        def forward(self, x):
            y = self.layer(x)
            return y.cumsum(1)

    kept = {"layer__weight__0": [0, 1, 2], "layer__bias__0": [0, 1, 2]}
    assert found(Mixed(), torch.randn(4, 3), **kept) == {0: (1, None)}


def test_several_cuts_count_from_before_the_first():
    cuts = [{("w", 0): np.array([0, 2, 3, 5])}, {("w", 0): np.array([1, 3]), ("v", 1): np.array([0])}]
    assert {place: kept.tolist() for place, kept in joined_cuts(cuts).items()} == {("w", 0): [2, 5], ("v", 1): [0]}


@pytest.mark.parametrize(
    ("before", "after", "dim"),
    [
        ((8, 16, 4, 4), (8, 12, 4, 4), 1),
        ((8, 16, 4, 4), (3, 16, 4, 4), None),
        ((8, 7, 16), (8, 5, 12), 2),  # the number of tokens differs too
        ((8, 16, 9), (8, 12, 9), 1),  # (B, C, L)
        ((8, 16), (8, 20), None),
        ((8, 16), (8, 4, 4), None),
    ],
)
def test_the_dimension_of_the_channels(before, after, dim):
    assert channel_dim(before, after) == dim


def adapted() -> tuple[Projections, torch.optim.Adam]:
    torch.manual_seed(0)
    adapter = Projections([torch.zeros(2, 5, 3, 3)], [torch.zeros(2, 7, 3, 3)])
    optimizer = torch.optim.Adam(adapter.parameters(), 0.1)
    loss = adapter(0, torch.randn(2, 5, 3, 3), torch.zeros(2, 7, 3, 3))[0].square().sum()
    loss.backward()
    optimizer.step()
    adapter.held = loss  # as a loop holds the loss of the step before
    return adapter, optimizer


def test_an_adapter_and_its_state_follow_and_train_on():
    adapter, optimizer = adapted()
    (weight, bias) = adapter.parameters()
    before, state, kept = weight.detach().clone(), {n: x.clone() for n, x in optimizer.state[weight].items()}, [0, 3, 4]
    cut_adapter_(adapter, 0, np.array(kept), optimizer)
    assert torch.equal(weight, before[:, kept]) and tuple(bias.shape) == (7,)
    assert all(torch.equal(optimizer.state[weight][n], state[n][:, kept]) for n in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(optimizer.state[weight]["step"], state["step"])
    optimizer.zero_grad()
    adapter(0, torch.randn(2, 3, 3, 3), torch.zeros(2, 7, 3, 3))[0].square().sum().backward()
    optimizer.step()


def test_an_adapter_begins_afresh():
    adapter, optimizer = adapted()
    weight = next(adapter.parameters())
    renew_adapter_(adapter, Projections([torch.zeros(2, 3, 3, 3)], [torch.zeros(2, 7, 3, 3)]), optimizer)
    assert weight is next(adapter.parameters()) and tuple(weight.shape) == (7, 3, 1, 1) and optimizer.state[weight] == {}
    adapter(0, torch.randn(2, 3, 3, 3), torch.zeros(2, 7, 3, 3))[0].square().sum().backward()
    optimizer.step()


def test_an_adapter_begins_afresh_with_its_statistics():
    adapter, other = adapted()[0], adapted()[0]
    for one, size in ((adapter, 5), (other, 3)):
        one.register_buffer("mean", torch.ones(size))
    renew_adapter_(adapter, other, torch.optim.SGD(adapter.parameters(), 0.1))
    assert torch.equal(adapter.mean, torch.ones(3))


def test_its_state_is_plain_and_comes_back():
    state = Following(((2, 3),), ((2, 4),), (((2, 5),), ((2, 4),)), {"w": (3, 1)}, ({("w", 0): np.array([0, 2])},))
    again = Following.of_state(state.state_dict())
    assert (
        again.features == state.features
        and again.others == state.others
        and again.first == state.first
        and again.parameters == {"w": (3, 1)}
    )
    assert again.cuts[0]["w", 0].tolist() == [0, 2]


def test_find_kept_asks_only_for_what_is_there():
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    shapes = {"0.weight": (5, 3, 1, 1), "0.bias": (5,)}
    assert find_kept(model(X)[:, :3], 1, 5, model, shapes, []) is None  # a slice of a layer's outputs
