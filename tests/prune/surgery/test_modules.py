from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from fasterai.prune.surgery.modules import new_sizes


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in [*module.named_parameters(), *module.named_buffers()]}


def kept(*indices: int) -> dict[tuple[str, int], Any]:
    return {("weight", 0): np.array(indices)}


# Module, the module that has the shapes after, indices that stay, the attributes by hand.
CASES = [
    (nn.Conv2d(4, 8, 3), nn.Conv2d(3, 6, 3), kept(0, 1, 2, 3, 4, 5), {"in_channels": 3, "out_channels": 6, "groups": 1}),
    (
        nn.Conv1d(8, 8, 3, groups=8),
        nn.Conv1d(2, 2, 3, groups=2),
        kept(1, 5),
        {"in_channels": 2, "out_channels": 2, "groups": 2},
    ),
    (nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(4, 6, 1, groups=1), kept(6, 7, 8, 9, 10, 11), {"in_channels": 4, "groups": 1}),
    (
        nn.Conv2d(8, 12, 1, groups=2),
        nn.Conv2d(8, 4, 1, groups=2),
        kept(0, 1, 6, 7),
        {"in_channels": 8, "out_channels": 4, "groups": 2},
    ),
    (nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(6, 12, 1, groups=2), {}, {"in_channels": 6, "out_channels": 12, "groups": 2}),
    (
        nn.ConvTranspose2d(8, 6, 2),
        nn.ConvTranspose2d(4, 3, 2),
        kept(0, 1, 2, 3),
        {"in_channels": 4, "out_channels": 3, "groups": 1},
    ),
    (
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.ConvTranspose2d(4, 3, 2),
        kept(0, 1, 2, 3),
        {"in_channels": 4, "out_channels": 3, "groups": 1},
    ),
    (
        nn.ConvTranspose3d(8, 6, 2, groups=2),
        nn.ConvTranspose3d(4, 4, 2, groups=2),
        kept(0, 2, 4, 6),
        {"in_channels": 4, "out_channels": 4, "groups": 2},
    ),
    (nn.Linear(4, 8), nn.Linear(2, 3), kept(0, 1, 2), {"in_features": 2, "out_features": 3}),
    (nn.BatchNorm2d(8), nn.BatchNorm2d(3), {}, {"num_features": 3}),
    (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(3, affine=False), {}, {"num_features": 3}),
    (nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(3, affine=True), {}, {"num_features": 3}),
    (nn.GroupNorm(4, 8), nn.GroupNorm(3, 6), kept(0, 1, 2, 3, 6, 7), {"num_channels": 6, "num_groups": 3}),
    (nn.Bilinear(5, 8, 4), nn.Bilinear(3, 8, 2), {}, {"in1_features": 3, "in2_features": 8, "out_features": 2}),
    (nn.GroupNorm(4, 8), nn.GroupNorm(4, 4), kept(0, 2, 4, 6), {"num_channels": 4, "num_groups": 4}),
    (nn.LayerNorm(8), nn.LayerNorm(3), {}, {"normalized_shape": (3,)}),
    (nn.RMSNorm(8), nn.RMSNorm(3), {}, {"normalized_shape": (3,)}),
    (nn.Embedding(5, 8), nn.Embedding(5, 3), {}, {"embedding_dim": 3}),
    (nn.EmbeddingBag(5, 8), nn.EmbeddingBag(5, 3), {}, {"embedding_dim": 3}),
    (nn.PReLU(8), nn.PReLU(3), {}, {"num_parameters": 3}),
    (nn.LSTM(5, 8, 2), nn.LSTM(4, 3, 2), {}, {"input_size": 4, "hidden_size": 3}),
    (nn.GRU(5, 8), nn.GRU(4, 3), {}, {"input_size": 4, "hidden_size": 3}),
    (nn.LSTMCell(5, 8), nn.LSTMCell(4, 3), {}, {"input_size": 4, "hidden_size": 3}),
]


@pytest.mark.parametrize(("module", "after", "keep", "expected"), CASES, ids=lambda v: str(v).split("\n")[0][:60])
def test_the_numbers_that_a_module_keeps_of_itself(
    module: nn.Module, after: nn.Module, keep: Any, expected: dict[str, Any]
) -> None:
    sizes = new_sizes(module, shapes(module), shapes(after), keep)
    assert {name: sizes[name] for name in expected} == expected
    assert {name: getattr(after, name) for name in sizes} == sizes


def test_every_registered_class_has_a_case() -> None:
    registered = set(new_sizes.registry) - {object}
    assert [c.__name__ for c in registered if not any(isinstance(module, c) for module, *_ in CASES)] == []


def test_a_linear_layer_with_its_weight_turned() -> None:
    turned = nn.Module()
    turned.nx, turned.nf = 4, 8
    assert new_sizes(turned, {"weight": (4, 8)}, {"weight": (2, 6)}, {}) == {"nx": 2, "nf": 6}


def test_an_unknown_module_keeps_no_numbers() -> None:
    assert new_sizes(nn.ReLU(), {}, {}, {}) == {}


@pytest.mark.parametrize(("kept_number", "expected"), [(8, {"channels": 3}), (5, {}), (None, {})])
def test_channels_of_a_filter_that_is_a_buffer(kept_number: Any, expected: dict[str, Any]) -> None:
    blur = nn.Module()
    blur.channels = kept_number
    assert new_sizes(blur, {"filt": (8, 8, 3, 3)}, {"filt": (3, 8, 3, 3)}, {}) == expected


def test_channels_that_stay_keep_their_number() -> None:
    blur = nn.Module()
    blur.channels = 8
    assert new_sizes(blur, {"filt": (8, 4), "scale": ()}, {"filt": (8, 3), "scale": ()}, {}) == {}


def test_the_shape_of_a_bias_by_relative_positions() -> None:
    positions = nn.Module()
    positions.bias_shape = (49, 49, 6)
    assert new_sizes(positions, {"table": (169, 6)}, {"table": (169, 4)}, {}) == {"bias_shape": (49, 49, 4)}
