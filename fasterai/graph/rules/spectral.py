"""Complex numbers and Fourier transforms: a transform mixes the dimensions that it runs over, and carries the others along."""

from __future__ import annotations

from typing import Any

from fasterai.graph.labels import FIXED
from fasterai.graph.rules.trace import Trace, Value, argument_of, broadcast, called, rule, settled, shape_of, unmarked

__all__: list[str] = []

KINDS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
#: Transforms over the last dimension, over the last two, and over all, where no dimension is named.
LAST, TWO, ALL = ([f"fft_{kind}{end}" for kind in KINDS] for end in ("", "2", "n"))


@rule(*LAST, *TWO, *ALL, "fft_fftshift", "fft_ifftshift", "_fft_c2c", "_fft_r2c", "_fft_c2r")
def transform(trace: Trace, node: Any, x: Value, *arguments: Any, **keywords: Any) -> Value:
    dims = argument_of(node, "dim", arguments, keywords)
    sizes = argument_of(node, "s", arguments, keywords)
    if dims is None:
        count = 1 if called(node) in LAST else 2 if called(node) in TWO else len(sizes or x.shape)
        dims = range(len(x.shape) - count, len(x.shape))
    dims = [dims] if isinstance(dims, int) else dims
    trace.labels.pin_all([x.dims[d] for d in dims], f"{node.name} mixes its entries")
    return Value(shape_of(node), settled(x, dims).dims)


@rule("view_as_complex")
def as_complex(trace: Trace, node: Any, x: Value) -> Value:
    """Take the last dimension for the two parts of a number."""
    trace.labels.pin(x.dims[-1], f"{node.name} takes it for the parts of a number")
    return Value(shape_of(node), x.dims[:-1])


@rule("view_as_real")
def as_real(trace: Trace, node: Any, x: Value) -> Value:
    return Value(shape_of(node), (*x.dims, FIXED))


@rule("real", "imag", "_conj", "conj_physical", "resolve_conj", "resolve_neg")
def part(trace: Trace, node: Any, x: Value) -> Value:
    return Value(shape_of(node), x.dims)


@rule("angle")
def angle(trace: Trace, node: Any, x: Value) -> Value:
    return unmarked(Value(shape_of(node), x.dims))  # of minus zero it is half a turn


@rule("complex", "polar")
def made_complex(trace: Trace, node: Any, a: Value, b: Value) -> Value:
    return broadcast(trace, node.name, [a, b], shape_of(node))
