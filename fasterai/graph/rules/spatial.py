"""Operations over the positions of a picture: pooling, interpolation, padding, shuffles of pixels and channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, zeroed
from fasterai.graph.rules.trace import Trace, Value, all_fixed, argument_of, rule, shape_of, shapes_of, unmarked

__all__: list[str] = []


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("_upsample_nearest_exact2d", "max_pool2d_with_indices", "reflection_pad2d", "replication_pad2d", "reflection_pad1d"),
)
def spatial(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    kept = len(x.shape) - int(next(c for c in str(node.target) if c in "123"))
    trace.labels.pin_all(x.dims[kept:], f"{node.name} computes across it")
    has_several = isinstance(node.meta["val"], list | tuple)
    shapes = shapes_of(node) if has_several else [shape_of(node)]
    results = [Value(shape, (*x.dims[:kept], *all_fixed(shape[kept:]))) for shape in shapes]
    return [unmarked(x) for x in results] if has_several else results[0]


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(trace: Trace, node: Any, x: Value, grid: Value, *rest: Any, **keywords: Any) -> Value:
    """Carry channels along; the places where they are looked up stay."""
    trace.labels.pin_all([*x.dims[2:], *grid.dims[1:]], f"{node.name} computes across it")
    batch = trace.labels.join(x.dims[0], grid.dims[0], f"{node.name} meets a dimension of fixed size")
    shape = shape_of(node)
    return Value(shape, (batch, x.dims[1], *all_fixed(shape[2:])))


@rule("pad", "constant_pad_nd")
def pad(trace: Trace, node: Any, x: Value, padding: Sequence[int], *rest: Any, **keywords: Any) -> Value:
    """Keep the labels of what is padded; what is put next to them stays."""
    dims = list(x.dims)
    given = (padding, *rest)
    is_constant = argument_of(node, "mode", given, keywords) in (None, "constant")
    for i, (low, high) in enumerate(zip(padding[::2], padding[1::2], strict=True), 1):
        dim = dims[-i]
        if (low, high) == (0, 0):
            continue
        dims[-i] = FIXED
        if is_constant and isinstance(dim, np.ndarray) and low >= 0 and high >= 0:
            sides = [zeroed(trace.labels.new(n)) for n in (low, high)]
            trace.labels.pin_all(sides, f"{node.name} pads it")
            dims[-i] = np.concatenate([sides[0], dim, sides[1]])
        else:
            trace.labels.pin(dim, f"{node.name} pads it")
    made = Value(shape_of(node), tuple(dims))
    return made if not argument_of(node, "value", given, keywords) else unmarked(made)


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, node: Any, x: Value, factor: int) -> Value:
    shape, channel = shape_of(node), x.dims[-3]
    trace.labels.pin_all(x.dims[-2:], f"{node.name} computes across it")
    if isinstance(channel, np.ndarray):
        channel = trace.labels.unify(channel.reshape(-1, factor * factor))
    return Value(shape, (*x.dims[:-3], channel, FIXED, FIXED))


@rule("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, node: Any, x: Value, factor: int) -> Value:
    shape, channel = shape_of(node), x.dims[-3]
    trace.labels.pin_all(x.dims[-2:], f"{node.name} computes across it")
    if isinstance(channel, np.ndarray):
        channel = np.repeat(channel, factor * factor)
    return Value(shape, (*x.dims[:-3], channel, FIXED, FIXED))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, node: Any, x: Value, groups: int) -> Value:
    channel = x.dims[-3]
    if isinstance(channel, np.ndarray):
        channel = np.repeat(trace.labels.unify(channel.reshape(groups, -1).T), groups)
    return Value(x.shape, (*x.dims[:-3], channel, *x.dims[-2:]))


@rule("im2col")
def im2col(trace: Trace, node: Any, x: Value, *sizes: Any, **keywords: Any) -> Value:
    """Follow patches, `(N, C k k, L)`: the entries of a kernel stand side by side in each channel."""
    shape, channel = shape_of(node), x.dims[-3]
    trace.labels.pin_all(x.dims[-2:], f"{node.name} computes across it")
    if isinstance(channel, np.ndarray):
        channel = np.repeat(channel, shape[-2] // x.shape[-3])
    return Value(shape, (*x.dims[:-3], channel, FIXED))


@rule("col2im")
def col2im(trace: Trace, node: Any, x: Value, *sizes: Any, **keywords: Any) -> Value:
    """Follow patches `(N, C k k, L)` that are added up to a picture: those of a channel go together."""
    shape, channel = shape_of(node), x.dims[-2]
    trace.labels.pin(x.dims[-1], f"{node.name} computes across it")
    if isinstance(channel, np.ndarray):
        channel = trace.labels.unify(channel.reshape(shape[-3], -1))
    return Value(shape, (*x.dims[:-2], channel, FIXED, FIXED))
