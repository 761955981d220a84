"""Operations that look at the values of tensors, as those of detectors do, and what a recorded run notes of its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasterai.graph.labels import FIXED
from fasterai.graph.rules.trace import Trace, Value, all_fixed, rule, shape_of, unknown_tensor, unmarked, values_in

__all__: list[str] = []


@rule(
    *("item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "nms", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
)
def looked_at(trace: Trace, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """Pin tensors of which the values decide what is made, in number or size."""
    for value in values_in([arguments, keywords]):
        trace.labels.pin_all(value.dims, f"{node.name} looks at its values")
    made = node.meta["val"]
    if isinstance(made, list | tuple):
        return [Value(tuple(x.shape), all_fixed(x.shape)) for x in made]
    return Value(shape_of(node), all_fixed(made.shape)) if hasattr(made, "shape") else made


@rule("leaving")
def leaving(trace: Trace, node: Any, x: Value) -> None:
    """Pin a tensor whose values Python has taken over, as by `tolist`."""
    trace.labels.pin_all(x.dims, "its values leave torch's operations, as by tolist or numpy")


@rule("seen")
def seen(trace: Trace, node: Any, result: Any) -> None:
    """Skip the note that code has seen a number or a size; the operation that made it has pinned what it read."""


@rule("roi_align", "roi_pool")
def regions(trace: Trace, node: Any, x: Value, boxes: Value, *sizes: Any) -> Any:
    """Carry channels along, (N, C, H, W) to (boxes, C, h, w); which boxes there are, and their numbers, stays."""
    trace.labels.pin_all(boxes.dims, f"{node.name} uses its values as places")
    trace.labels.pin_all([x.dims[0], *x.dims[2:]], f"{node.name} computes across it")
    made = node.meta["val"]
    several = made if isinstance(made, list | tuple) else [made]
    values = [Value(tuple(one.shape), (FIXED, x.dims[1], FIXED, FIXED)) for one in several]
    # The second result of a pool is where its maxima are: no channel of it is zero.
    return [values[0], *map(unmarked, values[1:])] if isinstance(made, list | tuple) else values[0]


@rule("deform_conv2d")
def deformable(
    trace: Trace, node: Any, x: Value, weight: Value, offset: Value, mask: Value, bias: Value, *numbers: Any
) -> Value:
    """Follow a convolution at places that others give: its channels are a convolution's; the places and their factors stay."""
    groups: Sequence[int] = numbers[6:8]  # behind strides, paddings and dilations: of channels, and of places
    if tuple(groups) != (1, 1):
        return unknown_tensor(trace, node, x, weight, offset, mask, bias)
    labels = trace.labels
    for given in (offset, mask):
        labels.pin_all(given.dims, f"{node.name} uses its values as places")
    labels.pin_all([x.dims[0], *x.dims[2:], *weight.dims[2:]], f"{node.name} has a fixed kernel size")
    labels.join(x.dims[1], weight.dims[1], f"{node.name} reads a dimension of fixed size")
    trace.reads(weight, 1)
    made = labels.join(weight.dims[0], bias.dims[0], f"{node.name} adds a dimension of fixed size")
    return Value(shape_of(node), (FIXED, made, FIXED, FIXED))
