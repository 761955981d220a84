from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.core import granularities
from fasterai.core.checks import from_catalogue
from fasterai.core.granularities import Block, Coupled, Keep, allowed
from fasterai.core.types import Layout
from fasterai.model.layouts import by_dimensions, read_module

# The units of Conv2d(4, 8, 3), whose weight is (8, 4, 3, 3): name -> shape of the scores.
CASES = {
    "weight": (8, 4, 3, 3),
    "shared_weight": (1, 4, 3, 3),
    "channel": (8, 1, 3, 3),
    "column": (8, 4, 1, 3),
    "row": (8, 4, 3, 1),
    "kernel": (8, 4, 1, 1),
    "filter": (8, 1, 1, 1),
    "shared_channel": (1, 1, 3, 3),
    "shared_column": (1, 4, 1, 3),
    "shared_row": (1, 4, 3, 1),
    "vertical_slice": (8, 1, 1, 3),
    "horizontal_slice": (8, 1, 3, 1),
    "shared_vertical_slice": (1, 1, 1, 3),
    "shared_horizontal_slice": (1, 1, 3, 1),
    "shared_kernel": (1, 4, 1, 1),
    "layer": (1, 1, 1, 1),
    "coupled": (8, 1, 1, 1),  # on a layer seen by itself: its outputs
}
MATRIX = {"weight": (8, 4), "row": (8, 1), "column": (1, 4), "layer": (1, 1), "coupled": (8, 1)}  # Linear(4, 8): (out, in)


def layout_of(module: nn.Module, name: str = "weight") -> Layout:
    reading = read_module(module)
    assert reading is not None
    return reading.layouts[name]


def named(name: str):
    return getattr(granularities, name)


def exchanged(shape):
    return (shape[1], shape[0], *shape[2:])


def test_every_entry_has_a_case():
    assert set(CASES) == set(granularities.__all__)
    assert len(CASES) == 17


@pytest.mark.parametrize("name", CASES)
def test_units_of_conv2d(name):
    layout = layout_of(nn.Conv2d(4, 8, 3))
    assert layout.shape == (8, 4, 3, 3)
    assert named(name).unit_shape(layout) == CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_units_of_conv_transpose2d_have_in_and_out_exchanged(name):
    layout = layout_of(nn.ConvTranspose2d(4, 8, 3))
    assert layout.shape == (4, 8, 3, 3)
    assert named(name).unit_shape(layout) == exchanged(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_height_and_width_are_not_mixed_up(name):
    layout = layout_of(nn.Conv2d(4, 8, (5, 3)))
    wanted = tuple(5 if dim == 2 and n == 3 else n for dim, n in enumerate(CASES[name]))
    assert named(name).unit_shape(layout) == wanted


@pytest.mark.parametrize("name", CASES)
def test_units_of_conv1d_are_those_of_conv2d_less_the_height(name):
    shape = CASES[name]
    assert named(name).unit_shape(layout_of(nn.Conv1d(4, 8, 3))) == (*shape[:2], shape[3])
    assert named(name).unit_shape(layout_of(nn.ConvTranspose1d(4, 8, 3))) == (*exchanged(shape[:2]), shape[3])


@pytest.mark.parametrize("name", CASES)
def test_units_of_conv3d_keep_the_depth_with_the_other_kernel_axes(name):
    shape = CASES[name]
    depth = 2 if shape[2] > 1 or shape[3] > 1 else 1
    wanted = (*shape[:2], depth, *shape[2:])
    assert named(name).unit_shape(layout_of(nn.Conv3d(4, 8, (2, 3, 3)))) == wanted
    assert named(name).unit_shape(layout_of(nn.ConvTranspose3d(4, 8, (2, 3, 3)))) == exchanged(wanted)


@pytest.mark.parametrize("name", CASES)
def test_units_of_a_grouped_conv(name):
    """A group's index goes with the outputs and with the inputs: 2 groups of 4 outputs that read 3 inputs each."""
    layout = layout_of(nn.Conv2d(6, 8, 3, groups=2))
    assert layout.shape == (2, 4, 3, 3, 3)
    out, inn, *kernel = CASES[name]
    groups = 2 if out > 1 or inn > 1 else 1
    wanted = (groups, 4 if out > 1 else 1, 3 if inn > 1 else 1, *kernel)
    assert named(name).unit_shape(layout) == wanted
    transposed = layout_of(nn.ConvTranspose2d(6, 8, 3, groups=2))
    assert transposed.shape == (2, 3, 4, 3, 3)
    assert named(name).unit_shape(transposed) == (wanted[0], wanted[2], wanted[1], *wanted[3:])


def test_units_of_a_depthwise_conv():
    layout = layout_of(nn.Conv2d(6, 6, 3, groups=6))
    assert layout.shape == (6, 1, 1, 3, 3)
    assert granularities.filter.unit_shape(layout) == (6, 1, 1, 1, 1)
    assert granularities.kernel.unit_shape(layout) == (6, 1, 1, 1, 1)
    assert granularities.shared_channel.unit_shape(layout) == (1, 1, 1, 3, 3)


@pytest.mark.parametrize("name", MATRIX)
def test_units_of_matrices(name):
    assert named(name).unit_shape(layout_of(nn.Linear(4, 8))) == MATRIX[name]
    # An embedding holds (in, out): its rows are the indices that it reads, its columns what they become.
    assert named(name).unit_shape(layout_of(nn.Embedding(8, 4))) == exchanged(
        {"weight": (4, 8), "row": (4, 1), "column": (1, 8), "layer": (1, 1), "coupled": (4, 1)}[name]
    )


@pytest.mark.parametrize(
    ("module", "parameter", "shape"),
    [
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 1)),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "k_proj_weight", (4, 1)),
        (nn.LSTM(3, 5), "weight_ih_l0", (20, 1)),
        (nn.GRU(3, 5, bidirectional=True), "weight_hh_l0_reverse", (15, 1)),
    ],
)
def test_rows_of_attention_and_recurrent_weights_are_their_outputs(module, parameter, shape):
    assert granularities.row.unit_shape(layout_of(module, parameter)) == shape


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (2, 8, 4)), ("row", (2, 8, 1)), ("column", (2, 1, 4)), ("layer", (1, 1, 1))]
)
def test_units_of_experts_stay_apart_by_expert(name, shape):
    assert named(name).unit_shape(by_dimensions((2, 8, 4))) == shape


@pytest.mark.parametrize("name", CASES)
def test_matrices_have_four_of_the_sixteen(name):
    for module in (nn.Linear(4, 8), nn.Embedding(8, 4)):
        assert named(name).fits(layout_of(module)) == (name in MATRIX)
    assert named(name).fits(layout_of(nn.Conv1d(4, 8, 3)))


def test_allowed_lists_what_fits():
    assert allowed(layout_of(nn.Linear(4, 8))) == ["column", "layer", "row", "weight"]
    assert sorted(allowed(layout_of(nn.Conv3d(4, 8, 3)))) == sorted(set(CASES) - {"coupled"})
    assert allowed(by_dimensions((8,))) == ["layer", "row", "weight"]  # outputs alone: no columns


# --- keep ---


def test_keep_drops_outputs_of_any_layer():
    keep = Keep("out")
    assert keep.unit_shape(layout_of(nn.Conv2d(4, 8, 3))) == (8, 1, 1, 1)
    assert keep.unit_shape(layout_of(nn.ConvTranspose2d(4, 8, 3))) == (1, 8, 1, 1)
    assert keep.unit_shape(layout_of(nn.Linear(4, 8))) == (8, 1)
    assert keep.unit_shape(by_dimensions((2, 8, 4))) == (1, 8, 1)
    assert Keep("expert").unit_shape(by_dimensions((2, 8, 4))) == (2, 1, 1)
    assert granularities.layer.unit_shape(layout_of(nn.Linear(4, 8))) == (1, 1)


def test_keep_without_axes_is_refused_since_it_would_remove_whole_layers():
    with pytest.raises(ValueError, match=r"axes must be at least one of expert, out, .*got none; granularity='layer'"):
        Keep()


def test_keep_fits_where_its_axes_are():
    assert not Keep("out", "width").fits(layout_of(nn.Linear(4, 8)))
    assert Keep("out", "width").fits(layout_of(nn.Conv1d(4, 8, 3)))
    assert not Keep("height").fits(layout_of(nn.Conv1d(4, 8, 3)))


def test_keep_is_a_value():
    assert Keep("out", "in") == Keep("in", "out")
    assert hash(Keep("out", "in")) == hash(Keep("in", "out"))
    assert repr(Keep("in", "out")) == "Keep('out', 'in')"
    with pytest.raises(ValueError, match="axes must be of expert, out, in, depth, height, width, got 'rows'"):
        Keep("out", "rows")


# --- blocks ---


@pytest.mark.parametrize(
    ("block", "layout", "shape"),
    [
        (Block(2, 2), by_dimensions((8, 4)), (4, 2)),
        (Block(3, 3), by_dimensions((8, 4)), (3, 2)),  # 3 + 3 + 2 outputs, 3 + 1 inputs
        (Block(16, 1), by_dimensions((8, 4)), (1, 4)),
        (Block(4, 2), layout_of(nn.Conv2d(4, 8, 3)), (2, 2, 3, 3)),
        (Block(4, 2), layout_of(nn.ConvTranspose2d(4, 8, 3)), (2, 2, 3, 3)),
        (Block(3, 4), layout_of(nn.ConvTranspose2d(4, 8, 3)), (1, 3, 3, 3)),
        (Block(3, 2), layout_of(nn.Conv2d(6, 8, 1, groups=2)), (2, 2, 2, 1, 1)),  # blocks do not cross groups
        (Block(4, 4), by_dimensions((2, 8, 4)), (2, 2, 1)),
    ],
)
def test_units_of_blocks(block, layout, shape):
    assert block.unit_shape(layout) == shape


def test_blocks_by_hand_with_ragged_edges():
    scores = torch.arange(15.0).reshape(5, 3)  # 0 1 2 / 3 4 5 / 6 7 8 / 9 10 11 / 12 13 14
    layout = by_dimensions((5, 3))
    assert Block(2, 2).reduce(scores, layout, "sum").tolist() == [[8.0, 7.0], [32.0, 19.0], [25.0, 14.0]]
    assert Block(2, 2).reduce(scores, layout).tolist() == [[2.0, 3.5], [8.0, 9.5], [12.5, 14.0]]
    keep = torch.tensor([[True, False], [False, True], [False, True]])
    wanted = [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert Block(2, 2).expand(keep, layout).int().tolist() == wanted


@pytest.mark.parametrize(
    ("rows", "columns", "error", "message"),
    [
        (0, 2, ValueError, "rows must be at least 1, got 0"),
        (2, -1, ValueError, "columns must be at least 1, got -1"),
        (2, 2.0, TypeError, "columns must be a whole number of at least 1, got 2.0"),
    ],
)
def test_blocks_check_their_sizes(rows, columns, error, message):
    with pytest.raises(error, match=message):
        Block(rows, columns)


def test_blocks_need_outputs_and_inputs():
    assert not Block(2, 2).fits(by_dimensions((8,)))
    assert Block(2, 2).fits(by_dimensions((8, 4)))


# --- reduce and expand ---


@st.composite
def layouts(draw):
    axes = draw(
        st.sampled_from(
            [
                ("out", "in"),
                ("in", "out"),
                ("expert", "out", "in"),
                ("out", "in", "width"),
                ("out", "in", "height", "width"),
                ("in", "out", "height", "width"),
                ("out", "in", "depth", "height", "width"),
                ("out+in", "out", "in", "height", "width"),
            ]
        )
    )
    shape = tuple(draw(st.integers(1, 4)) for _ in axes)
    return Layout(shape, tuple(frozenset(a.split("+")) for a in axes))


any_granularity = st.one_of(
    st.sampled_from([named(name) for name in CASES]),
    st.builds(Block, st.integers(1, 5), st.integers(1, 5)),
    st.sets(st.sampled_from(["expert", "out", "in", "depth", "height", "width"]), min_size=1).map(lambda axes: Keep(*axes)),
)


def parts(granularity, layout):
    """The oracle: for every weight, in numpy, the index of its unit along each dimension."""
    steps = []
    for names in layout.axes:
        if isinstance(granularity, Block):
            steps.append({("out",): granularity.rows, ("in",): granularity.columns}.get(tuple(names), 1))
        else:
            steps.append(1 if names & granularity.kept(layout) else 10**6)
    return np.indices(layout.shape) // np.array(steps).reshape(-1, *[1] * len(steps))


@settings(max_examples=200, deadline=None)
@given(any_granularity, layouts(), st.randoms(use_true_random=False))
def test_reduce_and_expand_against_numpy(granularity, layout, random):
    if not granularity.fits(layout):
        return
    units = parts(granularity, layout)
    shape = tuple(int(u.max()) + 1 for u in units)
    assert granularity.unit_shape(layout) == shape
    scores = np.array([random.uniform(-1, 1) for _ in range(int(np.prod(layout.shape)))]).reshape(layout.shape)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, tuple(units), scores)
    np.add.at(count, tuple(units), 1)
    given_scores = torch.from_numpy(scores.copy())
    assert np.allclose(granularity.reduce(given_scores, layout, "sum").numpy(), total)
    assert np.allclose(granularity.reduce(given_scores, layout).numpy(), total / count)
    assert (given_scores.numpy() == scores).all()
    keep = np.array([random.random() < 0.5 for _ in range(int(np.prod(shape)))]).reshape(shape)
    mask = granularity.expand(torch.from_numpy(keep), layout)
    assert mask.dtype == torch.bool
    assert (mask.expand(layout.shape).numpy() == keep[tuple(units)]).all()
    # expand is the inverse of reduce
    back = granularity.reduce(mask.expand(layout.shape).double(), layout)
    assert np.allclose(back.numpy(), keep)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reducer", ["mean", "sum"])
def test_reduce_of_conv2d_against_numpy(name, reducer):
    scores = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    dims = tuple(dim for dim, n in enumerate(CASES[name]) if n == 1)
    wanted = getattr(np, reducer)(scores.numpy(), axis=dims, keepdims=True)
    got = named(name).reduce(scores, layout_of(nn.Conv2d(4, 8, 3)), reducer)
    assert np.allclose(got.numpy(), wanted, rtol=1e-12)


def test_reduce_takes_a_grouped_weight_in_its_own_shape():
    conv = nn.Conv2d(4, 6, 1, groups=2)  # weight (6, 2, 1, 1)
    scores = torch.arange(12.0).reshape(6, 2, 1, 1)
    reduced = granularities.filter.reduce(scores, layout_of(conv), "sum")
    assert reduced.flatten().tolist() == [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]
    inputs = granularities.shared_kernel.reduce(scores, layout_of(conv), "sum")
    assert inputs.flatten().tolist() == [0 + 2 + 4, 1 + 3 + 5, 6 + 8 + 10, 7 + 9 + 11]


# --- what a granularity says of itself ---


def silenced(granularity, layout):
    """Whether pruning any one unit leaves some output without a weight, from the masks."""
    shape = granularity.unit_shape(layout)
    others = [dim for dim, names in enumerate(layout.axes) if "out" not in names]
    for i in range(int(np.prod(shape))):
        keep = torch.ones(shape, dtype=torch.bool)
        keep.view(-1)[i] = False
        left = granularity.expand(keep, layout).expand(layout.shape)
        if bool((left.any(dim=others) if others else left).all()):
            return False
    return True


@pytest.mark.parametrize("granularity", [*(named(n) for n in CASES), Block(2, 2), Keep("out"), Keep("in")], ids=repr)
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 8),
        nn.Conv1d(4, 8, 3),
        nn.Conv2d(4, 8, 3),
        nn.Conv3d(4, 8, 2),
        nn.ConvTranspose2d(4, 8, 3),
        nn.Embedding(8, 4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_drops_outputs_and_is_whole_tell_the_truth(granularity, module):
    layout = layout_of(module)
    if granularity.fits(layout):
        assert granularity.drops_outputs(layout) == silenced(granularity, layout)
        assert granularity.is_whole(layout) == (set(granularity.unit_shape(layout)) == {1})


def test_rows_of_a_matrix_are_outputs():
    assert granularities.row.drops_outputs(layout_of(nn.Linear(4, 8)))
    assert not granularities.row.drops_outputs(layout_of(nn.Conv2d(4, 8, 3)))
    assert not granularities.row.drops_outputs(by_dimensions((2, 8, 4)))  # one expert's output is not the layer's


def test_weights_of_a_vector_do_not_count_as_outputs():
    assert not granularities.weight.drops_outputs(by_dimensions((8,)))


@pytest.mark.parametrize("name", CASES)
def test_entries_are_frozen_values_with_their_name(name):
    granularity = named(name)
    assert repr(granularity) == name
    assert from_catalogue("granularity", name, granularities) is granularity
    assert pickle.loads(pickle.dumps(granularity)) == granularity
    assert granularity.is_weight == (name == "weight")
    with pytest.raises(FrozenInstanceError):
        granularity.axes = frozenset()


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        (Coupled(), "coupled"),
        (Coupled("mean"), "Coupled('mean')"),
        (Coupled("max"), "Coupled('max')"),
        (Coupled(relative=False), "Coupled('sum', relative=False)"),
        (Coupled("mean", relative=False), "Coupled('mean', relative=False)"),
        (Keep("width", "out"), "Keep('out', 'width')"),
        (Block(2, 4), "Block(rows=2, columns=4)"),
    ],
)
def test_a_granularity_is_written_as_it_is_made(granularity, text):
    """A saved state says by it which granularity it is of."""
    assert repr(granularity) == text
    assert eval(text, {"coupled": granularities.coupled, "Coupled": Coupled, "Keep": Keep, "Block": Block}) == granularity


def test_entries_differ_from_each_other():
    assert len({named(name) for name in CASES}) == 17


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"granularity must be one of channel, .*, got 'filters'; did you mean 'filter'"):
        from_catalogue("granularity", "filters", granularities)
