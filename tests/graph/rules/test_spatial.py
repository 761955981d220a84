from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graph.rules.cases import (
    Case,
    aten,
    both,
    convs,
    goes_as_it_says,
    linears,
    on_images,
    over_channels,
    stands_in_the_program,
)


def sampled(op: str, x: Tensor, dims: int) -> Tensor:
    grid = torch.zeros(len(x), *(4, 4, 2)[:dims], dims, dtype=x.dtype)
    return getattr(torch.ops.aten, op)(x, grid, 0, 0, False)


CASES = [
    *(on_images(f"max_pool{d}d", lambda x, d=d: getattr(F, f"max_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(on_images(f"avg_pool{d}d", lambda x, d=d: getattr(F, f"avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(on_images(f"adaptive_avg_pool{d}d", lambda x, d=d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)),
    *(
        on_images(f"adaptive_max_pool{d}d", lambda x, d=d: getattr(aten, f"adaptive_max_pool{d}d")(x, [2] * d)[0], d)
        for d in (1, 2, 3)
    ),
    on_images("max_pool2d_with_indices", lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0]),
    *(on_images(f"upsample_nearest{d}d", lambda x: F.interpolate(x, scale_factor=2), d) for d in (1, 2, 3)),
    on_images("_upsample_nearest_exact2d", lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    on_images("upsample_linear1d", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), 1),
    on_images("upsample_bilinear2d", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    on_images("upsample_bicubic2d", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    *(on_images(op, lambda x, op=op: sampled(op, x, 2), 2) for op in ("grid_sampler", "grid_sampler_2d")),
    on_images("grid_sampler_3d", lambda x: sampled("grid_sampler_3d", x, 3), 3),
    on_images("upsample_trilinear3d", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), 3),
    on_images("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, (4, 4), mode="bilinear", antialias=True)),
    on_images("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, (4, 4), mode="bicubic", antialias=True)),
    on_images("reflection_pad1d", lambda x: aten.reflection_pad1d(x, [1, 1]), 1),
    on_images("reflection_pad2d", lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1])),
    on_images("replication_pad2d", lambda x: aten.replication_pad2d(x, [1, 1, 1, 1])),
    on_images("pad", lambda x: F.pad(x, (1, 1, 2, 2))),
    on_images("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 1], 0.0)),
    on_images("channel_shuffle", lambda x: aten.channel_shuffle(x, 1)),
    over_channels("avg_pool1d", lambda x: F.avg_pool1d(x.unsqueeze(1), 2).squeeze(1), 4),
    over_channels("max_pool1d", lambda x: F.max_pool1d(x.unsqueeze(1), 2).squeeze(1), 4),
    over_channels("upsample_nearest1d", lambda x: F.interpolate(x.unsqueeze(1), scale_factor=0.5).squeeze(1), 4),
    Case(("pad",), lambda m, x: m.b(F.pad(m.a(x), (2, 1))), linears(back=11), (4, 6), both, {}, "pad beside channels"),
    over_channels("pad", lambda x: F.pad(x, (-1, 1)), 8),
    *(
        Case(
            (op,),
            lambda m, x, op=op: m.b(getattr(aten, op)(m.a(x), 2)),
            convs(),
            (2, 3, 4, 4),
            {("a.weight", 0): 4, ("b.weight", 1): 4},
        )
        for op in ("channel_shuffle", "native_channel_shuffle")
    ),
    Case(
        ("im2col",),
        lambda m, x: m.b(F.unfold(m.a(x), 2).unflatten(-1, (3, 3))),
        convs(back=32),
        (2, 3, 4, 4),
        {("a.weight", 0): 8, ("b.weight", 1): 8},
    ),
    Case(
        ("im2col", "col2im"),
        lambda m, x: m.b(F.fold(F.unfold(m.a(x), 2, stride=2).exp(), (4, 4), 2, stride=2)),
        convs(),
        (2, 3, 4, 4),
        {("a.weight", 0): 8, ("b.weight", 1): 8},
    ),
    Case(
        ("pixel_shuffle",),
        lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)),
        convs(back=2),
        (2, 3, 4, 4),
        {("a.weight", 0): 2, ("b.weight", 1): 2},
    ),
    Case(
        ("pixel_unshuffle",),
        lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)),
        convs(back=32),
        (2, 3, 4, 4),
        {("a.weight", 0): 8, ("b.weight", 1): 8},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_is_not_missed_and_what_stays_says_why(case: Case) -> None:
    goes_as_it_says(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.ops], ids=str)
def test_the_operation_stands_in_the_program(case: Case) -> None:
    stands_in_the_program(case)
