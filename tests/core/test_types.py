from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

from fasterai.core.types import EVIDENCE, Evidence, Layout, Limits, Target


def layout(shape, *axes):
    return Layout(shape, tuple(frozenset(a.split("+")) for a in axes))


CONV = layout((8, 4, 3, 5), "out", "in", "height", "width")
GROUPED = layout((2, 4, 3, 1, 1), "out+in", "out", "in", "height", "width")
LINEAR = layout((8, 4), "out", "in")


def test_a_layout_knows_its_axes():
    assert CONV.names == {"out", "in", "height", "width"}
    assert GROUPED.names == {"out", "in", "height", "width"}
    assert LINEAR.names == {"out", "in"}
    assert Layout((), ()).names == frozenset()


@pytest.mark.parametrize(
    ("read", "axis", "size"),
    [
        (CONV, "out", 8),
        (CONV, "width", 5),
        (CONV, "depth", 1),
        (GROUPED, "out", 8),  # 2 groups of 4 outputs
        (GROUPED, "in", 6),  # 2 groups of 3 inputs
        (LINEAR, "expert", 1),
    ],
)
def test_the_size_of_an_axis(read, axis, size):
    assert read.size(axis) == size


def test_only_convolutions_have_a_kernel():
    assert CONV.has_kernel and GROUPED.has_kernel
    assert not LINEAR.has_kernel
    assert not layout((2, 8, 4), "expert", "out", "in").has_kernel
    assert layout((8, 4, 3), "out", "in", "width").has_kernel


def test_a_layouts_size_refuses_another_number_of_axes():
    with pytest.raises(ValueError, match="shorter"):
        Layout((2, 3), (frozenset({"out"}),)).size("out")


def test_a_target_looks_its_parameter_up_anew():
    linear = nn.Linear(4, 8)
    target = Target("head.0.weight", linear, "weight", "linear", LINEAR)
    assert target.parameter is linear.weight
    linear.weight = nn.Parameter(torch.zeros(8, 4))
    assert target.parameter is linear.weight
    assert target.module_name == "head.0"
    assert Target("weight", linear, "weight", "linear", LINEAR).module_name == ""


def test_evidence_names_are_its_fields():
    assert {f.name for f in fields(Evidence)} == {"name", "weight", *EVIDENCE, "layout", "gathered", "masked"}


def test_map_reaches_every_tensor_and_leaves_the_rest():
    given = Evidence("w", torch.tensor([1.0]), **{name: torch.tensor([2.0]) for name in EVIDENCE})
    doubled = given.map(lambda x: 2 * x)
    assert doubled.name == "w"
    assert doubled.weight.item() == 2
    assert [getattr(doubled, name).item() for name in EVIDENCE] == [4.0] * len(EVIDENCE)
    assert given.weight.item() == 1
    assert Evidence("w", torch.ones(1)).map(lambda x: x).gradient is None


def test_map_reaches_what_was_gathered_and_the_mask():
    given = Evidence(
        "w", torch.ones(2), layout=CONV, gathered={"own": torch.tensor([3.0, 4.0])}, masked=lambda: torch.tensor([True, False])
    )
    last = given.map(lambda x: x[1:])
    assert last.gathered["own"].tolist() == [4.0]
    assert last.keep.tolist() == [False]
    assert last.map(lambda x: x[:0]).keep.tolist() == []
    assert last.layout is CONV
    assert given.keep.tolist() == [True, False]


def test_the_mask_is_made_only_when_it_is_asked_for():
    asked = []
    given = Evidence("w", torch.ones(2), masked=lambda: asked.append(1))
    given.at_least_float32().map(lambda x: x[:1])
    assert not asked
    assert given.keep is None
    assert asked
    assert Evidence("w", torch.ones(2)).keep is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    wide = Evidence("w", torch.ones(2, dtype=dtype), gradient=torch.ones(2, dtype=dtype)).at_least_float32()
    assert wide.weight.dtype == wide.gradient.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precision_is_left_alone_and_not_copied(dtype):
    weight = torch.ones(2, dtype=dtype)
    assert Evidence("w", weight).at_least_float32().weight is weight


def test_values_are_frozen():
    for value, name in [(CONV, "shape"), (Limits(), "min_keep"), (Evidence("w", torch.ones(1)), "weight")]:
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)


def test_limits_keep_one_unit_by_default():
    assert Limits() == Limits(min_keep=1, may_fall=True, round_to=None)
