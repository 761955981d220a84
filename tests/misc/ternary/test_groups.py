"""Groups run along the inputs of each output and kernel position, whatever the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.core.types import Layout
from fasterai.misc.ternary.groups import check_group, divide
from fasterai.model.layouts import read_module

LAYERS = {
    "linear": lambda: nn.Linear(10, 3),
    "conv1d": lambda: nn.Conv1d(10, 3, 2),
    "conv2d": lambda: nn.Conv2d(10, 3, (2, 3)),
    "conv3d": lambda: nn.Conv3d(10, 3, 2),
    "grouped": lambda: nn.Conv2d(20, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(10, 3, 2),
    "transposed, grouped": lambda: nn.ConvTranspose1d(20, 6, 2, groups=2),
    "recurrent": lambda: nn.LSTMCell(10, 3),
}


def first_weight(layer: nn.Module) -> tuple[torch.Tensor, Layout]:
    layouts = read_module(layer).layouts
    name = "weight" if "weight" in layouts else "weight_ih"
    return getattr(layer, name).detach(), layouts[name]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group", [1, 4, 5, 64])
def test_a_group_holds_neighbouring_inputs_of_one_output_and_position(name, group):
    """Each weight is replaced by its input's number, and by all its other indices in one."""
    weight, layout = first_weight(LAYERS[name]())
    division = divide(layout, group)
    place = max(d for d, axes in enumerate(layout.axes) if axes == {"in"})
    grid = torch.meshgrid(*map(torch.arange, layout.shape), indexing="ij")
    inputs = grid[place].reshape(weight.shape).float() + 1
    others = sum(g * 100**i for i, g in enumerate(grid) if g is not grid[place]).reshape(weight.shape).float() + 1
    split, elsewhere = division.split(inputs), division.split(others)
    n = min(group, layout.shape[place])
    assert split.shape == (division.rows, -(-layout.shape[place] // n), n, division.columns)
    for g, o in zip(split.movedim(2, -1).reshape(-1, n), elsewhere.movedim(2, -1).reshape(-1, n), strict=True):
        real = g[g > 0]
        assert (real - 1).tolist() == list(range(int(real[0]) - 1, int(real[0]) - 1 + len(real)))
        assert (int(real[0]) - 1) % n == 0 and len(set(o[o > 0].tolist())) == 1
    assert division.groups == split.shape[0] * split.shape[1] * split.shape[3]
    assert torch.equal(division.join(split, inputs.shape), inputs)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group", ["filter", "tensor"])
def test_wide_groups_hold_an_output_or_all(name, group):
    weight, layout = first_weight(LAYERS[name]())
    division = divide(layout, group)
    outputs = torch.meshgrid(*map(torch.arange, layout.shape), indexing="ij")
    own = sum(g * 100**i for i, (g, axes) in enumerate(zip(outputs, layout.axes, strict=True)) if "out" in axes)
    split = division.split(own.reshape(weight.shape).float() + 1)
    assert division.groups == (layout.size("out") if group == "filter" else 1)
    assert (split.numel(), (split == 0).sum()) == (weight.numel(), 0)
    if group == "filter":
        assert all(len(set(row.flatten().tolist())) == 1 for row in split)
    assert torch.equal(division.join(division.split(weight), weight.shape), weight)


def test_counts_leave_out_what_fills_the_last_group():
    layout = Layout((2, 10), (frozenset({"out"}), frozenset({"in"})))
    assert divide(layout, 4).counts(torch.zeros(1)).flatten().tolist() == [4, 4, 2]
    assert divide(layout, 64).counts(torch.zeros(1)).flatten().tolist() == [10]


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (0, ValueError, "group must be at least 1, got 0"),
        (-4, ValueError, "group must be at least 1, got -4"),
        (2.5, TypeError, "group must be a whole number of at least 1, got 2.5"),
        (True, TypeError, "group must be a whole number"),
        ("row", ValueError, "group must be a whole number of at least 1, or one of filter, tensor, got 'row'"),
        (None, TypeError, "group must be a whole number of at least 1, got None"),
    ],
)
def test_other_groups_are_refused(group, error, message):
    with pytest.raises(error, match=message):
        check_group(group)
